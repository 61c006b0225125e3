"""The client of the signing host at a real one: grants, tokens, fail-over, stop, the audit."""

from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll.app import App
from hsmtoll.errors import HsmTollError, PolicyDenied
from hsmtoll.host.policy import Policy
from hsmtoll.settings import load
from hsmtoll.token import TokenRequest
from tests.kit import commands
from tests.kit.readers import blocks, section
from tests.kit.signing_host import ME, PATIENCE, POLICY, ROAD_SCOPE, entry, make_host

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity
    from tests.kit.signing_host import RunningHost

ROAD = TokenRequest(ROAD_SCOPE)


def caller(sandbox: Sandbox, state: Path, *urls: str, **more: str) -> dict[str, str]:
    """The variables of an application that has no device and no PIN."""
    return {
        **sandbox.environ(),
        "HSMTOLL_IDENTITY": "eseal",
        "HSMTOLL_STATE": str(state),
        "HSMTOLL_SIGNER__URL": " ".join(urls),
        "HSMTOLL_SIGNER__PROFILE": "acme",
        **more,
    }


def hsmtoll(
    *argv: str, environ: dict[str, str], stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """One command of that application, in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HSMTOLL_", "SOFTHSM"))}
    return commands.hsmtoll(*argv, stdin=stdin, env=inherited | environ, timeout=2 * PATIENCE)


def app_of(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> App:
    """As the library has it."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return App(load())


def over_tls(host: RunningHost, name: str = "app.example") -> dict[str, str]:
    """What a caller over TLS sets besides."""
    mine = host.authority.issue(name)
    return {
        "HSMTOLL_SIGNER__CLIENT_CERT": str(mine.cert),
        "HSMTOLL_SIGNER__CLIENT_KEY": str(mine.key),
        "HSMTOLL_SIGNER__CA_FILE": str(host.authority.ca),
    }


def test_a_program_without_a_device_calls_customs_through_either_door(
    toll_faults: Faults, running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    before = toll_faults.count("C_SignInit")
    unix = caller(toll_sandbox, tmp_path / "a", running_host.url)
    tls = caller(toll_sandbox, tmp_path / "b", running_host.tls_url, **over_tls(running_host))
    for number, environ in enumerate((unix, tls), 1):
        called = hsmtoll("test-auth", "road", environ=environ)
        assert (called.stdout, called.returncode) == ("200 OK\n", 0), called.stderr
        # The token was kept under the identity that the grant showed: no second signature.
        assert hsmtoll("test-auth", "road", environ=environ).returncode == 0
        assert toll_faults.count("C_SignInit") == before + number
    callers = [each["caller"] for each in running_host.records("intent")]
    assert callers == [f"uid:{os.geteuid()}", "san:dns:app.example"]


def test_mode_token_gives_a_token_that_the_host_made(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url, HSMTOLL_SIGNER__MODE="token")
    called = hsmtoll("test-auth", "road", environ=environ)
    assert (called.stdout, called.returncode) == ("200 OK\n", 0), called.stderr
    shown = json.loads(hsmtoll("token", "road", "--json", environ=environ).stdout)
    assert shown["scope"] == ROAD_SCOPE
    assert len(running_host.records("release")) == 1
    refused = hsmtoll("sign", "road", environ=environ)
    assert refused.returncode == 10
    assert "HSMTOLL_SIGNER__MODE" in refused.stderr


def test_sign_on_the_host_and_exchange_elsewhere_is_audited_and_can_be_stopped(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url)
    signed = hsmtoll("sign", "road", environ=environ)
    assert signed.returncode == 0, signed.stderr
    intents = running_host.records("intent")
    results = running_host.records("result")
    assert [each["scope"] for each in intents] == [ROAD_SCOPE]
    assert results[0]["outcome"] in ("ok", "signed"), results
    network = {k: v for k, v in environ.items() if "SIGNER" not in k}
    done = hsmtoll("exchange", environ=network, stdin=signed.stdout)
    assert done.returncode == 0, done.stderr
    assert running_host.command("stop").returncode == 0
    stopped = hsmtoll("sign", "road", environ=environ)
    assert (stopped.returncode, stopped.stdout) == (90, "")
    assert "stop" in stopped.stderr
    assert len(running_host.records("intent")) == 1
    assert running_host.command("resume").returncode == 0
    assert hsmtoll("sign", "road", environ=environ).returncode == 0


def test_a_forced_command_signs_through_the_socket_whatever_its_caller_asks_for(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    """As sshd runs it: settings of a file, the caller's words in a variable that nobody reads."""
    config = tmp_path / "caller.toml"
    config.write_text(
        'environment = "sandbox"\nidentity = "eseal"\n[signer]\n'
        f'url = "{running_host.url}"\nprofile = "acme"\n'
    )
    config.chmod(0o600)
    ends = {k: v for k, v in toll_sandbox.environ().items() if k != "HSMTOLL_ENVIRONMENT"}
    asked = {"SSH_ORIGINAL_COMMAND": "hsmtoll sign air", "HSMTOLL_STATE": str(tmp_path)}
    signed = hsmtoll("--config", str(config), "sign", "road", environ=ends | asked)
    assert signed.returncode == 0, signed.stderr
    assert [each["scope"] for each in running_host.records("intent")] == [ROAD_SCOPE]
    done = hsmtoll("exchange", environ=toll_sandbox.environ(), stdin=signed.stdout)
    assert done.returncode == 0, done.stderr


def test_the_files_that_the_readme_shows_are_understood(tmp_path: Path) -> None:
    shown: dict[str, str] = {}
    for block in blocks(section("The signing host"), "toml"):
        first, _, text = block.text.partition("\n")
        name = first.removeprefix("# /etc/hsmtoll/").partition(",")[0]
        shown[name] = shown.get(name, "") + text
    assert shown.keys() == {"hsmtoll.toml", "policy.toml", "caller.toml"}
    policy = Policy.parse(shown["policy.toml"].encode())
    assert policy.callers.keys() == {"uid:1001", "san:dns:app.acme.example"}
    config = tmp_path / "settings.toml"
    config.write_text(shown["hsmtoll.toml"])
    config.chmod(0o600)
    assert str(load(config=config).host.policy) == "/etc/hsmtoll/policy.toml"
    config.write_text(shown["caller.toml"])
    assert load(config=config).signer.profile == "acme"


def test_a_caller_says_for_whom_and_the_policy_which_of_them(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    def details(org: str) -> str:
        named = {"authority": "iso6523-actorid-upis", "ID": f"0192:{org}"}
        return json.dumps([{"type": "urn:altinn:systemuser", "systemuser_org": named}])

    # An inline table of TOML, which JSON is not.
    allowed = '{type = "urn:altinn:systemuser", systemuser_org = {ID = "0192:910000001"}}'
    rules = entry(ME).replace(" }", f", authorization_details = [{allowed}] }}")
    running_host.write_policy(rules)
    running_host.reload()
    environ = caller(toll_sandbox, tmp_path, running_host.url)
    asked = ("sign", "road", "--authorization-details")

    signed = hsmtoll(*asked, details("910000001"), environ=environ)
    assert signed.returncode == 0, signed.stderr
    body = signed.stdout.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert claims["authorization_details"] == json.loads(details("910000001"))
    (intent,) = running_host.records("intent")
    assert "910000001" in intent["options"]["authorization_details"]

    refused = hsmtoll(*asked, details("910000002"), environ=environ)
    assert refused.returncode == 90
    assert "authorization_details" in refused.stderr
    verified = hsmtoll(
        "audit", "verify", "--public-key", str(running_host.public_key), str(running_host.audit),
        environ={},
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr


def test_what_the_policy_does_not_allow_is_error_90_with_the_hosts_words(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url)
    for argv, changes in (
        (("rail",), {}),
        (("road",), {"HSMTOLL_SIGNER__PROFILE": "other"}),
        (("road",), {"HSMTOLL_CONSUMER_ORG": "987654325"}),
    ):
        refused = hsmtoll("sign", *argv, environ=environ | changes)
        assert (refused.returncode, refused.stdout) == (90, ""), refused.stderr
        assert "403" in refused.stderr
    assert not running_host.records("intent")
    assert hsmtoll("sign", "road", environ=environ).returncode == 0


def test_the_caller_checks_the_hosts_account_and_organisation(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url)
    for changes, code in (
        ({"HSMTOLL_SIGNER__UID": str(os.geteuid())}, 0),
        ({"HSMTOLL_SIGNER__UID": "4711"}, 90),
        ({"HSMTOLL_SIGNER__ORGANIZATION": "NTRSE-5566778899"}, 0),
        ({"HSMTOLL_SIGNER__ORGANIZATION": "NTRSE-5500000000"}, 90),
    ):
        done = hsmtoll("sign", "road", environ=environ | changes)
        assert done.returncode == code, done.stderr
        assert (done.stdout != "") is (code == 0)


@pytest.fixture
def two_hosts(
    toll_eseal: TemporaryIdentity, toll_sandbox: Sandbox
) -> Iterator[tuple[RunningHost, RunningHost]]:
    """Two hosts for the same eSeal."""
    environ = toll_eseal.environ() | toll_sandbox.environ()
    with make_host(environ) as first, make_host(environ) as second:
        yield first.start(), second.start()


def test_the_second_host_takes_over_and_the_first_comes_back(
    two_hosts: tuple[RunningHost, RunningHost],
    toll_sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "hsmtoll.signing.remote")
    first, second = two_hosts
    app = app_of(caller(toll_sandbox, tmp_path, first.url, second.url), monkeypatch)

    def asked() -> tuple[int, int]:
        assert app.signer.sign(ROAD, jti="1").assertion
        return len(first.records("intent")), len(second.records("intent"))

    assert asked() == (1, 0)
    first.end()
    assert asked() == (1, 1)
    assert asked() == (1, 2)
    first.start()
    for _ in range(600):
        if asked()[0] == 2:
            break
        app.clock.sleep(0.1)
    assert len(first.records("intent")) == 2
    assert [each.getMessage().partition(" signs now")[0] for each in caplog.records] == [
        f"signing host {second.url} (2 of 2)", f"signing host {first.url} (1 of 2)",
    ]  # fmt: skip
    # A stop is a no, and no reason to ask the other one.
    assert first.command("stop").returncode == 0
    before = len(second.records("intent"))
    with pytest.raises(PolicyDenied):
        app.signer.sign(ROAD, jti="1")
    assert len(second.records("intent")) == before


def test_a_quota_is_told_with_the_time_until_the_next(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    running_host.say(POLICY.replace('"token"] }', '"token"], per_day = 1 }', 1))
    running_host.reload()
    app = app_of(caller(toll_sandbox, tmp_path, running_host.url), monkeypatch)
    assert app.signer.sign(ROAD, jti="1").assertion
    with pytest.raises(HsmTollError) as caught:
        app.signer.sign(ROAD, jti="1")
    assert (caught.value.exit_code, caught.value.code) == (75, "quota-exceeded")
    assert caught.value.retry_after is not None


def test_the_doctor_looks_at_the_host_without_a_signature(
    toll_faults: Faults, running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url)
    before = toll_faults.count("C_SignInit")
    report = hsmtoll("doctor", environ=environ)
    assert report.returncode == 0, report.stdout
    assert f"ok    signing-host: signing host {running_host.url}: reachable" in report.stdout
    assert toll_faults.count("C_SignInit") == before
    wrong = hsmtoll("doctor", environ=environ | {"HSMTOLL_SIGNER__UID": "4711"})
    assert wrong.returncode == 90
    assert "fail  signing-host (host-peer)" in wrong.stdout
    running_host.end()
    gone = hsmtoll("doctor", environ=environ)
    assert gone.returncode == 80
    assert "fail  signing-host" in gone.stdout


@pytest.mark.parametrize("mode", ["grant", "token"])
def test_a_self_test_that_the_policy_denies_is_skipped_and_the_scope_asked_for_is_tried(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path, mode: str
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url, HSMTOLL_SIGNER__MODE=mode)
    report = hsmtoll("doctor", "--json", "--online", "--scope", "road", environ=environ)
    checks = {each["check"]: each for each in json.loads(report.stdout)["checks"]}
    assert report.returncode == 0, report.stdout
    assert checks["self-test"]["verdict"] == "skip"
    if mode == "grant":
        assert "digdir:verksemd.eu is not allowed" in checks["self-test"]["line"]
        assert ROAD_SCOPE in checks["self-test"]["line"]
    assert checks[f"scope {ROAD_SCOPE}"]["verdict"] == "ok"
    # The control: a scope that the policy denies fails, and so does a host that is stopped.
    denied = hsmtoll("doctor", "--online", "--scope", "air", environ=environ)
    assert denied.returncode == 90
    running_host.stop_file.touch()
    stopped = hsmtoll("doctor", "--online", "--scope", "road", environ=environ)
    assert stopped.returncode == 90


def test_no_secret_shows_when_things_go_wrong(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.tls_url, **over_tls(running_host))
    key = Path(environ["HSMTOLL_SIGNER__CLIENT_KEY"])
    secret = key.read_text().splitlines()[1]
    other = running_host.authority.issue("stranger.example")
    output = ""
    for changes in (
        {"HSMTOLL_SIGNER__ORGANIZATION": "NTRSE-5500000000"},
        {"HSMTOLL_SIGNER__CLIENT_KEY": str(other.key)},
        {"HSMTOLL_SIGNER__CLIENT_CERT": str(key)},
        {"HSMTOLL_SIGNER__CA_FILE": str(key)},
        {"HSMTOLL_SIGNER__URL": running_host.tls_url + "/x?secret=1"},
    ):
        done = hsmtoll("-vv", "sign", "road", environ=environ | changes)
        assert done.returncode in (10, 90), done.stderr
        assert done.stdout == ""
        output += done.stderr
    assert secret not in output
    assert "eyJ" not in output
    assert "Traceback" not in output


def test_a_host_that_is_killed_in_the_middle_leaves_an_error_and_no_hanging_caller(
    running_host: RunningHost, toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = caller(toll_sandbox, tmp_path, running_host.url)
    running_host.signal(signal.SIGSTOP)
    try:
        slow = hsmtoll("sign", "road", environ=environ | {"HSMTOLL_TIMEOUT": "1"})
    finally:
        running_host.signal(signal.SIGCONT)
    assert (slow.returncode, slow.stdout) == (80, "")
    assert hsmtoll("sign", "road", environ=environ).returncode == 0
    running_host.kill()
    gone = hsmtoll("sign", "road", environ=environ)
    assert (gone.returncode, gone.stdout) == (80, "")
