"""
What is written to a device: a key pair made there, and certificates beside it.

Read-write sessions live here and nowhere else. A private key's value never enters.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, CertificateType, KeyType, MechanismFlag, ObjectClass
from pkcs11 import exceptions as p11

from hsmtoll.der import certificate_fields
from hsmtoll.errors import DeviceError, foreign
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import speaking
from hsmtoll.hsm.device import certificates_of, key_facts, object_uri

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pkcs11 import Object, Session

    from hsmtoll.hsm.device import Device, KeyFacts
    from hsmtoll.hsm.uri import KeyUri

__all__ = ["Stored", "generate", "keys", "store"]

#: What the private key shall be, and what it shall not be able to do.
_KEPT: Final = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.SIGN: True}
_DENIED: Final = (
    Attribute.DECRYPT,
    Attribute.UNWRAP,
    Attribute.SIGN_RECOVER,
    Attribute.DERIVE,
)
_DENIED_PUBLIC: Final = (Attribute.ENCRYPT, Attribute.WRAP, Attribute.VERIFY_RECOVER)
# What a device says to an attribute that it does not know, or sets by itself.
_TEMPLATE: Final = (
    p11.AttributeReadOnly,
    p11.AttributeTypeInvalid,
    p11.AttributeValueInvalid,
    p11.TemplateInconsistent,
)


@dataclass(frozen=True, slots=True)
class Stored:
    """DERs that were *written*, were there before (*present*), and found no room (*left*)."""

    written: tuple[bytes, ...]
    present: tuple[bytes, ...]
    left: tuple[bytes, ...]


def generate(
    device: Device, *, bits: int, label: str, key_id: bytes | None, always_authenticate: bool
) -> KeyUri:
    """
    A new RSA key pair on *device*: sensitive, not extractable, for signing and nothing else.

    *key_id* None is a random one. What the device made is read back, and destroyed where it
    is not what was asked for. Raises DeviceError: ``key-exists`` for a label or id that is
    taken, ``key-too-able`` for a key that can do more than sign.
    """
    chosen = key_id or secrets.token_bytes(16)
    with device.writing(f"generating the key '{foreign(label)}'") as (_, token, session):
        _refuse_taken(session, label, chosen)
        private: dict[Attribute, Any] = {**_KEPT, **dict.fromkeys(_DENIED, False)}
        if always_authenticate:
            private[Attribute.ALWAYS_AUTHENTICATE] = True
        public: dict[Attribute, Any] = dict.fromkeys(_DENIED_PUBLIC, False)
        try:
            made = _pair(session, bits, label, chosen, public=public, private=private)
        except _TEMPLATE:
            # Not every device knows every attribute; what counts is read back below.
            fewer: dict[Attribute, Any] = {a: v for a, v in private.items() if a not in _DENIED}
            made = _pair(session, bits, label, chosen, public={}, private=fewer)
        wrong = _wrong(made[1], always_authenticate=always_authenticate)
        if wrong:
            for each in made:
                each.destroy()
            raise DeviceError(
                f"generating the key '{foreign(label)}': the device made one that is {wrong}; "
                "it was destroyed",
                hint="Use the device's own tool: sensitive, not extractable, sign only.",
                code="key-too-able",
            )
        return object_uri(token, made[1], "private")


def keys(device: Device) -> tuple[KeyFacts, ...]:
    """What the device says about each of its private keys, after login."""
    with device.writing("reading the keys") as (module, _, session):
        found = cryptoki.found(session, {Attribute.CLASS: ObjectClass.PRIVATE_KEY})
        return tuple(key_facts(module, session, found))


def store(device: Device, certificates: Iterable[tuple[bytes, str, bytes]]) -> Stored:
    """
    Write certificates, given as (DER, label, CKA_ID), the leaf first.

    What is there already, byte for byte, is left alone. Only the first must find room: what
    the device refuses after it is *left*. Raises DeviceError for the first.
    """
    written: list[bytes] = []
    present: list[bytes] = []
    left: list[bytes] = []
    with device.writing("writing certificates") as (_, _, session):
        there = {each.der for each in certificates_of(session)}
        for place, (der, label, key_id) in enumerate(certificates):
            if der in there:
                present.append(der)
                continue
            try:
                with speaking(f"writing the certificate '{foreign(label)}'"):
                    session.create_object(_template(der, label, key_id))
            except DeviceError:
                if place == 0:
                    raise
                left.append(der)
            else:
                written.append(der)
    return Stored(tuple(written), tuple(present), tuple(left))


def _refuse_taken(session: Session, label: str, key_id: bytes) -> None:
    taken: tuple[tuple[Attribute, str | bytes, str], ...] = (
        (Attribute.LABEL, label, f"label '{foreign(label)}'"),
        (Attribute.ID, key_id, f"id {key_id.hex()}"),
    )
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        for name, value, words in taken:
            if cryptoki.with_value(session, kind, name, value):
                raise DeviceError(
                    f"generating the key '{foreign(label)}': a key with the {words} is there",
                    hint="Nothing is overwritten: choose another label and id.",
                    code="key-exists",
                )


def _pair(
    session: Session,
    bits: int,
    label: str,
    key_id: bytes,
    *,
    public: dict[Attribute, Any],
    private: dict[Attribute, Any],
) -> tuple[Object, Object]:
    made: tuple[Object, Object] = session.generate_keypair(
        KeyType.RSA,
        bits,
        id=key_id,
        label=label,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        public_template=public,
        private_template=private,
    )
    return made


def _wrong(key: Object, *, always_authenticate: bool) -> str:
    """What is not as asked for, in words; empty if all is. Unreadable counts as wrong for two."""
    told = {name: _told(key, name) for name in (*_KEPT, *_DENIED)}
    wrong = [f"not {n.name.lower()}" for n in (Attribute.SENSITIVE, Attribute.SIGN) if not told[n]]
    if told[Attribute.EXTRACTABLE] is not False:
        wrong.append("extractable")
    wrong += [f"able to {name.name.lower()}" for name in _DENIED if told[name]]
    if always_authenticate and _told(key, Attribute.ALWAYS_AUTHENTICATE) is not True:
        wrong.append("usable without a PIN for each signature")
    return ", ".join(wrong)


def _told(key: Object, name: Attribute) -> bool | None:
    try:
        return bool(key[name])
    except (p11.PKCS11Error, struct.error):
        return None


def _template(der: bytes, label: str, key_id: bytes) -> dict[Attribute, Any]:
    fields = certificate_fields(der)
    return {
        Attribute.CLASS: ObjectClass.CERTIFICATE,
        Attribute.CERTIFICATE_TYPE: CertificateType.X_509,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: False,
        Attribute.LABEL: label,
        Attribute.ID: key_id,
        Attribute.SUBJECT: fields.subject,
        Attribute.ISSUER: fields.issuer,
        Attribute.SERIAL_NUMBER: fields.serial,
        Attribute.VALUE: der,
    }
