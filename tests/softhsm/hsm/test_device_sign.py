"""Signatures: judged by openssl and cryptography, and what happens when something is lost."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from hsmtoll.errors import ConfigurationError, DeviceError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.signatures import Signable
from hsmtoll.hsm.signing_key import _mechanisms
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import ALGS, RsaPublicKey
from tests.kit.grants import a_grant
from tests.kit.own_device import accepted

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.softhsm import SoftHsm
    from tests.softhsm.conftest import DeviceSoftHsm

UNSIGNED = a_grant()
DIGESTS = {"RS256": "sha256", "RS384": "sha384", "RS512": "sha512"}


@pytest.mark.parametrize("alg", ALGS)
def test_openssl_verifies_what_the_device_signed(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, alg: str
) -> None:
    with device_softhsm.device("object=acme", tmp_path / "state") as device:
        public = device.key().public
        unsigned = a_grant(alg)
        signature = device.sign(alg, unsigned).value
    assert public is not None
    (tmp_path / "key.der").write_bytes(public.spki())
    (tmp_path / "signature").write_bytes(signature)
    for data, verdict in ((unsigned, 0), (unsigned + b"x", 1)):
        (tmp_path / "data").write_bytes(data)
        done = subprocess.run(
            ["openssl", "dgst", f"-{DIGESTS[alg]}", "-verify", "key.der", "-keyform", "DER",
             "-signature", "signature", "data"],
            cwd=tmp_path, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == verdict


def test_only_the_algorithms_of_maskinporten_are_signed(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with (
        device_softhsm.device("object=acme", tmp_path) as device,
        pytest.raises(ConfigurationError, match="RS256"),
    ):
        device.sign("PS256", UNSIGNED)


@pytest.mark.parametrize("alg", ALGS)
def test_the_raw_mechanism_with_a_digest_info_gives_the_same_signature(
    device_softhsm: DeviceSoftHsm, alg: str
) -> None:
    wanted = Signable(alg, a_grant(alg))
    (hashed,) = _mechanisms(alg, frozenset({f"SHA{alg[2:]}_RSA_PKCS", "SHA1_RSA_PKCS"}))
    (raw,) = _mechanisms(alg, frozenset({"RSA_PKCS", "SHA1_RSA_PKCS"}))
    assert wanted.input_for(hashed) == a_grant(alg)
    assert raw.name == "RSA_PKCS"
    program = (
        "import sys, pkcs11\n"
        "from pkcs11 import Mechanism, ObjectClass\n"
        "token = pkcs11.lib(sys.argv[1]).get_token(token_label='lab')\n"
        "with token.open(user_pin='1234') as s:\n"
        "    key = s.get_key(object_class=ObjectClass.PRIVATE_KEY, label='acme')\n"
        "    made = {key.sign(bytes.fromhex(d), mechanism=Mechanism[m])\n"
        "            for m, d in zip(sys.argv[2::2], sys.argv[3::2])}\n"
        "assert len(made) == 1\n"
    )
    given = [word for each in (hashed, raw) for word in (each.name, wanted.input_for(each).hex())]
    device_softhsm.python(program, *given)


def allowed(softhsm: SoftHsm, key: str, mechanism: str) -> None:
    """Make the key *key*, whose CKA_ALLOWED_MECHANISMS is *mechanism* alone."""
    subprocess.run(
        ["pkcs11-tool", "--module", softhsm.module, "--token-label", softhsm.label, "--login",
         "--pin", softhsm.pin, "--keypairgen", "--key-type", "rsa:2048", "--label", key,
         "--usage-sign", "--sensitive", "--allowed-mechanisms", mechanism],
        check=True, capture_output=True,
    )  # fmt: skip


def of_faults(softhsm: SoftHsm, faults: Faults, key: str, state: Path) -> InProcessDevice:
    uri, pin = KeyUri.parse(softhsm.uri(key)), PinValue.of(softhsm.pin)
    return InProcessDevice(DeviceSettings(faults.module, uri), pin=pin, pin_log=PinLog(state))


def test_a_key_that_may_be_used_by_the_raw_mechanism_alone_signs(
    toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> None:
    allowed(toll_softhsm, "raw", "RSA-PKCS")
    with of_faults(toll_softhsm, toll_faults, "raw", tmp_path) as device:
        public = device.key().public
        assert public is not None
        assert "SHA256_RSA_PKCS" in device.key().mechanisms
        for alg in ALGS:
            data = a_grant(alg)
            assert public.verify(alg, data, device.sign(alg, data).value)
        # Asked for once, and remembered as long as the session lives.
        assert toll_faults.count("C_SignInit") == len(ALGS) + 1
        assert "RSA_PKCS" in device.key().mechanisms
        assert not {f"SHA{alg[2:]}_RSA_PKCS" for alg in ALGS} & device.key().mechanisms


def test_a_key_that_may_be_used_by_neither_mechanism_is_told_so(
    toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> None:
    allowed(toll_softhsm, "neither", "SHA1-RSA-PKCS")
    with (
        of_faults(toll_softhsm, toll_faults, "neither", tmp_path) as device,
        pytest.raises(DeviceError) as caught,
    ):
        device.sign("RS256", UNSIGNED)
    assert caught.value.code == "mechanism"


def test_a_key_that_wants_its_pin_each_time_may_have_the_raw_mechanism_alone(
    toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> None:
    toll_softhsm.generate_key("raw-each", b"\x5f", always_authenticate=True)
    with of_faults(toll_softhsm, toll_faults, "raw-each", tmp_path) as device:
        assert accepted(device)
        toll_faults.set("nth-call-fails", function="C_SignInit", rv=0x70)
        before = toll_faults.count("C_Login")
        assert device.sign("RS256", UNSIGNED).value
        # No PIN was spent on the mechanism that was not taken.
        assert toll_faults.count("C_Login") == before + 1


def test_a_device_without_a_mechanism_for_it_is_told_by_name() -> None:
    with pytest.raises(DeviceError, match="neither SHA256_RSA_PKCS nor RSA_PKCS"):
        _mechanisms("RS256", frozenset({"ECDSA"}))


def test_a_signature_that_does_not_fit_the_public_key_does_not_leave(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("id=%02", tmp_path) as other:
        strange = other.key().public
    assert strange is not None
    with device_softhsm.device("object=acme", tmp_path) as device:
        facts = device.key()
        # the control: a candidate that is right where the device hides its half
        assert facts.public is not None
        device._verifier._learned = strange
        device._connection._handles.facts = replace(facts, public=None)  # type: ignore[union-attr]  # it was just opened
        with pytest.raises(DeviceError) as caught:
            device.sign("RS256", UNSIGNED)
        assert caught.value.code == "signature-wrong"


def test_where_the_public_half_is_hidden_the_signature_chooses_the_candidate(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    with device_softhsm.device("object=acme", tmp_path) as device:
        facts = device.key()
        right = facts.public
        assert right is not None
        wrong = RsaPublicKey((1 << 2047) | 1, 65537)
        device._connection._handles.facts = replace(facts, public=None)  # type: ignore[union-attr]  # it was just opened
        signature = device.sign("RS256", UNSIGNED, candidates=[wrong, right]).value
        device._verifier._learned = None
        with pytest.raises(DeviceError):
            device.sign("RS256", UNSIGNED, candidates=[wrong])
    key = rsa.RSAPublicNumbers(right.exponent, right.modulus).public_key()
    key.verify(signature, UNSIGNED, padding.PKCS1v15(), hashes.SHA256())


def test_a_deleted_key_is_an_error_once_and_a_new_one_is_found_afterwards(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    making = (
        "import sys, pkcs11\n"
        "from pkcs11 import Attribute as A, KeyType, ObjectClass\n"
        "token = pkcs11.lib(sys.argv[1]).get_token(token_label='lab')\n"
        "with token.open(rw=True, user_pin='1234') as s:\n"
        "    for o in list(s.get_objects({A.LABEL: 'brief'})): o.destroy()\n"
        "    if sys.argv[2] == 'make':\n"
        "        s.generate_keypair(KeyType.RSA, 2048, id=b'\\x33', label='brief', store=True,\n"
        "            private_template={A.SENSITIVE: True, A.EXTRACTABLE: False})\n"
    )
    device_softhsm.python(making, "make")
    with device_softhsm.device("object=brief", tmp_path) as device:
        first = device.key().public
        device.sign("RS256", UNSIGNED)
        device_softhsm.python(making, "delete")
        with pytest.raises(DeviceError):
            device.sign("RS256", UNSIGNED)
        with pytest.raises(DeviceError) as caught:
            device.sign("RS256", UNSIGNED)
        assert caught.value.code == "key-missing"
        device_softhsm.python(making, "make")
        second = device.key().public
        signature = device.sign("RS256", UNSIGNED).value
        assert first != second
        assert second is not None
        assert second.verify("RS256", UNSIGNED, signature)
    device_softhsm.python(making, "delete")


def test_a_restarted_module_is_found_again_without_reading_the_pin_twice(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    from hsmtoll.hsm.module import PKCS11_LOCK, restart

    with device_softhsm.device("object=acme", tmp_path) as device:
        device.sign("RS256", UNSIGNED)
        with PKCS11_LOCK.held(1):
            restart(device_softhsm.module)
        device.sign("RS256", UNSIGNED)


def test_after_close_a_device_can_be_used_again(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    device = device_softhsm.device("object=acme", tmp_path)
    for _ in range(2):
        device.sign("RS256", UNSIGNED)
        device.close()
    device.close()


def test_importing_the_room_loads_no_module_and_no_pkcs11() -> None:
    program = "import sys, hsmtoll.hsm; sys.exit('pkcs11' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
