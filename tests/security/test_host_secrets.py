"""The signing host shows no PIN, assertion or token: in no log, error, page or audit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kit.signing_host import make_host

if TYPE_CHECKING:
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

#: What a JWT begins with, whoever made it.
JWT = "eyJ"


@pytest.mark.parametrize("log", ["text", "json"])
@pytest.mark.parametrize(
    ("fault", "endpoint"),
    [("echo", "token"), ("echo", "exchange"), ("newline-token", "token"), ("html", "token")],
)
def test_nothing_that_fails_shows_a_secret(
    toll_eseal: TemporaryIdentity,
    toll_sandbox: Sandbox,
    toll_faults: Faults,
    fault: str,
    endpoint: str,
    log: str,
) -> None:
    environ = {**toll_eseal.environ(), **toll_sandbox.environ(), **toll_faults.environ()}
    environ["HSMTOLL_LOG"] = log
    with make_host(environ, faults=toll_faults) as host:
        host.start()
        # A caller that sends an assertion where it does not belong.
        stray = host.ask().body["assertion"]
        for members in ({"scope": stray}, {"profile": stray}, {"resource": [stray]}):
            assert host.ask(**members).status in (400, 403)
        words = [repr(host.ask(scope="air")), repr(host.ask(profile="other"))]
        toll_faults.set("wrong-signature")
        words.append(repr(host.ask()))
        toll_faults.clear()
        toll_sandbox.fault(fault, endpoint)
        failed = host.ask("/v1/token")
        assert failed.status in (502, 503), failed
        words += [repr(failed), *(repr(host.health(page)) for page in ("/ready", "/metrics"))]
        granted = host.ask().body["assertion"]
        assert host.end() == 0
        kept = "".join(part.read_text() for part in host.audit.iterdir() if part.is_file())
        everything = host.log() + kept + "".join(words)

        # The control: the same search finds what was given on purpose.
        assert granted.startswith(JWT)
        assert JWT not in everything
        assert granted.rpartition(".")[2][:40] not in everything
        assert toll_eseal.device.pin not in host.log() + "".join(words)
        assert f'"{toll_eseal.device.pin}"' not in kept
