"""A device that is not there when its module starts, and how often it is looked for again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hsmtoll import DeviceError, HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import PinSource, PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey
from tests.kit.grants import DEFINED, a_grant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.softhsm import SoftHsm

DATA = a_grant()
#: CKR_GENERAL_ERROR: SoftHSM's word for a file that another process is writing.
DEVICE_MEMORY = 0x31
GENERAL = 0x5
#: CKR_USER_PIN_NOT_INITIALIZED: what it says of a PIN that it read at such a moment.
NO_PIN = 0x102


@pytest.fixture(scope="module")
def key(toll_softhsm: SoftHsm) -> str:
    toll_softhsm.generate_key("started", b"\x73")
    return "started"


@pytest.fixture
def make(
    toll_softhsm: SoftHsm, toll_faults: Faults, key: str, tmp_path: Path
) -> Iterator[Callable[..., InProcessDevice]]:
    """A device whose module no process of ours has loaded yet; *sleep* is all its waiting."""
    made: list[InProcessDevice] = []

    def device(sleep: Callable[[float], None], pin: PinSource | None = None) -> InProcessDevice:
        one = InProcessDevice(
            DeviceSettings(toll_faults.module, KeyUri.parse(toll_softhsm.uri(key))),
            pin=pin or PinValue.of(toll_softhsm.pin),
            pin_log=PinLog(tmp_path / "state"),
            sleep=sleep,
        )
        made.append(one)
        return one

    yield device
    for each in made:
        each.close()


def error(device: InProcessDevice) -> HsmTollError:
    with pytest.raises(HsmTollError) as caught:
        device.sign("RS256", DATA)
    return caught.value


def test_a_device_that_comes_a_moment_after_its_module_is_found_by_the_same_call(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []

    def come(seconds: float) -> None:
        slept.append(seconds)
        toll_faults.clear("token-removed")

    toll_faults.set("token-removed")
    device = make(come)
    public = device.key().public
    assert isinstance(public, RsaPublicKey)
    assert public.verify("RS256", DATA, device.sign("RS256", DATA).value)
    assert len(slept) == 1
    assert slept[0] < 1
    assert toll_faults.count("C_Initialize") == 2
    assert toll_faults.count("C_Login") == 1


def test_one_that_does_not_come_is_looked_for_three_times_more_and_then_missed(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    toll_faults.set("token-removed")
    device = make(slept.append)
    assert error(device).code == "device-missing"
    assert error(device).code == "device-down"
    # Each time later than the time before, and with some chance in it: workers of one server that
    # met once do not meet again.
    assert len(slept) == 3
    for seconds, (least, most) in zip(slept, ((0.1, 0.5), (0.2, 1.0), (0.4, 2.0)), strict=True):
        assert least <= seconds <= most
    assert toll_faults.count("C_Initialize") == 4
    assert toll_faults.count("C_Login") == 0


def test_one_that_comes_late_is_found_at_the_third_look(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []

    def come(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            toll_faults.clear("token-removed")

    toll_faults.set("token-removed")
    assert make(come).sign("RS256", DATA).value
    assert len(slept) == 2
    assert toll_faults.count("C_Initialize") == 3
    assert toll_faults.count("C_Login") == 1


def stumbling(
    faults: Faults, function: str, rv: int, slept: list[float]
) -> Callable[[float], None]:
    """
    Have *function* fail at the first look; what to call in the pause after it.

    Each slot is asked with C_GetTokenInfo, in any order, and one that answers with an error hides
    no other: all of them fail until the pause.
    """
    if function != "C_GetTokenInfo":
        faults.set("nth-call-fails", function=function, rv=rv)
        return slept.append
    faults.set("call-fails", function=function, rv=rv)

    def pause(seconds: float) -> None:
        slept.append(seconds)
        faults.clear("call-fails")

    return pause


@pytest.mark.parametrize("function", ["C_GetSlotList", "C_GetTokenInfo", "C_OpenSession"])
@pytest.mark.parametrize("first", ["certificates", "sign"])
def test_a_module_that_stumbles_over_half_a_file_is_started_once_more(
    make: Callable[..., InProcessDevice], toll_faults: Faults, function: str, first: str
) -> None:
    slept: list[float] = []
    device = make(stumbling(toll_faults, function, GENERAL, slept))
    if first == "certificates":
        device.certificates()
    assert device.sign("RS256", DATA).value
    assert toll_faults.count("C_Login") == 1
    assert len(slept) == 1


def test_a_login_whose_fate_is_unknown_is_not_made_again(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    device = make(slept.append)
    toll_faults.set("nth-call-fails", function="C_Login", rv=GENERAL)
    assert isinstance(error(device), DeviceError)
    assert toll_faults.count("C_Login") == 1
    assert slept == []


def test_a_device_that_denies_the_pin_it_says_it_has_is_read_again(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    device = make(slept.append)
    toll_faults.set("nth-call-fails", function="C_Login", rv=NO_PIN)
    assert device.sign("RS256", DATA).value
    assert toll_faults.count("C_Initialize") == toll_faults.count("C_Login") == 2
    assert len(slept) == 1


def test_so_is_one_that_worked_before(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    device = make(slept.append)
    device.sign("RS256", DATA)
    toll_faults.reset_counts()
    toll_faults.set("session-lost")
    toll_faults.set("nth-call-fails", function="C_Login", rv=NO_PIN)
    assert device.sign("RS256", DATA).value
    assert toll_faults.count("C_Initialize") == 1
    assert toll_faults.count("C_Login") == 2
    assert slept == []


@pytest.mark.parametrize(
    ("function", "rv"),
    [("C_GetTokenInfo", GENERAL), ("C_OpenSession", GENERAL), ("C_Login", NO_PIN)],
)
def test_a_command_that_writes_starts_its_module_once_more_before_it_does(
    make: Callable[..., InProcessDevice], toll_faults: Faults, key: str, function: str, rv: int
) -> None:
    slept: list[float] = []
    device = make(stumbling(toll_faults, function, rv, slept))
    assert key in {each.label for each in device.private_keys()}
    assert toll_faults.count("C_Initialize") == 2
    assert len(slept) == 1


def test_a_write_that_fails_is_not_made_again(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    # Most other answers may be about the template, of which there are plainer ones.
    toll_faults.set("nth-call-fails", function="C_GenerateKeyPair", rv=DEVICE_MEMORY)
    with pytest.raises(DeviceError):
        make(slept.append).generate(
            bits=2048, label="twice", key_id=None, always_authenticate=False
        )
    assert toll_faults.count("C_GenerateKeyPair") == 1
    assert slept == []


def test_one_that_goes_on_denying_it_is_believed_and_its_pin_counts_as_never_tried(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []

    def deny(seconds: float = 0) -> None:
        slept.append(seconds)
        toll_faults.set("nth-call-fails", function="C_Login", rv=NO_PIN)

    deny()
    device = make(deny)
    exc = error(device)
    assert isinstance(exc, PinNotTried)
    assert exc.code == "pin-state"
    assert toll_faults.count("C_Login") == len(slept) == 2
    assert device.sign("RS256", DATA).value


def test_an_inspection_that_began_at_such_a_moment_shows_the_keys(
    toll_softhsm: SoftHsm, toll_faults: Faults, key: str, tmp_path: Path
) -> None:
    uri = KeyUri.parse(toll_softhsm.uri(key)).device_only()
    toll_faults.set("nth-call-fails", function="C_Login", rv=NO_PIN)
    with InProcessDevice(
        DeviceSettings(toll_faults.module, uri),
        pin=PinValue.of(toll_softhsm.pin),
        pin_log=PinLog(tmp_path),
    ) as device:
        seen = device.inspect()
    assert toll_faults.count("C_Initialize") == toll_faults.count("C_Login") == 2
    (token,) = [each for each in seen.tokens if each.uri.token == uri.token]
    assert token.problem is None
    assert token.logged_in
    assert key in {each.label for each in token.keys}


@pytest.fixture
def pinless(toll_softhsm: SoftHsm) -> Iterator[str]:
    """The URI of a key on a device whose administrator has set no user PIN yet."""
    there = {**os.environ, **toll_softhsm.environ()}
    tool = ["pkcs11-tool", "--module", str(toll_softhsm.module)]
    listed = subprocess.run([*tool, "-L"], env=there, capture_output=True, text=True, check=True)
    free = str(listed.stdout.count("\nSlot ") - 1)
    order = ["--init-token", "--slot-index", free, "--label", "pinless", "--so-pin", "12345678"]
    subprocess.run([*tool, *order], env=there, capture_output=True, check=True)
    yield "pkcs11:token=pinless;object=acme"
    gone = ["softhsm2-util", "--delete-token", "--token", "pinless"]
    subprocess.run(gone, env=there, capture_output=True, check=True)


def test_a_device_that_has_no_pin_yet_is_asked_once(
    pinless: str, toll_faults: Faults, tmp_path: Path
) -> None:
    slept: list[float] = []
    pin_log = PinLog(tmp_path / "state")
    device = InProcessDevice(
        DeviceSettings(toll_faults.module, KeyUri.parse(pinless)),
        pin=PinValue.of("1234"),
        pin_log=pin_log,
        sleep=slept.append,
    )
    assert error(device).code == "pin-state"
    device.close()
    assert toll_faults.count("C_Initialize") == toll_faults.count("C_Login") == 1
    assert slept == []


def test_a_pin_that_is_wrong_starts_nothing_again(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    assert isinstance(error(make(slept.append, PinValue.of("00000000"))), PinIncorrect)
    assert toll_faults.count("C_Login") == toll_faults.count("C_Initialize") == 1
    assert slept == []


def test_a_module_that_worked_before_waits_for_nothing(
    make: Callable[..., InProcessDevice], toll_faults: Faults
) -> None:
    slept: list[float] = []
    device = make(slept.append)
    device.sign("RS256", DATA)
    toll_faults.set("token-removed")
    assert error(device).code == "device-missing"
    assert slept == []


_CHILD = (
    DEFINED
    + """
import json, sys
from pathlib import Path
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinFile
from hsmtoll.hsm.uri import KeyUri

settings = json.loads(sys.stdin.readline())
device = InProcessDevice(
    DeviceSettings(Path(settings["module"]), KeyUri.parse(settings["uri"])),
    pin=PinFile(Path(settings["pin_file"]), name="PIN"), pin_log=PinLog(Path(settings["state"])),
)
print("here", flush=True)
sys.stdin.readline()
print(device.sign("RS256", a_grant()).value.hex())
device.close()
"""
)


def test_four_processes_that_start_at_once_on_bare_softhsm_all_sign(
    toll_softhsm: SoftHsm, key: str, tmp_path: Path
) -> None:
    settings = {
        "module": str(toll_softhsm.module),
        "uri": toll_softhsm.uri(key),
        "pin_file": str(toll_softhsm.pin_file),
        "state": str(tmp_path / "state"),
    }
    signatures = set()
    for _ in range(4):
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                env={**os.environ, "SOFTHSM2_CONF": str(toll_softhsm.conf)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        try:
            for child in children:
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write(f"{json.dumps(settings)}\n")
                child.stdin.flush()
                assert child.stdout.readline() == "here\n"
            for child in children:
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
            for child in children:
                out, err = child.communicate(timeout=120)
                assert child.returncode == 0, err
                signatures.add(out)
        finally:
            for child in children:
                child.kill()
                child.wait()
    # RSASSA-PKCS1-v1_5 has one signature for one text.
    assert len(signatures) == 1
