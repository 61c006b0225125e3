"""A module in a process of its own: what hangs is ended, what crashes is started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll import DeviceError, HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.app import App
from hsmtoll.hsm.child import WorkerProcess
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.pin import Pin
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pool import WorkerDevice
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey
from hsmtoll.settings import load
from hsmtoll.signing.signer import new_jti
from hsmtoll.token import TokenRequest
from tests.kit.accounts import OTHER, importable
from tests.kit.forks import FORKS, in_a_fork
from tests.kit.grants import a_grant
from tests.kit.own_device import accepted, ended, workers
from tests.kit.signing_host import eventually
from tests.soak.measure import children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.hsm.device import Device
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity
    from hsmtoll.testing.softhsm import SoftHsm

DATA = a_grant()


class Asked:
    """A PIN source that counts how often it was asked, and may let one wait."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.asked = 0
        self.wait: Callable[[], object] = lambda: None

    def read(self, *, device: str) -> Pin:
        del device
        self.asked += 1
        self.wait()
        # As typed: a test before may have left a low count behind.
        return Pin(self.value, source="a test", typed=True)


@pytest.fixture
def pin(toll_eseal: TemporaryIdentity) -> Asked:
    return Asked(toll_eseal.device.pin)


@pytest.fixture
def make(
    toll_eseal: TemporaryIdentity,
    toll_faults: Faults,
    pin: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., WorkerDevice]]:
    monkeypatch.setenv("SOFTHSM2_CONF", str(toll_eseal.device.conf))
    made: list[WorkerDevice] = []

    def device(*, deadline: float = 30.0, workers: int = 1) -> WorkerDevice:
        uri = KeyUri.parse(toll_eseal.device.uri(toll_eseal.key_label))
        pin_log = PinLog(tmp_path / "state")
        settings = DeviceSettings(toll_faults.module, uri, deadline=deadline)
        one = WorkerDevice(settings, pin=pin, pin_log=pin_log, workers=workers)
        made.append(one)
        return one

    yield device
    toll_faults.clear()
    for each in made:
        each.close()


def refused(device: Device) -> HsmTollError:
    with pytest.raises(HsmTollError) as caught:
        device.sign("RS256", DATA)
    return caught.value


def signed(device: Device) -> bytes:
    return device.sign("RS256", DATA).value


def _read(process: int, name: str) -> bytes:
    return (Path("/proc") / str(process) / name).read_bytes()


def test_the_answers_are_those_of_the_device_in_this_process(
    make: Callable[..., WorkerDevice], toll_settings: Settings
) -> None:
    isolated, app = make(), App(toll_settings)
    (plain,) = app.devices
    facts = isolated.key()
    assert facts.public is not None
    for alg in ("RS256", "RS384", "RS512"):
        data = a_grant(alg, audience=app.endpoints.issuer)
        signature = isolated.sign(alg, data, candidates=[facts.public]).value
        assert facts.public.verify(alg, data, signature)
        assert signature == plain.sign(alg, data).value
    assert facts == plain.key()
    # SoftHSM lists them in another order in each process.
    assert set(isolated.certificates()) == set(plain.certificates())
    assert accepted(isolated)
    app.close()


def test_the_setting_alone_isolates_and_a_token_is_fetched_that_way(
    toll_settings: Settings,
) -> None:
    del toll_settings
    app = App(load(hsm__isolation="process"))
    with app.client() as client:
        assert client.token("road").value
        (device,) = app.devices
        assert isinstance(device, WorkerDevice)
        assert len(workers()) == 1
    assert workers() == []


def objects(**settings: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hsmtoll", "objects", "--json"]
    environment = {**os.environ, **settings}
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_what_is_behind_the_module_looks_the_same_from_a_process_of_its_own(
    toll_settings: Settings, toll_softhsm: SoftHsm, toll_faults: Faults
) -> None:
    toll_softhsm.generate_key("å b;/\n", b"\x00\xff")
    toll_faults.set("slot-error")
    seen = [App(load(hsm__isolation=each)).hsm.inspect() for each in ("none", "process")]
    assert seen[0].path == str(toll_settings.hsm.module)
    # SoftHSM lists objects in another order in each process.
    plain, isolated = (
        replace(
            each,
            tokens=tuple(
                replace(token, keys=frozenset(token.keys), certificates=set(token.certificates))  # type: ignore[arg-type]  # sets, to be compared
                for token in each.tokens
            ),
        )
        for each in seen
    )
    assert plain == isolated
    assert any(token.logged_in and token.keys and token.certificates for token in seen[1].tokens)
    assert any(token.problem for token in seen[1].tokens)
    assert workers() == []


_PEEK = """
import ctypes, os, signal, socket, sys, time
from tests.kit.accounts import become, import_all

import_all()
from hsmtoll.hsm import worker

become(int(sys.argv[1]))
# A program that was started by its account may be looked at; one that changed its account may not.
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
ours, theirs = socket.socketpair()
child = os.fork()
if child == 0:
    ours.close()
    worker.main(theirs.detach()) if sys.argv[2] == "worker" else time.sleep(600)
    os._exit(0)
for _ in range(600 if sys.argv[2] == "worker" else 1):
    try:
        outcome = "shown" if open(f"/proc/{child}/maps").read() else "ended"
    except PermissionError:
        outcome = "kept"
        break
    time.sleep(0.1)
print(outcome)
os.kill(child, signal.SIGKILL)
"""


@pytest.mark.needs_root
@pytest.mark.parametrize(("who", "output"), [("worker", "kept"), ("any program", "shown")])
def test_no_process_of_its_account_reads_the_memory_of_the_one_with_the_login(
    who: str, output: str
) -> None:
    seen = subprocess.run(
        [sys.executable, "-c", _PEEK, str(OTHER), who],
        env=os.environ | importable(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert seen.stdout == f"{output}\n", seen.stderr


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize(
    ("fault", "message"), [("crash", "SIGABRT"), ("hang", "did not answer within 3 s")]
)
def test_a_module_that_fails_under_objects_is_an_error_that_says_so(
    toll_faults: Faults, fault: str, message: str
) -> None:
    toll_faults.set(fault, function="C_GetSlotList")
    done = objects(HSMTOLL_HSM__ISOLATION="process", HSMTOLL_DEADLINE="3")
    assert (done.returncode, done.stdout) == (30, "")
    assert message in done.stderr
    assert "The next call starts a new one" in done.stderr
    if fault == "crash":
        assert objects(HSMTOLL_HSM__ISOLATION="none").returncode == -signal.SIGABRT
    toll_faults.clear()
    assert objects(HSMTOLL_HSM__ISOLATION="process").returncode == 0


@pytest.mark.usefixtures("toll_settings")
def test_a_wrong_pin_under_objects_is_tried_once_in_either_process(toll_faults: Faults) -> None:
    toll_faults.set("pin-wrong")
    for isolation in ("process", "none", "process"):
        done = objects(HSMTOLL_HSM__ISOLATION=isolation)
        (device,) = [each for each in json.loads(done.stdout)["p11_tokens"] if each["problem"]]
        assert "PIN" in device["problem"]
        assert not device["logged_in"]
    assert toll_faults.count("C_Login") == 1


def test_without_the_setting_no_process_is_started(toll_settings: Settings) -> None:
    app = App(toll_settings)
    with app.client() as client:
        assert client.token("road").value
        assert workers() == []


def test_a_hung_module_is_ended_at_the_deadline_and_the_next_call_works(
    make: Callable[..., WorkerDevice], toll_faults: Faults, pin: Asked
) -> None:
    device = make(deadline=6.0)
    first = device.sign("RS256", DATA).value
    (before,) = workers()
    toll_faults.set("hang")
    error = refused(device)
    assert (error.code, error.exit_code) == ("device-hung", 30)
    assert "within 6 s" in str(error)
    assert not Path(f"/proc/{before}").exists()
    toll_faults.clear("hang")
    assert device.sign("RS256", DATA).value == first
    assert pin.asked == 1


def test_a_device_that_hangs_again_is_down_at_once_for_those_who_come_after(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make(deadline=1.5)
    toll_faults.set("hang", function="C_Initialize")
    assert [refused(device).code for _ in range(4)] == [
        "device-hung", "device-hung", "device-down", "device-down",
    ]  # fmt: skip
    toll_faults.clear("hang")


@pytest.mark.parametrize("function", ["C_Initialize", "C_FindObjectsInit", "C_Sign"])
def test_a_module_that_crashes_is_an_error_with_its_signal_and_the_next_call_works(
    make: Callable[..., WorkerDevice], toll_faults: Faults, function: str
) -> None:
    device = make()
    toll_faults.set("crash", function=function)
    error = refused(device)
    assert (error.code, error.exit_code) == ("module-crashed", 30)
    assert "SIGABRT" in str(error)
    toll_faults.clear("crash")
    assert device.sign("RS256", DATA).value


def test_a_child_that_was_killed_is_replaced(
    make: Callable[..., WorkerDevice],
) -> None:
    device = make()
    first = device.sign("RS256", DATA).value
    (child,) = workers()
    os.kill(child, 9)
    assert refused(device).code == "module-crashed"
    assert device.sign("RS256", DATA).value == first
    assert workers() != [child]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        # Its own account may not read it: it is closed to debuggers, as its memory is.
        pytest.param("environ", b"SOFTHSM2_CONF=", marks=pytest.mark.needs_root),
        ("cmdline", b"hsmtoll.hsm.worker"),
    ],
)
def test_the_child_has_no_secret_in_its_environment_or_on_its_command_line(
    make: Callable[..., WorkerDevice],
    pin: Asked,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    there: bytes,
) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__PIN", pin.value)
    monkeypatch.setenv("hsmtoll_cache", "redis://:canary@localhost")
    make().sign("RS256", DATA)
    (child,) = workers()
    seen = _read(child, name)
    assert there in seen
    assert not [each for each in seen.upper().split(b"\0") if each.startswith(b"HSMTOLL_")]
    assert pin.value.encode() not in seen
    assert b"canary" not in seen


#: What makers' modules, and the loader, read from the environment (hsmtoll/docs/devices.md).
FOR_MODULES = (
    "SOFTHSM2_CONF", "YUBIHSM_PKCS11_CONF", "P11NETHSM_CONFIG_FILE", "TPM2_PKCS11_STORE",
    "TPM2_PKCS11_TCTI", "KMS_PKCS11_CONFIG", "ChrystokiConfigurationPath", "CS_PKCS11_R3_CFG",
    "CKNFAST_LOADSHARING", "NFAST_NFKM_TOKENSFILE", "VAULT_KMIP_CONFIG", "PKCS11_PROXY_SOCKET",
    "NSS_LIB_PARAMS", "OPENSC_CONF", "P11_KIT_SERVER_ADDRESS", "DBUS_SESSION_BUS_ADDRESS",
    "PKCS11SPY", "LD_LIBRARY_PATH", "HTTPS_PROXY", "HOME", "PATH", "LANG", "TZ",
    "A_MAKERS_OWN_NAME",
)  # fmt: skip
#: What a service manager gives to the service alone, and what is hsmtoll's own.
FOR_THE_SERVICE = (
    "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES", "MAINPID",
    "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "FDSTORE", "HSMTOLL_HSM__PIN",
    "HSMTOLL_HSM__PIN_FILE", "HSMTOLL_ANYTHING_ELSE", "hsmtoll_cache",
)  # fmt: skip


@pytest.mark.needs_root  # its own account may not read it
def test_the_worker_gets_what_modules_read_and_nothing_that_is_the_services_own(
    make: Callable[..., WorkerDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: os.environ.get(name) or f"/value/of/{name}" for name in FOR_MODULES}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    for name in FOR_THE_SERVICE:
        monkeypatch.setenv(name, "/secret/of/the/service")
    make().sign("RS256", DATA)
    (child,) = workers()
    seen = dict(
        each.split("=", 1) for each in _read(child, "environ").decode().split("\0") if "=" in each
    )
    assert {name: seen.get(name) for name in FOR_MODULES} == kept
    assert not seen.keys() & set(FOR_THE_SERVICE)
    assert "/secret/of/the/service" not in seen.values()
    # The control: another child of this program has them all.
    other = subprocess.run(["env", "-0"], capture_output=True, text=True, check=True).stdout
    names = {each.partition("=")[0] for each in other.split("\0")}
    assert names >= {*FOR_MODULES, *FOR_THE_SERVICE}


def test_a_wrong_pin_is_tried_once_whatever_the_number_of_children(
    make: Callable[..., WorkerDevice], toll_faults: Faults, pin: Asked
) -> None:
    pin.value = "00000000"
    device = make(workers=3)
    with ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(lambda _: refused(device), range(6)))
    assert sorted({type(each).__name__ for each in errors}) == [
        PinIncorrect.__name__,
        PinNotTried.__name__,
    ]
    assert toll_faults.count("C_Login") == 1


def test_children_sign_in_parallel_and_ask_for_the_pin_once(
    make: Callable[..., WorkerDevice], toll_faults: Faults, pin: Asked
) -> None:
    device = make(workers=3)
    together = threading.Barrier(3)

    def sign(_: int) -> bytes:
        together.wait(60)
        return device.sign("RS256", DATA).value

    # Each call holds its child long enough for the others to need one of their own.
    toll_faults.set("slow", ms=300)
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(sign, range(3)))) == 1
    assert len(workers()) == 3
    assert pin.asked == 1
    assert toll_faults.count("C_Login") == 3


def test_a_child_logs_in_once_and_its_successor_again(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make()
    assert not device.pin_accepted
    assert accepted(device)
    assert accepted(device)
    assert toll_faults.count("C_Login") == 1
    # The control: what it has is its own, and ends with it.
    os.kill(workers()[0], signal.SIGKILL)
    assert refused(device).code == "module-crashed"
    assert accepted(device)
    assert toll_faults.count("C_Login") == 2


def test_a_cold_assertion_asks_the_child_three_questions_and_a_warm_one_a_single_one(
    toll_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    del toll_settings
    asked: list[str] = []
    ask = WorkerProcess.ask

    def counted(child: WorkerProcess, question: dict[str, Any], *rest: Any, **more: Any) -> Any:
        asked.append(question["do"])
        return ask(child, question, *rest, **more)

    monkeypatch.setattr(WorkerProcess, "ask", counted)
    app = App(load(hsm__isolation="process"))
    request = TokenRequest("toll:eu/movement/road/v2")
    try:
        assert app.signer.sign(request, jti=new_jti()).assertion
        assert asked == ["certificates", "key", "sign"]
        del asked[:]
        assert app.signer.sign(request, jti=new_jti()).assertion
        assert asked == ["sign"]
    finally:
        app.close()


def test_what_a_child_signs_is_checked_on_this_side(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make()
    public = device.key().public
    assert public is not None
    stranger = RsaPublicKey(public.modulus + 2, public.exponent)
    made = device.sign("RS256", DATA, candidates=[public])
    assert made.by == public
    assert public.verify("RS256", DATA, made.value)
    # None of those offered: then it is whose the device says it is.
    assert device.sign("RS256", DATA, candidates=[stranger]).by == public
    toll_faults.set("wrong-signature")
    for candidates in ([public], [stranger], []):
        with pytest.raises(DeviceError) as caught:
            device.sign("RS256", DATA, candidates=candidates)
        assert caught.value.code == "signature-wrong"


def test_who_finds_no_child_free_in_time_is_told_so(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make(deadline=6.0)
    device.sign("RS256", DATA)
    toll_faults.set("hang")
    with ThreadPoolExecutor(2) as pool:
        codes = sorted(each.code or "" for each in pool.map(lambda _: refused(device), range(2)))
    assert codes[-1] == "device-hung"
    assert set(codes) <= {"device-busy", "device-hung"}


@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_process_starts_children_of_its_own(
    make: Callable[..., WorkerDevice], fork: Callable[[], int]
) -> None:
    device = make()
    first = device.sign("RS256", DATA).value
    assert in_a_fork(lambda: device.sign("RS256", DATA).value == first, fork)
    assert device.sign("RS256", DATA).value == first


@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_process_that_only_closes_leaves_the_parents_children_alone(
    make: Callable[..., WorkerDevice], fork: Callable[[], int]
) -> None:
    device = make()
    device.sign("RS256", DATA)
    (child,) = device._children
    process = child._process

    def closed() -> bool:
        device.close()
        return True

    assert in_a_fork(closed, fork)
    device.sign("RS256", DATA)
    assert child._process is process


def test_those_who_waited_at_the_fork_are_not_waited_for_in_the_forked_process(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make(deadline=20.0)
    expected = device.sign("RS256", DATA).value
    toll_faults.set("slow", ms=500, function="C_SignInit")

    def three_at_once() -> bool:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(signed, device) for _ in range(3)]
            return [each.result() for each in asked] == [expected] * 3

    with ThreadPoolExecutor(3) as pool:
        before = toll_faults.count("C_SignInit")
        asked = [pool.submit(signed, device) for _ in range(3)]
        while toll_faults.count("C_SignInit") == before or device.waiting < 2:
            time.sleep(0.01)
        assert in_a_fork(three_at_once)
        assert [each.result() for each in asked] == [expected] * 3


def test_a_fork_while_somebody_types_the_pin_leaves_the_child_free_to_ask_for_it(
    make: Callable[..., WorkerDevice], pin: Asked
) -> None:
    parent, typing, typed = os.getpid(), threading.Event(), threading.Event()

    def wait() -> None:
        if os.getpid() == parent:
            typing.set()
            typed.wait(30)

    pin.wait = wait
    device = make()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(signed, device)
        assert typing.wait(30)
        try:
            assert in_a_fork(lambda: bool(device.sign("RS256", DATA).value))
        finally:
            typed.set()
        assert asked.result()


def test_a_child_ends_with_those_who_started_it(make: Callable[..., WorkerDevice]) -> None:
    device = make()
    device.sign("RS256", DATA)
    (child,) = workers()
    device.close()
    assert not Path(f"/proc/{child}").exists()


def test_who_asks_while_the_device_is_closed_is_answered_and_leaves_no_child(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make(deadline=60.0)
    expected = device.sign("RS256", DATA).value
    toll_faults.set("slow", ms=500, function="C_SignInit")
    before = toll_faults.count("C_SignInit")
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(signed, device) for _ in range(3)]
        while toll_faults.count("C_SignInit") == before:
            time.sleep(0.01)
        # One is being signed, two wait for its child.
        device.close()
        made = [each.result() for each in asked]
    # Nobody waited in vain for a child that was ended meanwhile: that ends in an error.
    assert made == [expected] * 3
    assert workers() == []
    # And it opens again, as a device does.
    assert device.sign("RS256", DATA).value == expected


_LIAR = """#!{python}
import json, socket, struct, sys
there = socket.socket(fileno=int(sys.argv[-1]))
there.recv(65536)
body = json.dumps({reply}).encode()
there.sendall(struct.pack(">I", len(body)) + body)
while there.recv(65536):
    pass
"""
_REPLY: dict[str, Any] = {
    "generation": 0,
    "pin_state": None,
    "pin_accepted": True,
    "log": [],
    "error": None,
}
_SIGNATURE = {"value": "eight...", "by": None}


@pytest.mark.parametrize(
    "reply",
    [
        _REPLY,
        {"log": [], "answer": _SIGNATURE},
        _REPLY | {"answer": _SIGNATURE, "generation": "0x0g"},
        _REPLY | {"answer": _SIGNATURE, "pin_accepted": 1},
        _REPLY | {"answer": _SIGNATURE, "log": [1]},
        _REPLY | {"answer": _SIGNATURE, "log": [["hsmtoll", "loud", "x"]]},
        _REPLY | {"answer": _SIGNATURE, "log": 7},
        _REPLY | {"answer": _SIGNATURE, "another": 1},
        _REPLY | {"error": "words"},
        _REPLY | {"answer": "a signature is wanted"},
        _REPLY | {"answer": _SIGNATURE | {"value": "\u0100 is no byte"}},
        _REPLY | {"answer": _SIGNATURE | {"by": {"modulus": 1}}},
        _REPLY | {"answer": [*_SIGNATURE.values()]},
    ],
)
def test_a_process_that_says_what_is_no_answer_is_ended_and_called_dumb(
    make: Callable[..., WorkerDevice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reply: dict[str, object],
) -> None:
    liar = tmp_path / "python-liar"
    liar.write_text(_LIAR.format(python=sys.executable, reply=reply), encoding="utf-8")
    liar.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(liar))
    error = refused(make())
    assert (error.code, error.exit_code) == ("module-crashed", DeviceError.exit_code)
    assert "sent no valid answer" in str(error)


def test_what_the_child_would_log_is_logged_here(
    make: Callable[..., WorkerDevice], toll_faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    toll_faults.set("pin-count-low")
    make().sign("RS256", DATA)
    assert "pin-count-low" in caplog.text


def test_an_error_of_the_device_crosses_as_a_value(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    toll_faults.set("wrong-signature")
    error = refused(make())
    assert isinstance(error, DeviceError)
    assert error.code == "signature-wrong"
    assert error.hint


def test_a_hung_module_does_not_outlive_its_caller(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make(deadline=60.0)
    device.sign("RS256", DATA)
    (worker,) = workers()
    toll_faults.set("hang")
    before = toll_faults.count("C_Sign")
    child = os.fork()
    if child == 0:
        # Its own child hangs; it is killed without a word.
        threading.Thread(target=refused, args=(device,), daemon=True).start()
        time.sleep(600)
    eventually(lambda: toll_faults.count("C_Sign") > before)
    orphans = children(child)
    assert orphans
    os.kill(child, 9)
    os.waitpid(child, 0)
    eventually(lambda: all(ended(each) for each in orphans))
    assert not ended(worker)
    toll_faults.clear("hang")


def test_one_that_dies_of_each_signature_is_left_in_peace_though_its_successors_log_in(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make()
    assert device.sign("RS256", DATA).value
    toll_faults.set("crash", function="C_SignInit")
    codes = []
    for _ in range(10):
        with contextlib.suppress(HsmTollError):
            accepted(device)
        codes.append(refused(device).code)
    assert codes == ["module-crashed"] * 2 + ["device-down"] * 8
    # The control: one that signs again is not down any more.
    toll_faults.clear()

    def is_back() -> bool:
        with contextlib.suppress(DeviceError):
            return bool(accepted(device))
        return False

    eventually(is_back)
    assert device.sign("RS256", DATA).value == device.sign("RS256", DATA).value


def test_a_device_that_answers_what_it_failed_at_is_not_down(
    make: Callable[..., WorkerDevice], toll_faults: Faults
) -> None:
    device = make()
    for _ in range(3):
        toll_faults.set("crash", function="C_FindObjectsInit")
        with pytest.raises(HsmTollError):
            device.certificates()
        toll_faults.clear()
        assert device.certificates()
    assert device.sign("RS256", DATA).value
