"""What `status().pin` says, with the module in this process and in one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hsmtoll import HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.app import App
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pool import WorkerDevice
from hsmtoll.hsm.uri import KeyUri
from tests.kit.grants import a_grant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.hsm.device import Device
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.softhsm import SoftHsm


@pytest.fixture(scope="module")
def key(toll_softhsm: SoftHsm) -> str:
    toll_softhsm.generate_key("status", b"\x5d")
    return "status"


@pytest.fixture(params=[InProcessDevice, WorkerDevice])
def make(
    request: pytest.FixtureRequest, toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def device(
        pin: str = toll_softhsm.pin, state: Path | None = tmp_path / "state", key: str = ""
    ) -> Device:
        uri = KeyUri.parse(toll_softhsm.uri(key))
        settings = DeviceSettings(toll_faults.module, uri)
        one: Device = request.param(settings, pin=PinValue.of(pin), pin_log=PinLog(state))
        made.append(one)
        return one

    yield device
    toll_faults.clear()
    for each in made:
        each.close()


def test_a_pin_that_was_accepted_is_ok_and_before_that_nothing_is_said(
    make: Callable[..., Device],
) -> None:
    device = make()
    assert (device.pin_state, device.pin_accepted) == (None, False)
    device.certificates()
    assert (device.pin_state, device.pin_accepted) == ("ok", True)


def test_one_that_was_refused_is_refused_although_the_flags_said_ok(
    make: Callable[..., Device], toll_faults: Faults
) -> None:
    toll_faults.set("pin-wrong")
    device = make("9999")
    with pytest.raises(PinIncorrect):
        device.certificates()
    assert (device.pin_state, device.pin_accepted) == ("refused", False)
    # As it is where it was refused before, and so not tried.
    again = make("9999")
    with pytest.raises(PinNotTried):
        again.certificates()
    assert (again.pin_state, again.pin_accepted) == ("refused", False)
    assert toll_faults.count("C_Login") == 1


@pytest.mark.parametrize(
    ("fault", "state"),
    [("pin-locked", "locked"), ("pin-final-try", "final-try"), ("pin-count-low", "count-low")],
)
def test_one_that_is_not_tried_because_of_its_flags_is_what_they_say(
    make: Callable[..., Device], toll_faults: Faults, fault: str, state: str
) -> None:
    toll_faults.set(fault)
    device = make()
    with pytest.raises(PinNotTried):
        device.certificates()
    assert (device.pin_state, device.pin_accepted) == (state, False)
    assert toll_faults.count("C_Login") == 0
    # The control: the same device, without them.
    toll_faults.clear()
    device.certificates()
    assert (device.pin_state, device.pin_accepted) == ("ok", True)


def test_one_that_nothing_can_be_written_down_of_is_not_tried(
    make: Callable[..., Device], toll_faults: Faults
) -> None:
    device = make(state=None)
    with pytest.raises(PinNotTried):
        device.certificates()
    assert (device.pin_state, device.pin_accepted) == ("not-tried", False)
    assert toll_faults.count("C_Login") == 0


def test_what_became_of_a_try_that_had_no_answer_is_not_known(
    make: Callable[..., Device], toll_faults: Faults
) -> None:
    toll_faults.set("nth-call-fails", function="C_Login", rv=0x5)
    device = make()
    with pytest.raises(HsmTollError):
        device.certificates()
    assert (device.pin_state, device.pin_accepted) == ("unresolved", False)


def test_after_the_device_came_back_it_is_what_the_new_login_showed(
    make: Callable[..., Device], toll_faults: Faults, key: str
) -> None:
    device = make(key=key)
    device.sign("RS256", a_grant())
    # What needs no login does not show that it was lost.
    for faults, state in ((("pin-count-low",), "count-low"), ((), "ok")):
        toll_faults.clear()
        for each in ("session-lost", *faults):
            toll_faults.set(each)
        device.sign("RS256", a_grant())
        assert (device.pin_state, device.pin_accepted) == (state, True)
    assert toll_faults.count("C_Login") == 3


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_the_status_of_a_client_shows_it(
    isolation: str, toll_settings: object, toll_faults: Faults
) -> None:
    from hsmtoll.settings import load

    del toll_settings
    app = App(load(hsm__isolation=isolation))
    with app.client() as client:
        assert client.status().pin is None
        client.token("road")
        assert client.status().pin == "ok"
        toll_faults.set("pin-locked")
        toll_faults.set("session-lost")
        with pytest.raises(PinNotTried):
            client.token("road", renew=True)
        assert client.status().pin == "locked"
