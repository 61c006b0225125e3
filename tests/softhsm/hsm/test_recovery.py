"""A device that fails in every way it can, and what it takes to have it back."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll import DeviceError, HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.module import PKCS11_LOCK, restart
from hsmtoll.hsm.pin import Pin, PinFile, PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey
from hsmtoll.testing.clock import SettableClock
from hsmtoll.testing.softhsm import SoftHsm
from tests.kit.grants import DEFINED, a_grant
from tests.kit.own_device import copied, listens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.testing.faults import Faults

DATA = a_grant()
CLIENT = Path("/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so")
BOOTS = itertools.count(1_000.0, 10_000.0)
#: CKR_GENERAL_ERROR, which a module answers when it does not know what to say.
GENERAL = 0x5


class Counted:
    """A PIN source that counts how often it was asked."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.asked = 0

    def read(self, *, device: str) -> Pin:
        del device
        self.asked += 1
        # As typed: a test before may have left a low count behind.
        return Pin(self.value, source="a test", typed=True)


@pytest.fixture
def clock() -> SettableClock:
    # Modules are started again every 30 s at most, and one process runs all these tests.
    return SettableClock(time.time(), boot=next(BOOTS))


@pytest.fixture(scope="module")
def key(toll_softhsm: SoftHsm) -> RsaPublicKey:
    return public(toll_softhsm.generate_key("mended", b"\x71"))


@pytest.fixture
def pin(toll_softhsm: SoftHsm) -> Counted:
    return Counted(toll_softhsm.pin)


@pytest.fixture
def make(
    toll_softhsm: SoftHsm,
    toll_faults: Faults,
    key: RsaPublicKey,
    pin: Counted,
    clock: SettableClock,
    tmp_path: Path,
) -> Iterator[Callable[..., InProcessDevice]]:
    del key
    made: list[InProcessDevice] = []

    def device(label: str = "mended", source: PinSource = pin, uri: str = "") -> InProcessDevice:
        one = InProcessDevice(
            DeviceSettings(toll_faults.module, KeyUri.parse(uri or toll_softhsm.uri(label))),
            pin=source,
            pin_log=PinLog(tmp_path / "state"),
            boot=lambda: clock.now().boot,
        )
        made.append(one)
        return one

    yield device
    for each in made:
        each.close()


@pytest.fixture
def device(make: Callable[..., InProcessDevice], toll_faults: Faults) -> InProcessDevice:
    made = make()
    made.sign("RS256", DATA)
    toll_faults.reset_counts()
    return made


def public(spki: bytes) -> RsaPublicKey:
    body = base64.encodebytes(spki).decode()
    return RsaPublicKey.from_pem(f"-----BEGIN PUBLIC KEY-----\n{body}-----END PUBLIC KEY-----\n")


def refused(device: InProcessDevice) -> HsmTollError:
    with pytest.raises(HsmTollError) as caught:
        device.sign("RS256", DATA)
    return caught.value


# ---------------------------------------------------------------------- what each step costs


def test_a_session_that_broke_costs_a_new_session_and_no_login(
    device: InProcessDevice, toll_faults: Faults, key: RsaPublicKey
) -> None:
    # After CKR_SESSION_HANDLE_INVALID no other mechanism is tried in the same session.
    toll_faults.set("nth-call-fails", function="C_SignInit", rv=0xB3)
    assert key.verify("RS256", DATA, device.sign("RS256", DATA).value)
    assert toll_faults.count("C_OpenSession") == 1
    assert toll_faults.count("C_Login") == 0
    assert toll_faults.count("C_Initialize") == 0


def test_a_login_that_was_lost_costs_one_login_with_the_pin_that_was_accepted(
    device: InProcessDevice, toll_faults: Faults, key: RsaPublicKey, pin: Counted
) -> None:
    toll_faults.set("session-lost")
    assert key.verify("RS256", DATA, device.sign("RS256", DATA).value)
    assert toll_faults.count("C_Login") == 1
    assert toll_faults.count("C_Initialize") == 0
    assert pin.asked == 1


def test_a_module_that_says_nothing_else_is_started_again_and_the_pin_is_remembered(
    device: InProcessDevice, toll_faults: Faults, key: RsaPublicKey, pin: Counted
) -> None:
    toll_faults.set("device-error")
    assert key.verify("RS256", DATA, device.sign("RS256", DATA).value)
    assert toll_faults.count("C_Initialize") == 1
    assert toll_faults.count("C_Login") == 1
    assert pin.asked == 1


def test_a_module_is_not_started_again_before_thirty_seconds_have_passed(
    device: InProcessDevice, toll_faults: Faults, clock: SettableClock
) -> None:
    toll_faults.set("device-error")
    device.sign("RS256", DATA)
    toll_faults.set("device-error")
    for _ in range(29):
        assert isinstance(refused(device), DeviceError)
        clock.advance(1)
    assert toll_faults.count("C_Initialize") == 1
    clock.advance(10)
    assert device.sign("RS256", DATA).value
    assert toll_faults.count("C_Initialize") == 2


def test_a_device_that_stays_away_is_asked_rarely_and_comes_back_by_itself(
    device: InProcessDevice, toll_faults: Faults, clock: SettableClock
) -> None:
    toll_faults.set("token-removed")
    assert refused(device).code == "device-missing"
    toll_faults.reset_counts()
    for _ in range(100):
        assert refused(device).code == "device-down"
    assert toll_faults.calls() == {}
    toll_faults.clear("token-removed")
    clock.advance(1)
    assert device.sign("RS256", DATA).value


_UNENDED = (
    DEFINED
    + """
import sys
from pathlib import Path
import pkcs11
from hsmtoll import HsmTollError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.testing.faults import Faults
real, folder, uri, pin, fails = sys.argv[1:]
boot = [1000.0]
with Faults(Path(real), Path(folder) / "faults") as faults:
    device = InProcessDevice(DeviceSettings(faults.module, KeyUri.parse(uri)),
                    pin=PinValue.of(pin), pin_log=PinLog(Path(folder) / "state"),
                    boot=lambda: boot[0])
    device.sign("RS256", a_grant())
    faults.set("token-removed")
    if fails == "fails":
        faults.set("nth-call-fails", function="C_Finalize", rv=5)
    try:
        device.sign("RS256", a_grant())
    except HsmTollError as error:
        print(error.code)
    faults.clear()
    boot[0] += 60
    print(len(device.sign("RS256", a_grant()).value), faults.count("C_Finalize"))
    device.close()
    try:
        # What stands between us and the module takes one that would not end for ended.
        pkcs11.lib(str(faults.module))
        print("initialised")
    except pkcs11.PKCS11Error as error:
        print(error)
"""
)


@pytest.mark.parametrize(
    ("fails", "left"), [("fails", "already initialized"), ("works", "initialised")]
)
def test_a_module_that_would_not_end_is_gone_on_with(
    toll_softhsm: SoftHsm, key: RsaPublicKey, tmp_path: Path, fails: str, left: str
) -> None:
    del key
    # In a process of its own, whose module nobody can end any more.
    made = (toll_softhsm.module, tmp_path, toll_softhsm.uri("mended"), toll_softhsm.pin, fails)
    argv = [sys.executable, "-c", _UNENDED, *map(str, made)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["device-missing", "256 1"]
    assert left in lines[2]


def test_a_device_that_serves_another_is_not_started_again(
    device: InProcessDevice, make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    other = make()
    other.sign("RS256", DATA)
    missing = make(uri="pkcs11:token=elsewhere")
    toll_faults.reset_counts()
    assert refused(missing).code == "device-missing"
    assert toll_faults.count("C_Finalize") == 0
    assert device.sign("RS256", DATA).value == other.sign("RS256", DATA).value
    assert toll_faults.count("C_Login") == 0


# ---------------------------------------------------------------------- never after a PIN error


def test_a_wrong_pin_is_tried_once_and_nothing_is_mended(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    device = make(source=Counted("00000000"))
    toll_faults.reset_counts()
    assert isinstance(refused(device), PinIncorrect)
    assert isinstance(refused(device), PinNotTried)
    assert toll_faults.count("C_Login") == 1
    assert toll_faults.count("C_Finalize") == 0


def test_a_pin_that_is_refused_while_mending_ends_it(
    device: InProcessDevice, toll_faults: Faults, pin: Counted
) -> None:
    toll_faults.set("session-lost")
    toll_faults.set("pin-wrong")
    assert isinstance(refused(device), PinIncorrect)
    assert toll_faults.count("C_Login") == 1
    assert toll_faults.count("C_Finalize") == 0
    toll_faults.clear("pin-wrong")
    assert isinstance(refused(device), PinNotTried)
    assert pin.asked == 2
    assert toll_faults.count("C_Login") == 1


def test_a_login_whose_fate_is_unknown_is_not_repeated_for_the_same_call(
    device: InProcessDevice, toll_faults: Faults
) -> None:
    toll_faults.set("session-lost")
    toll_faults.set("nth-call-fails", function="C_Login", rv=GENERAL)
    assert isinstance(refused(device), DeviceError)
    assert toll_faults.count("C_Login") == 1


# ---------------------------------------------------------------------- changed by others


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    """What those are copies of that tests may ruin."""
    made = SoftHsm.create(tmp_path_factory.mktemp("whole") / "own")
    made.generate_key("k", b"\x01")
    return made


@pytest.fixture
def own(
    whole: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toll_faults: Faults
) -> Iterator[SoftHsm]:
    """A SoftHSM that a test may ruin."""
    del toll_faults
    made = copied(whole, tmp_path / "own")
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    _restart_module(made.module)
    yield made
    _restart_module(made.module)


def _restart_module(module: Path) -> None:
    with PKCS11_LOCK.held(60):
        restart(module)


def plain(
    own: SoftHsm, state: Path, clock: SettableClock, pin: PinSource | None = None
) -> InProcessDevice:
    return InProcessDevice(
        DeviceSettings(own.module, KeyUri.parse(own.uri("k"))),
        pin=pin or PinValue.of(own.pin),
        pin_log=PinLog(state),
        boot=lambda: clock.now().boot,
    )


def _util(*arguments: str) -> None:
    subprocess.run(["softhsm2-util", *arguments], check=True, capture_output=True)


def test_a_key_that_was_deleted_is_missed_by_name_and_found_when_it_is_back(
    own: SoftHsm, tmp_path: Path, clock: SettableClock
) -> None:
    device = plain(own, tmp_path, clock)
    device.sign("RS256", DATA)
    own.delete("k")
    assert refused(device).code == "key-missing"
    assert refused(device).code == "key-missing"
    fresh = public(own.generate_key("k", b"\x02"))
    assert fresh.verify("RS256", DATA, device.sign("RS256", DATA, candidates=[fresh]).value)
    device.close()


def test_a_device_that_was_initialised_anew_is_refused_and_not_silently_used(
    own: SoftHsm, tmp_path: Path, clock: SettableClock
) -> None:
    device = plain(own, tmp_path, clock)
    device.sign("RS256", DATA)
    _util("--delete-token", "--token", own.label)
    _util("--init-token", "--free", "--label", own.label, "--pin", own.pin, "--so-pin", "5678")
    made_anew = SoftHsm(own.directory, own.module, own.label, own.pin)
    made_anew.generate_key("k", b"\x01")
    codes = []
    for _ in range(4):
        codes.append(refused(device).code)
        clock.advance(31)
    assert codes[-1] == "device-changed"
    assert "initialised anew" in str(refused(device).hint)
    device.close()
    # Who starts again takes it as it is.
    assert plain(own, tmp_path, clock).sign("RS256", DATA).value


def test_a_pin_that_another_process_changed_costs_one_try_and_the_new_one_works(
    own: SoftHsm, tmp_path: Path, clock: SettableClock
) -> None:
    device = plain(own, tmp_path, clock, PinFile(own.pin_file))
    device.sign("RS256", DATA)
    own._do([{"what": "pin", "old": own.pin, "new": "87651234"}])
    _restart_module(own.module)
    assert isinstance(refused(device), PinIncorrect)
    assert isinstance(refused(device), PinNotTried)
    own.pin_file.write_text("87651234\n")
    assert device.sign("RS256", DATA).value
    device.close()


# ---------------------------------------------------------------------- over a socket


@contextlib.contextmanager
def served(own: SoftHsm, socket: Path) -> Iterator[None]:
    """A `p11-kit server` for the device; killed with all it started at the end."""
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            *("p11-kit", "server", "--foreground", "--name", str(socket)),
            *("--provider", str(own.module), f"pkcs11:token={own.label}"),
        ],
        env={**os.environ, "SOFTHSM2_CONF": str(own.conf)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 30
        while not listens(socket):
            assert time.monotonic() < end
            time.sleep(0.01)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_was_killed_and_started_again_is_used_again(
    own: SoftHsm, tmp_path: Path, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "p11.sock"
    monkeypatch.setenv("P11_KIT_SERVER_ADDRESS", f"unix:path={socket}")
    asked = Counted(own.pin)
    device = InProcessDevice(
        DeviceSettings(CLIENT, KeyUri.parse(own.uri("k"))),
        pin=asked,
        pin_log=PinLog(tmp_path),
        boot=lambda: clock.now().boot,
    )
    with served(own, socket):
        first = device.sign("RS256", DATA).value
    assert refused(device).exit_code == 30
    assert refused(device).code == "device-down"
    with served(own, socket):
        clock.advance(31)
        assert device.sign("RS256", DATA).value == first
    # Back before anybody noticed: nobody sees an error at all.
    clock.advance(31)
    with served(own, socket):
        assert device.sign("RS256", DATA).value == first
        assert asked.asked == 1
        device.close()
    _restart_module(CLIENT)
