"""
Creates keys and certificates on a PKCS#11 token, in a process of its own.

A process loads a module once and keeps its configuration, so the calling process must not load it.
Commands and PIN are read as JSON from stdin, never from argv; public keys are written as JSON to
stdout.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

import pkcs11
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.constants import CertificateType
from pkcs11.util.ec import encode_ec_public_key, encode_named_curve_parameters

from hsmtoll.der import certificate_fields


def main() -> None:
    """Execute the commands from stdin."""
    orders = json.load(sys.stdin)
    token = pkcs11.lib(orders["module"]).get_token(token_label=orders["token_label"])
    with token.open(rw=True, user_pin=orders["pin"]) as session:
        made = [_DO[order.pop("what")](session, **order) for order in orders["do"]]
    json.dump(made, sys.stdout)
    sys.stdout.flush()
    # Skip the module's own cleanup at exit.
    os._exit(0)


def _rsa_key(
    session: pkcs11.Session,
    *,
    label: str,
    key_id: str,
    bits: int,
    private: dict[str, bool],
) -> str:
    public, _ = session.generate_keypair(
        KeyType.RSA,
        bits,
        id=bytes.fromhex(key_id),
        label=label,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        private_template={Attribute[name]: value for name, value in private.items()},
    )
    numbers = rsa.RSAPublicNumbers(
        int.from_bytes(public[Attribute.PUBLIC_EXPONENT], "big"),
        int.from_bytes(public[Attribute.MODULUS], "big"),
    )
    spki = numbers.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(spki).decode()


def _ec_key(session: pkcs11.Session, *, label: str, key_id: str) -> str:
    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(KeyType.EC, curve, local=True)
    public, _ = parameters.generate_keypair(
        id=bytes.fromhex(key_id),
        label=label,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        private_template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
    )
    return base64.b64encode(encode_ec_public_key(public)).decode()


def _certificate(session: pkcs11.Session, *, label: str, key_id: str, der: str) -> None:
    value = base64.b64decode(der)
    fields = certificate_fields(value)
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.CERTIFICATE,
            Attribute.CERTIFICATE_TYPE: CertificateType.X_509,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: False,
            Attribute.LABEL: label,
            Attribute.ID: bytes.fromhex(key_id),
            Attribute.VALUE: value,
            Attribute.SUBJECT: fields.subject,
            Attribute.ISSUER: fields.issuer,
            Attribute.SERIAL_NUMBER: fields.serial,
        }
    )


def _pin(session: pkcs11.Session, *, old: str, new: str) -> None:
    session.set_pin(old, new)


def _delete(session: pkcs11.Session, *, label: str) -> None:
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.CERTIFICATE):
        for found in list(session.get_objects({Attribute.CLASS: kind, Attribute.LABEL: label})):
            found.destroy()


_DO: dict[str, Any] = {
    "rsa-key": _rsa_key,
    "ec-key": _ec_key,
    "certificate": _certificate,
    "delete": _delete,
    "pin": _pin,
}

if __name__ == "__main__":
    main()
