"""What the host owes its system: the manager's protocols, the clock, the log, and no core files."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from hsmtoll import jws
from hsmtoll.apis import named
from hsmtoll.cli import main
from hsmtoll.errors import (
    ClockError,
    ConfigurationError,
    DeviceError,
    PolicyDenied,
    TryAgainLater,
)
from hsmtoll.host import sockets, system
from hsmtoll.host.audit_log import verify
from hsmtoll.host.emergency_stop import resume, stop, stopped_by
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import GrantRequest
from hsmtoll.host.sockets import ListeningSockets
from hsmtoll.hsm.signatures import SELF_TEST
from hsmtoll.settings import Host, load
from hsmtoll.testing.clock import SettableClock
from tests.kit.accounts import importable
from tests.kit.own_device import free_port
from tests.kit.signing_host import (
    ME,
    PATIENCE,
    PROFILE,
    ROAD_SCOPE,
    RunningService,
    entry,
    errors_in,
    eventually,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.clock import Clock
    from hsmtoll.sandbox.server import Sandbox
    from tests.kit.signing_host import RunningHost


@pytest.fixture
def service(
    make_host: Callable[..., RunningHost], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[RunningService, RunningHost]]]:
    """Services in this process, with a clock that is said to be right or wrong."""
    with contextlib.ExitStack() as stack:

        def made(
            *entries: str, synchronised: bool = True, clock: Clock | None = None
        ) -> tuple[RunningService, RunningHost]:
            host = make_host(*entries)
            for name, value in host.environ.items():
                monkeypatch.setenv(name, value)
            one = RunningService(load(), synchronised=lambda: synchronised, clock=clock)
            stack.callback(one.close)
            return one, host

        yield made


def test_the_manager_is_told_of_each_turn(running_host: RunningHost) -> None:
    running_host.reload()
    assert any(each.startswith("MONOTONIC_USEC=") for each in running_host.notifications)
    assert "RELOADING=1" in running_host.notifications
    running_host.signal(signal.SIGTERM)
    running_host.notifications.clear()
    running_host.hear("STOPPING=1")
    # A second SIGTERM at the very end would be the last word.
    assert running_host.process is not None
    assert running_host.process.wait(PATIENCE) == 0


def test_the_watchdog_is_fed(make_host: Callable[..., RunningHost]) -> None:
    host = make_host().start(WATCHDOG_USEC="1000000")
    host.hear("WATCHDOG=1")
    # A watchdog that is another process's is none of ours.
    assert system.watchdog_seconds() is None


def test_no_core_file_and_no_debugger_see_its_memory(running_host: RunningHost) -> None:
    assert running_host.process is not None
    limits = Path(f"/proc/{running_host.process.pid}/limits").read_text()
    (core,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


_ACTIVATED = """
import os, socket, sys
one = socket.socket(socket.AF_UNIX)
one.bind(sys.argv[1])
one.listen()
os.dup2(one.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "hsmtoll", "serve"])
"""


def is_listening(path: Path) -> bool:
    """Whether somebody does: the file of a socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_a_socket_of_the_managers_is_taken_over(make_host: Callable[..., RunningHost]) -> None:
    host = make_host()
    for name in ("SOCKET", "LISTEN", "METRICS"):
        del host.environ[f"HSMTOLL_HOST__{name}"]
    argv = [sys.executable, "-c", _ACTIVATED, str(host.socket)]
    with (host.home / "stderr").open("wb") as log:
        host.process = subprocess.Popen(argv, env=os.environ | host.environ, stderr=log)
    eventually(lambda: is_listening(host.socket))
    # A caller who came before it was there, and before its first self-test, is served as well.
    assert host.ask().status == 200
    assert host.end() == 0
    # It belongs to the manager, who listens on.
    assert host.socket.exists()


_NOT_LISTENING = """
import os, sys
if sys.argv[1] == "closed":
    os.closerange(3, 4)
else:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 3)
    os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "hsmtoll", "serve"])
"""


@pytest.mark.parametrize("what", ["closed", "file"])
def test_what_the_manager_gave_and_is_no_socket_is_named(
    make_host: Callable[..., RunningHost], what: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _NOT_LISTENING, what], env=os.environ | make_host().environ,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 10, result.stderr
    assert "descriptor 3 is not a listening stream socket" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_host_that_ends_leaves_the_socket_of_another_one_alone(
    make_host: Callable[..., RunningHost],
) -> None:
    first = make_host().start()
    first.faults.set("hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(first.ask)
        eventually(lambda: first.records("intent"))
        first.signal(signal.SIGTERM)
        # Its name is free as soon as it takes nobody any more, and while it still signs.
        eventually(lambda: not first.socket.exists())
        with sockets.listen_unix(first.socket, "HSMTOLL_HOST__SOCKET"):
            first.faults.clear()
            assert asked.result(60).status == 200
            assert first.end() == 0
            assert first.socket.exists()


def test_a_name_that_was_taken_over_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    path = tmp_path / "host.sock"
    one = ListeningSockets(Host(socket=path))
    path.rename(tmp_path / "kept")
    path.touch()
    one.close()
    assert path.exists()
    path.unlink()
    ListeningSockets(Host(socket=path)).close()
    assert not path.exists()


def test_a_missing_directory_of_the_socket_is_made_and_its_group_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "host.sock"
    for expected in (1, 1):
        sockets.listen_unix(path, "HSMTOLL_HOST__SOCKET").close()
        # The second time it is there, and there is nothing to say.
        assert len(caplog.records) == expected
    assert f"{path.parent} was missing" in caplog.text
    assert f"for group {path.parent.stat().st_gid}" in caplog.text


def test_a_stop_that_finds_no_settings_says_where_they_are_looked_for() -> None:
    result = CliRunner().invoke(main, ["--config", "/dev/null", "stop"])
    assert isinstance(result.exception, ConfigurationError)
    assert "--config" in (result.exception.hint or "")
    assert "/etc/hsmtoll/hsmtoll.toml" in (result.exception.hint or "")


def test_without_any_door_it_does_not_start(make_host: Callable[..., RunningHost]) -> None:
    host = make_host()
    result = host.run("serve", HSMTOLL_HOST__SOCKET="", HSMTOLL_HOST__LISTEN="")
    assert (result.returncode, "HSMTOLL_HOST__SOCKET" in result.stderr) == (10, True)


@pytest.mark.parametrize("name", ["POLICY", "AUDIT_DIR", "AUDIT_KEY"])
def test_what_it_cannot_do_without_is_named(
    make_host: Callable[..., RunningHost], name: str
) -> None:
    result = make_host().run("serve", **{f"HSMTOLL_HOST__{name}": ""})
    assert (result.returncode, f"HSMTOLL_HOST__{name}" in result.stderr) == (10, True)
    assert len(errors_in(result.stderr)) == 1


def test_metrics_are_for_this_machine_unless_it_is_said_otherwise(
    make_host: Callable[..., RunningHost],
) -> None:
    result = make_host().run("serve", HSMTOLL_HOST__METRICS="0.0.0.0:0")
    assert (result.returncode, "not on the loopback" in result.stderr) == (10, True)
    # The control: with consent it is listened on.
    port = free_port()
    with make_host() as host:
        host.start(HSMTOLL_HOST__METRICS=f"0.0.0.0:{port}", HSMTOLL_HOST__METRICS_PUBLIC="true")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/live")
            assert connection.getresponse().status == 200
    result = make_host().run("serve", HSMTOLL_HOST__METRICS="unix:///nonexistent/run/m.sock")
    assert result.returncode == 10
    assert "HSMTOLL_HOST__METRICS /nonexistent/run/m.sock: no directory for it" in result.stderr
    assert "install -d -o ACCOUNT -g GROUP -m 2750 /nonexistent/run" in result.stderr


def test_a_second_host_on_one_audit_or_socket_does_not_start(running_host: RunningHost) -> None:
    same = running_host.run("serve", HSMTOLL_HOST__LISTEN="", HSMTOLL_HOST__METRICS="")
    assert (same.returncode, "another host listens there" in same.stderr) == (10, True)
    beside = str(running_host.socket.with_name("b.sock"))
    other = running_host.run(
        "serve", HSMTOLL_HOST__LISTEN="", HSMTOLL_HOST__METRICS="", HSMTOLL_HOST__SOCKET=beside
    )
    assert (other.returncode, "one signing host writes it" in other.stderr) == (91, True)
    assert running_host.ask().status == 200


def test_the_self_test_signs_what_can_be_no_grant(
    service: Callable[..., tuple[RunningService, RunningHost]],
) -> None:
    one, host = service()
    before = host.signatures()
    assert one.not_ready()
    one.prove()
    one.prove()
    assert host.signatures() == before + 1
    assert one.not_ready() == []
    with pytest.raises(ValueError, match="three segments"):
        jws.read_unverified(SELF_TEST.decode())


def test_a_device_that_failed_is_told_until_it_signs_again(running_host: RunningHost) -> None:
    def ready() -> tuple[int, bool]:
        page = running_host.health("/ready")
        metrics = running_host.health("/metrics").body["text"]
        assert page.body["ready"] is (page.body["why"] == [])
        return page.status, "hsmtoll_host_ready 1.0\n" in metrics

    assert running_host.ask(scope="air").status == 403
    assert ready() == (200, True)
    running_host.faults.set("token-removed")
    assert running_host.ask().word == "device_down"
    assert ready() == (503, False)
    assert running_host.health("/ready").body["why"][0].startswith("profile acme: ")
    running_host.faults.clear()
    # Nobody has to ask for a grant to find out.
    eventually(lambda: ready() == (200, True))
    assert "signed" not in {each["outcome"] for each in running_host.records("result")}


def second_passes(clock: SettableClock) -> None:
    """By the boot clock alone: the device's process compares iat with the time that it is."""
    clock.advance(1.0)
    clock.set_wall(time.time())


def test_a_device_that_goes_on_failing_is_tested_ever_more_seldom(
    service: Callable[..., tuple[RunningService, RunningHost]],
) -> None:
    clock = SettableClock.at_real_time()
    one, host = service(entry(ME), clock=clock)
    me = Peer.local(os.geteuid(), os.getegid())

    def grant() -> object:
        return one.grant(me, GrantRequest("acme", "road"), gone=lambda: False).result(60)

    def tested(seconds: int) -> int:
        """How often, where a timer looks each second."""
        before = host.signatures()
        for _ in range(seconds):
            one.prove()
            second_passes(clock)
        return host.signatures() - before

    one.prove()
    assert tested(10) == 0
    host.faults.set("wrong-signature")
    for _ in range(3):
        with pytest.raises(DeviceError):
            grant()
    assert one.not_ready()
    # After 0, 5, 15, 35 and 75 s, and then once a minute.
    assert tested(100) == 5
    assert tested(600) == 10
    host.faults.clear()
    assert tested(60) == 1
    assert one.not_ready() == []
    # A grant is as good as a self-test.
    host.faults.set("wrong-signature")
    with pytest.raises(DeviceError):
        grant()
    host.faults.clear()
    assert one.not_ready()
    assert grant()
    assert (one.not_ready(), tested(60)) == ([], 0)


def test_a_device_that_never_signed_well_is_tested_ever_more_seldom_as_well(
    service: Callable[..., tuple[RunningService, RunningHost]],
) -> None:
    clock = SettableClock.at_real_time()
    one, host = service(entry(ME), clock=clock)

    def tested(seconds: int) -> int:
        """How often, where two threads look each second."""
        before = host.signatures()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for _ in range(seconds):
                for each in [pool.submit(one.prove) for _ in range(2)]:
                    each.result(60)
                second_passes(clock)
        return host.signatures() - before

    # What signs may be paid for by the signature: after 0, 5, 15, 35 and 75 s.
    host.faults.set("wrong-signature")
    assert tested(100) == 5
    assert one.not_ready()
    host.faults.clear()
    assert tested(60) == 1
    assert one.not_ready() == []


def test_nothing_is_signed_for_the_real_world_while_nobody_keeps_the_clock(
    service: Callable[..., tuple[RunningService, RunningHost]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, host = service(entry(ME))
    one.close()
    # The endpoints of the sandbox have no place in a profile of test.
    for name in ("ISSUER", "TOKEN", "CUSTOMS"):
        monkeypatch.delenv(f"HSMTOLL_ENDPOINTS__{name}")
    host.write_policy(entry(ME), before=PROFILE.replace('"sandbox"', '"test"'))
    me = Peer.local(os.geteuid(), os.getegid())
    kept: list[str] = []
    second = RunningService(load(), synchronised=lambda: bool(kept))
    try:
        before = host.signatures()
        second.prove()
        (why,) = second.not_ready()
        assert why.startswith("profile acme: the clock is not synchronised: ")
        assert "HSMTOLL_HOST__CLOCK=unchecked" in why
        with pytest.raises(ClockError, match="signing host's clock"):
            second.grant(me, GrantRequest("acme", "road"), gone=lambda: False).result()
        assert host.signatures() == before
        kept.append("by somebody")
        second.prove()
        assert second.not_ready() == []
        assert second.grant(me, GrantRequest("acme", "road"), gone=lambda: False).result()["jti"]
        assert host.signatures() == before + 2
    finally:
        second.close()


def test_who_left_while_waiting_costs_no_signature(
    service: Callable[..., tuple[RunningService, RunningHost]],
) -> None:
    one, host = service()
    one.prove()
    before = host.signatures()
    me = Peer.local(os.geteuid(), os.getegid())
    with pytest.raises(TryAgainLater, match="the caller has disconnected"):
        one.grant(me, GrantRequest("acme", "road"), gone=lambda: True).result()
    assert host.signatures() == before
    assert one.grant(me, GrantRequest("acme", "road"), gone=lambda: False).result()
    assert host.signatures() == before + 1


def test_a_storm_of_refusals_does_not_fill_the_disk(
    service: Callable[..., tuple[RunningService, RunningHost]],
) -> None:
    one, host = service(entry("uid:1"))
    for _ in range(200):
        with pytest.raises(PolicyDenied):
            one.grant(Peer.local(2, 2), GrantRequest("acme", "road"), gone=lambda: False).result()
    assert len(host.records("refused")) == 60
    # Another one's refusals are written down all the same.
    with pytest.raises(PolicyDenied):
        one.grant(Peer.local(3, 3), GrantRequest("acme", "road"), gone=lambda: False).result()
    assert host.records("refused")[-1]["caller"] == "uid:3"


def test_several_profiles_have_each_what_the_policy_gives_them(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    host.write_policy(
        f'[caller."{ME}"]',
        'profile.acme = { scopes = ["road"], mode = ["grant"] }',
        'profile.second = { scopes = ["air"], mode = ["grant"] }',
        before=PROFILE + PROFILE.replace("acme", "second"),
    )
    host.start()
    asked = [("acme", "road"), ("second", "air"), ("acme", "air"), ("second", "road")]
    statuses = [host.ask(profile=profile, scope=scope).status for profile, scope in asked]
    assert statuses == [200, 200, 403, 403]
    records = [(each["profile"], each["scope"]) for each in host.records("intent")]
    assert records == [("acme", ROAD_SCOPE), ("second", named("air").eseal)]


def test_a_profile_that_cannot_work_is_named_with_its_file(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    for wrong, message in (
        ('identity = "norwegian"', "iss is required"),
        ('identity = "eseal"\nconsumer_org = "987654325"', "consumer_org is not a profile's"),
        ('identity = "eseal"\nnonsense = 1', "nonsense"),
    ):
        host.write_policy(before=PROFILE.replace('identity = "eseal"', wrong))
        result = host.run("serve")
        assert result.returncode == 10, result.stderr
        assert f"policy {host.policy}: profile acme: " in result.stderr
        assert message in result.stderr


def test_the_stop_file_says_stop_by_being_there_and_by_not_being_seen(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    assert stopped_by(file) is None
    assert (stop(file), stop(file)) == (True, False)
    assert stopped_by(file) == "the stop file is there"
    assert (resume(file), resume(file)) == (True, False)
    # A link to nowhere is there as well; what is not a directory cannot be looked into.
    file.symlink_to(tmp_path / "nowhere")
    assert stopped_by(file) is not None
    plain = tmp_path / "plain"
    plain.touch()
    assert "cannot be read" in str(stopped_by(plain / "stop"))
    assert "cannot be read" in str(stopped_by(tmp_path / "gone" / "stop"))
    with pytest.raises(ConfigurationError, match="cannot be changed"):
        stop(tmp_path / "gone" / "stop")


_UNPRIVILEGED = """
import os, sys
from pathlib import Path
from hsmtoll.errors import HsmTollError
from hsmtoll.host.emergency_stop import check_stop_directory, resume, stop, stopped_by
from hsmtoll.host.policy import Policy
from tests.kit.accounts import OTHER, become, import_all
policy, file = map(Path, sys.argv[1:])
import_all()
become(OTHER)
Policy.load(policy); check_stop_directory(file)
print("reads", stopped_by(file))
for change in (stop, resume):
    try:
        change(file)
        print("changed")
    except HsmTollError as exc:
        print(exc.exit_code)
print(os.access(policy, os.W_OK))
"""


@pytest.mark.needs_root
def test_the_hosts_account_can_change_neither_policy_nor_stop(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    stop(host.stop_file)
    argv = [sys.executable, "-c", _UNPRIVILEGED, str(host.policy), str(host.stop_file)]
    there = {**os.environ, **importable()}
    done = subprocess.run(argv, env=there, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["reads the stop file is there", "changed", "10", "False"]
    # The control: others who could write them are refused.
    host.policy.chmod(0o666)
    result = host.run("serve")
    assert (result.returncode, "others may change" in result.stderr) == (10, True)
    host.policy.chmod(0o644)
    host.stop_file.parent.chmod(0o777)
    result = host.run("serve")
    assert (result.returncode, "others may change" in result.stderr) == (10, True)


def test_heads_go_to_the_system_log(tmp_path: Path) -> None:
    logger = logging.getLogger("hsmtoll.test-of-heads")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.settimeout(60)
        system.heads_to_system_log(logger, tmp_path / "log")
        logger.info("audit head 7:abc")
        assert log.recv(4096).rstrip(b"\0").endswith(b"audit head 7:abc")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_a_log_that_was_changed_is_not_gone_on_with(running_host: RunningHost) -> None:
    assert running_host.ask().status == 200
    assert running_host.end() == 0
    (part,) = running_host.audit.glob("audit-*.jsonl")
    part.write_bytes(part.read_bytes().replace(b"acme", b"evil", 1))
    result = running_host.run("serve")
    assert (result.returncode, len(errors_in(result.stderr))) == (91, 1)
    assert "record 2: changed" in result.stderr
    assert verify(running_host.audit, running_host.public_key).bad == "record 2: changed"


def test_a_renewal_that_one_caller_may_not_have_is_had_by_another(
    make_host: Callable[..., RunningHost], toll_sandbox: Sandbox
) -> None:
    host = make_host(entry(ME, per_day=1), entry("san:dns:app.example"))
    host.environ["HSMTOLL_BUDGET__PER_REQUEST"] = "1"
    host.start()
    toll_sandbox.fault("500", "exchange")
    assert host.ask("/v1/token").status >= 500
    # The signature was spent, so it counts; what others may have is not touched by that.
    before = host.signatures()
    eventually(lambda: host.ask("/v1/token").word == "quota_exceeded")
    assert host.signatures() == before
    assert host.ask().status == 429
    toll_sandbox.clear_faults()
    app = host.authority.issue("app.example")
    eventually(lambda: host.ask_tls(app, "/v1/token").status == 200)
    assert [each["outcome"] for each in host.records("result")] == ["signed", "signed"]


def test_whoever_is_refused_by_quota_spends_no_signature_of_the_hour(
    make_host: Callable[..., RunningHost], toll_sandbox: Sandbox
) -> None:
    host = make_host(entry(ME, per_day=1), entry("san:dns:app.example"))
    host.environ |= {"HSMTOLL_BUDGET__PER_REQUEST": "1", "HSMTOLL_BUDGET__PER_HOUR": "2"}
    host.start()
    toll_sandbox.fault("500", "exchange")
    assert host.ask("/v1/token").status >= 500
    toll_sandbox.clear_faults()
    eventually(lambda: host.ask("/v1/token").word == "quota_exceeded")
    for _ in range(3):
        assert host.ask("/v1/token").word == "quota_exceeded"
    app = host.authority.issue("app.example")
    assert host.ask_tls(app, "/v1/token").status == 200
