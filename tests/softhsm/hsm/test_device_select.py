"""Which key is found, and what is said where none, several or the wrong one is."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import ConfigurationError, DeviceError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey
from tests.kit.grants import a_grant
from tests.kit.own_device import accepted

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.testing.softhsm import SoftHsm
    from tests.softhsm.conftest import DeviceSoftHsm

UNSIGNED = a_grant()


def refused(device: InProcessDevice) -> DeviceError:
    with device, pytest.raises(DeviceError) as caught:
        device.key()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "key", ["object=acme", "id=%01", "object=acme;id=%01", "object=acme;type=private"]
)
def test_a_key_is_found_by_label_by_id_and_by_both(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, key: str
) -> None:
    with device_softhsm.device(key, tmp_path) as device:
        facts = device.key()
    assert (facts.label, facts.id, facts.key_type, facts.bits) == ("acme", b"\x01", "rsa", 2048)
    assert facts.protected
    assert (facts.always_sensitive, facts.never_extractable, facts.local) == (True, True, True)
    assert facts.warnings == ()


def test_a_label_and_an_id_that_do_not_belong_together_find_nothing(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    error = refused(device_softhsm.device("object=acme;id=%02", tmp_path))
    assert error.code == "key-missing"


def test_no_key_says_which_keys_there_are_ready_to_paste(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    error = refused(device_softhsm.device("object=nobody", tmp_path))
    assert error.code == "key-missing"
    listed = [line for line in (error.hint or "").split() if line.startswith("pkcs11:")]
    wanted = next(KeyUri.parse(line) for line in listed if "object=acme" in line)
    with InProcessDevice(
        DeviceSettings(device_softhsm.module, wanted),
        pin=PinValue.of("1234"),
        pin_log=PinLog(tmp_path),
    ) as device:
        assert device.key().label == "acme"


_NAMELESS = """
import sys, pkcs11
from pkcs11 import Attribute as A, KeyType
module, label, pin = sys.argv[1:]
with pkcs11.lib(module).get_token(token_label=label).open(rw=True, user_pin=pin) as session:
    for label, id in (
        ("sister", None), ("sister", b"s"), (None, b"n"), (None, None), ("blank", b"1"),
        ("blank ", b"2"), ("of C", b"3"),
    ):
        _, key = session.generate_keypair(
            KeyType.RSA, 2048, id=id, label=label, store=True,
            private_template={A.SENSITIVE: True, A.EXTRACTABLE: False},
        )
        if label == "of C":
            key[A.LABEL] = "of C\\0"
"""


def test_the_uri_of_every_key_names_it_alone_whatever_it_lacks(
    toll_softhsm: SoftHsm, tmp_path: Path
) -> None:
    argv = (str(toll_softhsm.module), toll_softhsm.label, toll_softhsm.pin)
    subprocess.run([sys.executable, "-c", _NAMELESS, *argv], check=True)

    def device(uri: KeyUri) -> InProcessDevice:
        settings = DeviceSettings(toll_softhsm.module, uri)
        return InProcessDevice(
            settings, pin=PinValue.of(toll_softhsm.pin), pin_log=PinLog(tmp_path)
        )

    with device(KeyUri(token=toll_softhsm.label)) as one:
        found = one.private_keys()
    assert {"sister", "", "blank", "blank ", "of C"} <= {each.label for each in found}
    for each in found:
        # As it is printed, and pasted.
        with device(KeyUri.parse(str(each.uri))) as one:
            assert one.key().public == each.public
    # Less than that is not enough for the two of one label, and blanks are a part of one.
    with device(KeyUri(token=toll_softhsm.label, object="sister")) as one:
        assert refused(one).code == "key-ambiguous"
    with device(KeyUri(token=toll_softhsm.label, object="blank")) as one:
        assert one.key().id == b"1"


def test_two_keys_are_not_chosen_between_and_their_ids_are_told(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    error = refused(device_softhsm.device("object=twin", tmp_path))
    assert error.code == "key-ambiguous"
    assert "id=%02" in (error.hint or "")
    assert "id=%03" in (error.hint or "")


def test_a_public_key_chooses_between_two(device_softhsm: DeviceSoftHsm, tmp_path: Path) -> None:
    with device_softhsm.device("id=%03", tmp_path) as device:
        public = device.key().public
    assert public is not None
    with device_softhsm.device("object=twin", tmp_path, public_key=public) as device:
        assert device.key().id == b"\x03"
    with device_softhsm.device("object=twin", tmp_path) as device:
        assert device.key(candidates=[RsaPublicKey(3, 3), public]).id == b"\x03"
        signature = device.sign("RS256", UNSIGNED, candidates=[public]).value
    assert public.verify("RS256", UNSIGNED, signature)


def test_without_a_pin_the_key_is_invisible_and_that_is_said(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    error = refused(device_softhsm.device("object=acme", tmp_path, pin=None))
    assert error.code == "not-logged-in"
    assert "HSMTOLL_HSM__PIN_FILE" in (error.hint or "")


def test_a_public_key_that_is_not_the_keys_is_an_error(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    other = RsaPublicKey((1 << 2047) | 1, 65537)
    error = refused(device_softhsm.device("object=acme", tmp_path, public_key=other))
    assert error.code == "key-mismatch"


def test_a_key_without_a_public_object_is_proven_by_its_modulus(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("object=nopublic", tmp_path) as device:
        public = device.key().public
        signature = device.sign("RS256", UNSIGNED).value
    assert public is not None
    assert public.verify("RS256", UNSIGNED, signature)


@pytest.mark.parametrize(
    ("key", "code", "message"),
    [
        ("object=curve", "key-type", "RS256, RS384 and RS512"),
        ("object=small", "key-size", "1024 bits"),
        ("object=nosign", "key-sign", "may not sign"),
        ("object=loose", "key-exportable", "SENSITIVE false, EXTRACTABLE true"),
    ],
)
def test_a_key_that_will_not_do_is_refused_with_the_reason(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, key: str, code: str, message: str
) -> None:
    error = refused(device_softhsm.device(key, tmp_path))
    assert error.code == code
    assert message in str(error)


def test_an_exportable_key_signs_only_where_it_is_allowed(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("object=loose", tmp_path, allow_exportable_key=True) as device:
        facts = device.key()
        device.sign("RS256", UNSIGNED)
    assert not facts.protected
    with device_softhsm.device("object=loose", tmp_path) as device, pytest.raises(DeviceError):
        device.sign("RS256", UNSIGNED)


def test_a_key_that_was_outside_the_device_signs_with_a_warning(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        device_softhsm.device("object=imported", tmp_path) as device,
    ):
        assert device.key().warnings == ("key-imported",)
        device.sign("RS256", UNSIGNED)
    assert caplog.text.count("key-imported") == 1
    with device_softhsm.device("object=acme", tmp_path) as device:
        assert device.key().warnings == ()


def test_a_uri_of_a_certificate_is_not_taken_for_a_key(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with (
        device_softhsm.device("object=acme;type=cert", tmp_path) as device,
        pytest.raises(ConfigurationError, match="cert object"),
    ):
        device.key()


@pytest.mark.parametrize("wrong", ["token=other", "token=lab;serial=00", "token=lab;model=X"])
def test_no_device_says_which_devices_there_are(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, wrong: str
) -> None:
    device = InProcessDevice(
        DeviceSettings(device_softhsm.module, KeyUri.parse(f"pkcs11:{wrong};object=acme")),
        pin=PinValue.of("1234"),
        pin_log=PinLog(tmp_path),
    )
    error = refused(device)
    assert error.code == "device-missing"
    assert "token=lab" in (error.hint or "")


def test_certificates_are_read_without_a_login_and_one_that_is_too_large_hides_none(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with device_softhsm.device("object=acme", tmp_path, pin=None) as device:
        leaf, huge = sorted(device.certificates(), key=lambda each: each.label, reverse=True)
    assert (leaf.label, leaf.id, leaf.der) == ("leaf", b"\x01", b"\x30\x03\x02\x01\x01")
    assert (huge.label, huge.der) == ("huge", b"")
    assert "'huge' cannot be read: it has" in caplog.text


def test_inspection_shows_more_with_a_pin_and_every_uri_finds_its_object(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("", tmp_path, pin=None) as device:
        before = next(t for t in device.inspect().tokens if t.uri.token == "lab")
    assert (before.keys, before.logged_in, before.pin_state) == ((), False, "ok")
    named, _ = sorted(before.certificates, key=lambda each: each[1].label, reverse=True)
    assert (named[0].object, named[0].type) == ("leaf", "cert")
    with device_softhsm.device("", tmp_path) as device:
        after = next(t for t in device.inspect().tokens if t.uri.token == "lab")
    assert after.logged_in
    assert {key.label for key in after.keys} >= {"acme", "curve", "loose", "imported"}
    acme = next(key for key in after.keys if key.label == "acme")
    with InProcessDevice(
        DeviceSettings(device_softhsm.module, acme.uri),
        pin=PinValue.of("1234"),
        pin_log=PinLog(tmp_path),
    ) as device:
        assert device.key().id == b"\x01"


def test_inspection_with_a_wrong_pin_still_shows_what_can_be_seen(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    wrong = PinValue.of("9999")
    with device_softhsm.device("", tmp_path, pin=wrong) as device:
        lab = next(t for t in device.inspect().tokens if t.uri.token == "lab")
        users = device.token_users()
    assert "PinIncorrect" in (lab.problem or "")
    assert (lab.refused, lab.pin_state) == (1, "count-low")
    assert lab.certificates
    assert PinLog(tmp_path).clear(*users) == 1
    with device_softhsm.device("object=acme", tmp_path) as device:  # clears the device's flag
        assert accepted(device)
