"""Enrolment where the device is small, and where every signature wants its PIN."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll import DeviceError, UsageError, enrolment
from hsmtoll.app import App
from hsmtoll.settings import load
from tests.kit.grants import a_grant
from tests.kit.pki import chain_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.hsm.device import Device
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.softhsm import SoftHsm

CKR_DEVICE_MEMORY = 0x31


@pytest.fixture
def device(
    toll_settings: Settings, toll_softhsm: SoftHsm, toll_faults: Faults, request: Any
) -> Iterator[Device]:
    del toll_settings
    label = f"enrol-{abs(hash(request.node.name)) % 10**8}"
    app = App(load(hsm__key=toll_softhsm.uri(label), hsm__module=toll_faults.module))
    yield app.devices[0]
    app.close()


def test_a_device_with_room_for_one_certificate_gets_the_leaf_and_the_rest_is_named(
    device: Device, toll_faults: Faults
) -> None:
    enrolment.generate(device, bits=2048)
    text = chain_for(device)
    toll_faults.set("nth-call-fails", function="C_CreateObject", n=2, rv=CKR_DEVICE_MEMORY)
    done = enrolment.import_chain(device, text, now=datetime.now(UTC))

    assert next(each.is_ca for each in done.written) is False
    assert done.left
    assert all(each.is_ca for each in done.left)
    toll_faults.clear()
    again = enrolment.import_chain(device, text, now=datetime.now(UTC))
    assert not again.left
    assert len(again.written) + len(again.present) == 3


def test_where_not_even_the_leaf_finds_room_it_is_an_error(
    device: Device, toll_faults: Faults
) -> None:
    enrolment.generate(device, bits=2048)
    text = chain_for(device)
    toll_faults.set("nth-call-fails", function="C_CreateObject", rv=CKR_DEVICE_MEMORY)

    with pytest.raises(DeviceError):
        enrolment.import_chain(device, text, now=datetime.now(UTC))


def test_a_key_that_wants_its_pin_each_time_is_made_and_signs(
    device: Device, toll_faults: Faults, toll_settings: Settings
) -> None:
    grant = a_grant(audience=str(toll_settings.endpoints.issuer))
    enrolment.generate(device, bits=2048, always_authenticate=True)
    facts = device.key()
    before = toll_faults.count("C_Login")

    assert facts.always_authenticate is True
    assert device.sign("RS256", grant).value
    assert device.sign("RS256", grant).value
    # The context login, once a signature.
    assert toll_faults.count("C_Login") == before + 2


@pytest.mark.parametrize("label", ["N\udcf8kkel", "two\nlines", "a\0b", "\x1b[31m"])
def test_a_label_that_is_not_a_line_of_text_reaches_no_device(
    device: Device, toll_faults: Faults, label: str
) -> None:
    with pytest.raises(UsageError, match="label"):
        enrolment.generate(device, bits=2048, label=label)

    assert toll_faults.count("C_GenerateKeyPair") == 0
    # Letters beyond ASCII, as UTF-8, are a label.
    assert enrolment.generate(device, bits=2048, label=f"Nøkkel {label!a}").object


def test_a_size_that_maskinporten_does_not_take_is_not_made(
    device: Device, toll_faults: Faults
) -> None:
    with pytest.raises(UsageError):
        enrolment.generate(device, bits=1024)

    assert toll_faults.count("C_GenerateKeyPair") == 0
