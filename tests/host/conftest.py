"""The signing host of this room, with both doors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from hsmtoll.settings import load
from tests.kit import signing_host

# For the tests of this room.
from tests.kit.accounts import OTHER
from tests.kit.signing_host import ME, RunningHost, RunningService, entry, eventually, raw_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

__all__ = ["ME", "OTHER", "RunningHost", "entry", "eventually", "raw_request"]


@pytest.fixture
def make_host(
    toll_eseal: TemporaryIdentity, toll_sandbox: Sandbox, toll_faults: Faults
) -> Iterator[Callable[..., RunningHost]]:
    """Hosts that are not started yet, by the entries of their policy (`entry`)."""
    environ = {**toll_eseal.environ(), **toll_sandbox.environ(), **toll_faults.environ()}
    with contextlib.ExitStack() as stack:

        def made(*entries: str) -> RunningHost:
            return stack.enter_context(
                signing_host.make_host(environ, *entries, faults=toll_faults)
            )

        yield made


@pytest.fixture
def running_host(make_host: Callable[..., RunningHost]) -> RunningHost:
    """
    A real `hsmtoll serve`, ready: Unix socket, TLS and metrics. This account and the certificate
    of ``app.example`` may have grants and tokens for the road, of profile acme.
    """
    return make_host().start()


@pytest.fixture
def host(make_host: Callable[..., RunningHost], monkeypatch: pytest.MonkeyPatch) -> RunningHost:
    """The files of one that this account may ask; `service` is it, in this process."""
    one = make_host(entry(ME))
    for name, value in one.environ.items():
        monkeypatch.setenv(name, value)
    return one


@pytest.fixture
def service(host: RunningHost) -> Iterator[RunningService]:
    """What stands behind the doors of *host*, proven and without a door."""
    one = RunningService(load(), synchronised=lambda: True)
    one.prove()
    yield one
    host.faults.clear()
    one.close()
