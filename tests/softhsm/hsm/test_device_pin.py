"""
One try per PIN value, counted at the device.

The processes under test speak to SoftHSM through OpenSC's pkcs11-spy, whose log names every
call. It shows the PIN as well, so it lies in a directory of this user alone.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import DeviceError, PinIncorrect, PinNotTried
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import Pin, PinPad, PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from tests.kit.grants import DEFINED, a_grant
from tests.kit.own_device import accepted
from tests.softhsm.conftest import CROWD, SOFTHSM, SPY, DeviceSoftHsm, make_softhsm

if TYPE_CHECKING:
    from pathlib import Path

_PROVISION = """
import sys, pkcs11
from pkcs11 import Attribute as A, KeyType
with pkcs11.lib(sys.argv[1]).get_token(token_label="lab").open(rw=True, user_pin="1234") as session:
    for label, id, always in (("acme", b"1", False), ("always", b"2", True)):
        session.generate_keypair(
            KeyType.RSA, 2048, id=id, label=label, store=True,
            private_template={A.SENSITIVE: True, A.EXTRACTABLE: False,
                              A.ALWAYS_AUTHENTICATE: always},
        )
"""

_SIGN = (
    DEFINED
    + """
import os, sys
from pathlib import Path
from hsmtoll.errors import HsmTollError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinFile, PinValue
from hsmtoll.hsm.uri import KeyUri
module, state, key, pin, signing = sys.argv[1:]
source = PinFile(Path(pin)) if pin.startswith("/") else PinValue.of(pin)
device = InProcessDevice(
    DeviceSettings(Path(module), KeyUri.parse("pkcs11:token=lab;object=" + key)), pin=source,
    signing_pin=PinValue.of(signing, name="SIGNING") if signing else None,
    pin_log=PinLog(Path(state)),
)
try:
    print(len(device.sign("RS256", a_grant()).value))
except HsmTollError as error:
    print(error.exit_code, error.code)
"""
)


@dataclass(frozen=True)
class Bench:
    """One device of its own, with a log of the calls it gets."""

    softhsm: DeviceSoftHsm
    log: Path
    state: Path

    def start(self, pin: str, *, key: str = "acme", signing: str = "") -> subprocess.Popen[str]:
        """A process that signs once through the spy and says what came of it."""
        spied = {"PKCS11SPY": str(SOFTHSM), "PKCS11SPY_OUTPUT": str(self.log)}
        return subprocess.Popen(
            [sys.executable, "-c", _SIGN, str(SPY), str(self.state), key, pin, signing],
            env={**self.softhsm.environment, **spied},
            stdout=subprocess.PIPE,
            text=True,
        )

    def sign(self, pin: str, *, key: str = "acme", signing: str = "") -> str:
        """What such a process said."""
        return self.start(pin, key=key, signing=signing).communicate(timeout=60)[0].strip()

    def logins(self) -> int:
        """How many C_Login the device has got since the last question."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.count(": C_Login\n")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> DeviceSoftHsm:
    """What the device of each test is a copy of."""
    made = make_softhsm(tmp_path_factory.mktemp("provisioned") / "device")
    made.python(_PROVISION)
    return made


@pytest.fixture
def bench(provisioned: DeviceSoftHsm, tmp_path: Path) -> Bench:
    """A fresh device: SoftHSM never locks, so a right PIN always works there."""
    tmp_path.chmod(0o700)
    softhsm = provisioned.copy(tmp_path / "device")
    return Bench(softhsm, tmp_path / "spy.log", tmp_path / "state")


def test_a_right_pin_is_one_login_and_a_signature(bench: Bench) -> None:
    assert bench.sign("1234") == "256"
    assert bench.logins() == 1


def test_a_wrong_pin_in_run_after_run_is_one_login_and_a_corrected_one_works_at_once(
    bench: Bench,
) -> None:
    outputs = [bench.sign("9999") for _ in range(CROWD)]
    assert outputs == ["20 pin-incorrect"] + ["21 pin-refused"] * (CROWD - 1)
    assert bench.logins() == 1
    assert bench.sign("1234") == "256"
    assert bench.logins() == 1


def test_a_wrong_pin_in_a_crowd_of_processes_is_one_login(bench: Bench) -> None:
    running = [bench.start("9999") for _ in range(CROWD)]
    outputs = sorted(process.communicate(timeout=100)[0].strip() for process in running)
    assert outputs.count("20 pin-incorrect") == 1
    # SoftHSM rewrites its files at a login, and who starts then may not see the device (30).
    others = [each for each in outputs if not each.startswith("30 ")]
    assert set(others) == {"20 pin-incorrect", "21 pin-refused"}
    assert bench.logins() == 1
    assert bench.sign("9999") == "21 pin-refused"
    assert bench.logins() == 0


def test_without_a_ledger_five_starts_with_a_wrong_pin_are_no_login_at_all(bench: Bench) -> None:
    bench.state.write_text("a file stands where the directory should be")
    assert {bench.sign("9999") for _ in range(5)} == {"21 ledger"}
    assert bench.logins() == 0
    bench.state.unlink()
    assert bench.sign("1234") == "256"


def test_a_process_killed_before_the_answer_does_not_cost_the_right_pin(bench: Bench) -> None:
    dying = """
from contextlib import contextmanager
class Dying(PinLog):
    @contextmanager
    def held(self, owner):
        with super().held(owner) as page:
            class Record(type(page)):
                def intend(self, pin, **flags):
                    super().intend(pin, **flags)
                    os.kill(os.getpid(), 9)
            yield Record(page.owner, page.path, page.record)
"""
    program = _SIGN.replace("module, state", dying + "module, state", 1)
    argv = [str(SOFTHSM), str(bench.state), "acme", "1234", ""]
    killed = subprocess.run(
        [sys.executable, "-c", program.replace("pin_log=PinLog(", "pin_log=Dying("), *argv],
        env=bench.softhsm.environment,
        check=False,
    )
    assert killed.returncode == -9
    (record,) = [p for p in (bench.state / "pin").iterdir() if p.suffix != ".lock"]
    assert "1234" not in record.read_text()
    assert bench.sign("1234") == "256"
    assert bench.logins() == 1
    assert "intents" not in record.read_text()


def test_an_always_authenticate_key_gets_its_pin_between_init_and_sign(bench: Bench) -> None:
    assert bench.sign("1234", key="always") == "256"
    calls = [
        line.partition(": ")[2]
        for line in bench.log.read_text().splitlines()
        if ": C_" in line and line[:1].isdigit()
    ]
    at = calls.index("C_SignInit")
    assert calls[at : at + 3] == ["C_SignInit", "C_Login", "C_Sign"]
    assert bench.logins() == 2


def test_a_wrong_signing_pin_is_tried_once_and_does_not_touch_the_other(bench: Bench) -> None:
    assert bench.sign("1234", key="always", signing="9999") == "20 pin-incorrect"
    assert bench.logins() == 2
    assert bench.sign("1234", key="always", signing="9999") == "21 pin-refused"
    assert bench.logins() == 1
    assert bench.sign("1234", key="always", signing="1234") == "256"
    assert bench.sign("1234", key="acme", signing="9999") == "256"


def test_a_pin_file_that_is_corrected_works_at_once(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.write_text("9999\n")
    file.chmod(0o600)
    assert bench.sign(str(file)) == "20 pin-incorrect"
    file.write_text("1234\n")
    assert bench.sign(str(file)) == "256"


def test_another_device_of_the_process_does_not_log_in_again(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    one = device_softhsm.device("object=acme", tmp_path)
    two = device_softhsm.device("object=nopublic", tmp_path, pin="never read")
    assert accepted(one)
    assert two.key().label == "nopublic"
    one.close()
    assert two.sign("RS256", a_grant()).value
    two.close()
    # the last one logged out: the next login asks the device again
    with pytest.raises(PinIncorrect), device_softhsm.device("", tmp_path, pin="9999") as three:
        accepted(three)
    with device_softhsm.device("", tmp_path) as four:
        assert accepted(four)


def test_a_login_by_other_code_of_the_process_proves_nothing_about_the_pin(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import pkcs11

    lib = pkcs11.lib(str(device_softhsm.module))
    with (
        lib.get_token(token_label="lab").open(user_pin="1234"),
        device_softhsm.device("object=acme", tmp_path, pin="9999") as device,
    ):
        assert accepted(device) is False
        assert device.key().label == "acme"
        user, _ = device.token_users()
    assert "the PIN was not verified" in caplog.text
    assert PinLog(tmp_path).refusals(user) == (0, 0)


def test_no_pin_and_a_device_that_wants_one_is_not_a_crash(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("object=acme", tmp_path, pin=None) as device:
        assert accepted(device) is False
        with pytest.raises(DeviceError):
            device.key()


def test_no_pin_shows_itself_when_it_is_refused(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import traceback

    caplog.set_level(0)
    texts = []
    for _ in range(2):
        device = InProcessDevice(
            DeviceSettings(device_softhsm.module, KeyUri.parse("pkcs11:token=lab;object=acme")),
            pin=PinValue.of("4711-canary"),
            pin_log=PinLog(tmp_path),
        )
        with pytest.raises((PinIncorrect, PinNotTried)) as caught:
            accepted(device)
        texts += traceback.format_exception(caught.value)
        texts.append(f"{device!r} {caught.value.hint}")
    assert "4711-canary" not in "".join(texts) + caplog.text
    with device_softhsm.device("", tmp_path) as device:
        assert accepted(device)


def test_a_pinpad_that_is_not_there_is_said_and_nothing_is_tried(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("object=acme", tmp_path, pin=PinPad()) as device:
        with pytest.raises(DeviceError) as caught:
            accepted(device)
        assert caught.value.code == "no-pinpad"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_wrong_pin_that_somebody_else_gave_is_for_a_person_to_judge(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with device_softhsm.device("", tmp_path, pin="9999") as device, pytest.raises(PinIncorrect):
        accepted(device)
    assert "pin-count-low" not in caplog.text
    # Another state directory: nothing is known there of the try above.
    given = PinValue.of("1234")
    with device_softhsm.device("", tmp_path / "other", pin=given) as device:
        with pytest.raises(PinNotTried) as caught:
            accepted(device)
        assert caught.value.code == "pin-count-low"
    assert not (tmp_path / "other" / "pin").is_dir() or "1234" not in "".join(
        each.read_text() for each in (tmp_path / "other" / "pin").iterdir()
    )
    typed = PinValue(Pin("1234", source="PROMPT", typed=True))
    with device_softhsm.device("", tmp_path / "other", pin=typed) as device:
        assert accepted(device)
    assert "pin-count-low: a wrong PIN was given" in caplog.text
    caplog.clear()
    with device_softhsm.device("", tmp_path, pin=given) as device:
        assert accepted(device)
    assert "pin-count-low" not in caplog.text
