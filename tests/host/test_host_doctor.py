"""`hsmtoll doctor` on a signing host: its own files, and each profile of its policy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.doctor.on_host import HostSetup, examine_host
from hsmtoll.settings import load
from tests.kit.signing_host import ME, PROFILE, Authority, entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.doctor import Check
    from tests.kit.signing_host import RunningHost

_NOW = datetime.now(UTC)
_TWO = PROFILE + '[profile.beta]\nenvironment = "sandbox"\nidentity = "eseal"\n'


def doctored(host: RunningHost, *argv: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    done = host.command("doctor", "--json", *argv)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def checks(report: dict[str, Any], profile: str | None = None) -> dict[str, dict[str, Any]]:
    return {each["check"]: each for each in report["checks"] if each["profile"] == profile}


def examined(
    *, days: float = 0, synchronised: bool = True, needs_clock: bool = True
) -> dict[str, Check]:
    """The host of this process's environment, *days* from now."""
    setup = HostSetup(
        settings=load(),
        now=_NOW + timedelta(days=days),
        synchronised=lambda: synchronised,
        needs_clock=needs_clock,
    )
    return {each.check: each for each in examine_host(setup)}


def test_a_running_host_is_well_and_each_of_its_profiles_is_checked(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    host.say("\n".join([_TWO, entry(ME)]))
    host.start()
    assert host.ask().status == 200
    code, report = doctored(host, "--all-profiles")
    assert (code, report["exit_code"]) == (0, 0)
    own = checks(report)
    # Certificates of two days, and an account that owns its policy where it is not root.
    warned = {name for name, each in own.items() if each["verdict"] == "warn"}
    assert warned == {"tls-certificate", "tls-client-ca", *(["policy"] if os.geteuid() else [])}
    assert {own[name]["verdict"] for name in ("audit", "audit-key", "tls", "stop", "state")} == {
        "ok"
    }
    assert own["host-clock"]["verdict"] in ("ok", "skip")
    assert own["tls-certificate"]["days"] == 1
    for name in ("acme", "beta"):
        of_profile = checks(report, name)
        assert of_profile["key"]["verdict"] == of_profile["pin"]["verdict"] == "ok"
        assert isinstance(of_profile["certificate-validity"]["days"], int)
    # The control: one profile alone, by its name.
    _, report = doctored(host, "--policy-profile", "beta")
    assert {each["profile"] for each in report["checks"]} == {None, "beta"}
    # The host was not disturbed.
    assert host.ask().status == 200


def test_warnings_make_a_strict_doctor_exit_with_3_and_failures_with_their_own_code(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    assert doctored(host, "--all-profiles")[0] == 0
    code, report = doctored(host, "--all-profiles", "--strict")
    assert (code, report["exit_code"], report["summary"]["fail"]) == (3, 3, 0)
    Path(host.environ["HSMTOLL_HOST__AUDIT_KEY"]).chmod(0o644)
    assert doctored(host, "--all-profiles", "--strict")[0] == 10


def test_a_profile_whose_key_is_missing_does_not_hide_the_others(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    wrong = '[profile.acme.hsm]\nkey = "pkcs11:token=nowhere;object=none"\n'
    host.say("\n".join([_TWO, wrong, entry(ME)]))
    code, report = doctored(host, "--all-profiles")
    assert code == 30
    assert checks(report, "acme")["device"]["verdict"] == "fail"
    assert checks(report, "beta")["certificate-validity"]["verdict"] in ("ok", "warn")
    text = host.command("doctor", "--all-profiles").stdout
    assert "fail  acme: device (device-missing): " in text
    assert "ok    beta: key: " in text


def test_a_profile_that_the_policy_does_not_have_is_a_usage_error_with_the_nearest_name(
    make_host: Callable[..., RunningHost],
) -> None:
    done = make_host().command("doctor", "--policy-profile", "acne")
    assert done.returncode == 2
    assert "acme" in done.stderr


def test_a_doctor_without_the_option_says_which_one_a_host_needs(
    make_host: Callable[..., RunningHost],
) -> None:
    done = make_host().run("doctor", HSMTOLL_HSM__KEY="")
    assert done.returncode == 10
    assert "doctor --all-profiles" in done.stdout


def broken_policy(host: RunningHost) -> None:
    host.policy.write_text("no = [table")


def open_policy(host: RunningHost) -> None:
    host.policy.chmod(0o666)


def other_key(host: RunningHost) -> None:
    shutil.copy(
        Authority(host.home / "other").issue("localhost").key, host.environ["HSMTOLL_HOST__KEY"]
    )


def key_that_is_no_key(host: RunningHost) -> None:
    Path(host.environ["HSMTOLL_HOST__AUDIT_KEY"]).write_text("none")


def stop_directory_of_all(host: RunningHost) -> None:
    host.stop_file.parent.chmod(0o777)


def state_of_all(host: RunningHost) -> None:
    Path(host.environ["HSMTOLL_STATE"]).chmod(0o777)


@pytest.mark.parametrize(
    ("damage", "check", "exit_code"),
    [
        (broken_policy, "policy", 10),
        (open_policy, "policy", 10),
        (other_key, "tls", 10),
        (key_that_is_no_key, "audit-key", 10),
        (stop_directory_of_all, "stop", 10),
        (state_of_all, "state", 10),
    ],
)
def test_each_damage_of_the_hosts_files_fails_its_own_check(
    host: RunningHost, damage: Callable[[RunningHost], None], check: str, exit_code: int
) -> None:
    assert examined()[check].verdict != "fail"
    damage(host)
    found = examined()[check]
    assert (found.verdict, found.exit_code) == ("fail", exit_code)
    assert found.line.isprintable()
    assert found.hint


def test_a_log_that_was_changed_or_cut_off_fails_the_audit(
    make_host: Callable[..., RunningHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host().start()
    for name, value in host.environ.items():
        monkeypatch.setenv(name, value)
    for _ in range(3):
        assert host.ask().status == 200
    assert examined()["audit"].verdict == "ok"
    assert host.end() == 0
    (segment,) = host.audit.glob("audit-*.jsonl")
    whole = segment.read_bytes()
    segment.write_bytes(
        whole.replace(b'"road', b'"rail', 1).replace(b"movement/road", b"movement/rail", 1)
    )
    assert (examined()["audit"].code, examined()["audit"].exit_code) == ("audit-broken", 91)
    segment.write_bytes(whole)
    assert examined()["audit"].verdict == "ok"
    for each in host.audit.glob("*.jsonl"):
        each.unlink()
    assert examined()["audit"].code == "audit-broken"


def test_a_stop_is_a_warning_until_it_is_over(host: RunningHost) -> None:
    assert examined()["stop"].verdict == "ok"
    host.stop_file.touch()
    assert (examined()["stop"].verdict, examined()["stop"].code) == ("warn", "stopped")


def test_a_clock_that_nobody_keeps_fails_where_a_profile_signs_by_it(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.policy.exists()
    found = examined(synchronised=False)["host-clock"]
    assert (found.verdict, found.code, found.exit_code) == ("fail", "clock-unsynchronised", 50)
    assert examined(synchronised=False, needs_clock=False)["host-clock"].verdict == "skip"
    monkeypatch.setenv("HSMTOLL_HOST__CLOCK", "unchecked")
    assert examined(synchronised=False)["host-clock"].verdict == "ok"


@pytest.mark.parametrize(
    ("days", "verdict"), [(0, "warn"), (-57.9, "warn"), (-58.1, "ok"), (1.9, "warn"), (2.1, "fail")]
)
def test_a_tls_certificate_is_told_60_days_before_its_end(
    host: RunningHost, days: float, verdict: str
) -> None:
    """Those of the tests end two days from now."""
    assert host.authority.ca.exists()
    found = examined(days=days)
    for name in ("tls-certificate", "tls-client-ca"):
        assert found[name].verdict == verdict
        left = found[name].days
        assert left is not None
        assert abs(left + 1 + days - 2) <= 1


@pytest.mark.parametrize(("days", "verdict"), [(1.9, "ok"), (2.1, "fail")])
def test_a_revocation_list_that_has_expired_fails(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch, days: float, verdict: str
) -> None:
    assert examined()["tls-crl"].verdict == "skip"
    monkeypatch.setenv("HSMTOLL_HOST__CLIENT_CRL", str(host.authority.crl()))
    assert examined(days=days)["tls-crl"].verdict == verdict


def test_a_host_for_unix_sockets_alone_has_no_tls_to_check(
    host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LISTEN", "CERT", "KEY", "CLIENT_CA"):
        monkeypatch.delenv(f"HSMTOLL_HOST__{name}")
    found = examined()
    assert {found[name].verdict for name in found if name.startswith("tls")} == {"skip"}
    assert found["host-settings"].verdict == "ok"
    assert host.socket.name in found["host-settings"].line


def test_nothing_is_written_by_the_checks(host: RunningHost) -> None:
    before = {each: each.lstat().st_mtime_ns for each in host.home.rglob("*")}
    assert examined()["audit"].line.endswith("no records yet")
    assert {each: each.lstat().st_mtime_ns for each in host.home.rglob("*")} == before


def test_the_doctor_needs_none_of_the_packages_of_the_extras() -> None:
    """The library alone is installed where a business has its key."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('aiohttp', 'prometheus_client')))"
    code = f"{blocked}; import hsmtoll.cli.doctor; {{}}"
    done = subprocess.run([sys.executable, "-c", code.format("")], check=False)
    assert done.returncode == 0
    # The control: the daemon needs them.
    argv = [sys.executable, "-c", code.format("import hsmtoll.host.server")]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 1
