"""Enrolment on devices with a mind of their own: what they refuse, and what they lose."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll import CertificateError, DeviceError, enrolment
from hsmtoll.app import App
from hsmtoll.sandbox import pki
from hsmtoll.settings import load
from tests.kit.own_device import PIN, make_lab
from tests.kit.pki import chain_for
from tests.softhsm.test_enrol import SUBJECT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.hsm.device import Device
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.softhsm import SoftHsm

DECRYPT, WRAP, UNWRAP, ENCRYPT, DERIVE = 0x105, 0x106, 0x107, 0x104, 0x10C
SIGN, SIGN_RECOVER, VERIFY_RECOVER, ID = 0x108, 0x109, 0x10B, 0x102
SENSITIVE, EXTRACTABLE, ALWAYS_AUTHENTICATE = 0x103, 0x162, 0x202
TYPE_INVALID, TEMPLATE_INCONSISTENT, GENERAL_ERROR = 0x12, 0xD1, 0x5
VALUE_INVALID, USER_TYPE_INVALID, NOT_SUPPORTED = 0x13, 0x103, 0x54
NOW = datetime.now(UTC)

#: What a device may answer to a write that it does not offer.
REFUSALS = [0x54, 0xD0, 0xD1, 0xE2, 0xB5, 0x101, 0x103, 0x1B, 0x68, 0x30, 0x31, 0x5, 0x6, 0x7, 0x13,
            0x80000131, 0x8BADF00D]  # fmt: skip


@pytest.fixture
def device(
    toll_settings: Settings,
    toll_softhsm: SoftHsm,
    toll_faults: Faults,
    request: pytest.FixtureRequest,
) -> Iterator[Device]:
    del toll_settings
    label = f"refused-{abs(hash(request.node.name)) % 10**8}"
    app = App(load(hsm__key=toll_softhsm.uri(label), hsm__module=toll_faults.module))
    yield app.devices[0]
    toll_faults.clear()
    app.close()


# ---------------------------------------------------------------------- key generate


@pytest.mark.parametrize("answer", [TYPE_INVALID, TEMPLATE_INCONSISTENT, GENERAL_ERROR, 0x1B])
@pytest.mark.parametrize(
    "attribute",
    [SIGN_RECOVER, VERIFY_RECOVER, DERIVE, ENCRYPT, WRAP, UNWRAP, DECRYPT, EXTRACTABLE],
)
def test_a_device_that_does_not_take_an_attribute_still_makes_a_key_that_only_signs(
    device: Device, toll_faults: Faults, attribute: int, answer: int
) -> None:
    toll_faults.set("template-refused", attribute=attribute, rv=answer)
    enrolment.generate(device, bits=2048)
    toll_faults.clear()
    facts = device.key()
    assert facts.protected
    assert facts.sign


def test_a_key_that_would_not_be_sensitive_without_saying_so_is_not_kept(
    device: Device, toll_faults: Faults
) -> None:
    toll_faults.set("template-refused", attribute=SENSITIVE, rv=TYPE_INVALID)
    with pytest.raises(DeviceError, match="not sensitive; it was destroyed"):
        enrolment.generate(device, bits=2048)


def test_a_key_that_can_recover_a_signature_is_taken(device: Device, toll_faults: Faults) -> None:
    toll_faults.set("attribute-value", attribute=SIGN_RECOVER)
    assert enrolment.generate(device, bits=2048).object


def test_a_key_that_stays_able_to_decrypt_is_destroyed_and_the_own_tool_named(
    device: Device, toll_faults: Faults
) -> None:
    toll_faults.set("attribute-value", attribute=DECRYPT)
    with pytest.raises(DeviceError, match="able to decrypt; it was destroyed") as caught:
        enrolment.generate(device, bits=2048)
    assert caught.value.code == "key-too-able"
    the_way_on(caught.value)
    toll_faults.clear()
    # Nothing is left in the way of another try.
    assert enrolment.generate(device, bits=2048).object


def test_where_a_device_does_not_say_whether_keys_leave_it_the_setting_for_them_is_named(
    device: Device, toll_faults: Faults
) -> None:
    toll_faults.set("attribute-fails", attribute=EXTRACTABLE, rv=TYPE_INVALID)
    with pytest.raises(DeviceError, match="unknown extractability; it was destroyed") as caught:
        enrolment.generate(device, bits=2048)
    the_way_on(caught.value)
    assert "HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY=true" in (caught.value.hint or "")
    # Of a key that is known to leave it, nothing lets a person believe that it is allowed.
    toll_faults.clear()
    toll_faults.set("attribute-value", attribute=EXTRACTABLE)
    with pytest.raises(DeviceError, match="is extractable; it was destroyed") as caught:
        enrolment.generate(device, bits=2048)
    assert "ALLOW_EXPORTABLE" not in (caught.value.hint or "")


def test_a_wrong_key_that_cannot_be_destroyed_is_said_and_named(
    device: Device, toll_faults: Faults
) -> None:
    toll_faults.set("attribute-value", attribute=DECRYPT)
    toll_faults.set("call-fails", function="C_DestroyObject", rv=0x1B)
    with pytest.raises(DeviceError, match="still on the device: delete pkcs11:"):
        enrolment.generate(device, bits=2048)


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_device_that_makes_no_key_for_a_program_ends_with_the_way_on(
    device: Device, toll_faults: Faults, answer: int, caplog: pytest.LogCaptureFixture
) -> None:
    toll_faults.set("call-fails", function="C_GenerateKeyPair", rv=answer)
    for _ in range(2):
        with pytest.raises(DeviceError) as caught:
            enrolment.generate(device, bits=2048)
        assert caught.value.code == "key-refused"
        the_way_on(caught.value)
    # A refusal is no outage.
    assert "device-down" not in caplog.text


def test_a_session_for_writing_that_is_refused_ends_with_the_way_on(
    device: Device, toll_faults: Faults
) -> None:
    toll_faults.set("session-read-only", rv=0xE2)
    with pytest.raises(DeviceError) as caught:
        enrolment.generate(device, bits=2048)
    assert caught.value.code == "key-refused"
    the_way_on(caught.value)


def test_a_long_id_that_a_card_does_not_take_is_hinted_at(
    device: Device, toll_faults: Faults
) -> None:
    toll_faults.set("call-fails", function="C_GenerateKeyPair", rv=VALUE_INVALID)
    with pytest.raises(DeviceError) as caught:
        enrolment.generate(device, bits=2048)
    assert "--id 01" in (caught.value.hint or "")
    with pytest.raises(DeviceError) as caught:
        enrolment.generate(device, bits=2048, id=b"\x01")
    assert "--id 01" not in (caught.value.hint or "")


def test_a_device_that_is_gone_is_not_told_to_use_its_tool(
    device: Device, toll_faults: Faults
) -> None:
    assert device.certificates() is not None
    toll_faults.set("token-removed")
    with pytest.raises(DeviceError) as caught:
        enrolment.generate(device, bits=2048)
    assert "own tool" not in (caught.value.hint or "")


def the_way_on(error: DeviceError) -> None:
    """The own tool, the attributes that count, and the next command; no fault of hsmtoll's."""
    hint = error.hint or ""
    for part in (
        "own tool",
        "2048",
        "sensitive",
        "not extractable",
        "permitted to sign",
        "key csr",
    ):
        assert part in hint
    for part in ("Should never", "Unmapped", "report it"):
        assert part not in f"{error} {hint}"


# ---------------------------------------------------------------------- key import


@pytest.mark.parametrize("answer", REFUSALS)
def test_every_refusal_of_certificates_names_the_setting_and_the_file(
    device: Device, toll_faults: Faults, answer: int, tmp_path: Path
) -> None:
    enrolment.generate(device, bits=2048)
    text, file = chain_for(device), tmp_path / "chain.pem"
    toll_faults.set("call-fails", function="C_CreateObject", rv=answer)
    with pytest.raises(DeviceError) as caught:
        enrolment.import_chain(device, text, now=NOW, file=file)
    assert caught.value.code == "certificate-refused"
    assert f"HSMTOLL_HSM__CERTIFICATES to {file}" in (caught.value.hint or "")
    toll_faults.clear()
    assert len(enrolment.import_chain(device, text, now=NOW, file=file).written) == 3


def test_a_session_for_writing_that_is_refused_names_the_setting(
    device: Device, toll_faults: Faults
) -> None:
    enrolment.generate(device, bits=2048)
    text = chain_for(device)
    toll_faults.set("session-read-only", rv=0xB5)
    with pytest.raises(DeviceError) as caught:
        enrolment.import_chain(device, text, now=NOW)
    assert caught.value.code == "certificate-refused"
    assert "HSMTOLL_HSM__CERTIFICATES" in (caught.value.hint or "")
    # The keys are read without writing: a stranger's leaf is still a stranger's.
    key = pki.eseal_authority()
    other = key.issue(key.root.public_key())  # type: ignore[arg-type]  # RSA
    with pytest.raises(CertificateError) as foreign:
        enrolment.import_chain(device, other.public_bytes(Encoding.PEM), now=NOW)
    assert foreign.value.code == "certificate-foreign"


def test_a_device_that_replaces_one_certificate_by_another_is_found_out(
    toll_settings: Settings, toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> None:
    del toll_settings
    # Of its own, and empty: what is replaced is lost.
    environment = {**os.environ, "SOFTHSM2_CONF": str(toll_softhsm.conf)}
    lab = make_lab(toll_faults.module, environment, "replaced")
    key = f"pkcs11:token={lab.label};object=k"
    settings = load(hsm__key=key, hsm__module=toll_faults.module, hsm__pin=PIN, hsm__pin_file=None)
    with contextlib.closing(App(settings)) as app:
        device, file = app.devices[0], tmp_path / "chain.pem"
        enrolment.generate(device, bits=2048)
        text = chain_for(device)
        toll_faults.set("object-replaced")
        for _ in range(3):
            with pytest.raises(DeviceError, match="does not have all of them") as caught:
                enrolment.import_chain(device, text, now=NOW, file=file)
            assert caught.value.code == "certificate-lost"
            assert caught.value.exit_code == 30
            assert str(file) in (caught.value.hint or "")
        # The control: a device that keeps what it takes.
        toll_faults.clear()
        done = enrolment.import_chain(device, text, now=NOW, file=file)
        assert len(done.written) + len(done.present) == 3
    assert lab.listed().count("Certificate Object") == 3


# ---------------------------------------------------------------------- hidden public halves


def test_a_hidden_public_half_is_found_by_the_leaf_that_is_imported(
    device: Device, toll_faults: Faults
) -> None:
    enrolment.generate(device, bits=2048)
    text = chain_for(device)
    expected = enrolment.jwk(device)
    toll_faults.set("hidden-modulus")
    device.close()
    # The control: nothing proves whose key it is yet.
    with pytest.raises(DeviceError) as caught:
        enrolment.jwk(device)
    assert caught.value.code == "public-key-hidden"
    done = enrolment.import_chain(device, text, now=NOW)
    assert len(done.written) == 3
    # From now on the leaf lies beside the key, and says what the device does not.
    assert enrolment.jwk(device) == expected
    request = x509.load_pem_x509_csr(enrolment.csr(device, **SUBJECT).encode())
    assert request.is_signature_valid


def test_a_strangers_leaf_proves_nothing_for_a_hidden_public_half(
    device: Device, toll_faults: Faults
) -> None:
    enrolment.generate(device, bits=2048)
    authority = pki.eseal_authority()
    other = authority.issue(authority.root.public_key())  # type: ignore[arg-type]  # RSA
    toll_faults.set("hidden-modulus")
    device.close()
    with pytest.raises(CertificateError) as caught:
        enrolment.import_chain(device, other.public_bytes(Encoding.PEM), now=NOW)
    assert caught.value.code == "certificate-foreign"
