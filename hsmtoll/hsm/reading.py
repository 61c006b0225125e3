"""
Reads tokens, keys and certificates: PKCS#11 objects become the values of `hsmtoll.hsm.facts`.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, KeyType, ObjectClass, TokenFlag

from hsmtoll import der as ders
from hsmtoll.errors import sanitized
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.cryptoki import Unreadable
from hsmtoll.hsm.facts import KeyFacts, StoredCertificate
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pkcs11 import Object, Session, Slot, Token

    from hsmtoll.hsm.module import Module

__all__ = [
    "certificates_of",
    "device_facts",
    "device_uri",
    "display_name",
    "id_of",
    "key_facts",
    "label_of",
    "login_key",
    "object_uri",
    "pin_state",
    "read_certificate",
    "read_label",
    "strip_padding",
    "token_identity",
    "unreadable_reason",
    "user_name",
]

_log = logging.getLogger(__name__)

_LARGEST_CERTIFICATE: Final = 65536
_PIN_FLAGS: Final = {
    TokenFlag.USER_PIN_LOCKED: "locked",
    TokenFlag.USER_PIN_FINAL_TRY: "final-try",
    TokenFlag.USER_PIN_COUNT_LOW: "count-low",
    TokenFlag.USER_PIN_TO_BE_CHANGED: "to-be-changed",
}


def device_facts(module: Module, slot: Slot, token: Token) -> dict[str, Any]:
    """The attributes of a token that an RFC 7512 URI can name, by the fields of KeyUri."""
    manufacturer, model, serial, label = token_identity(token)
    return {
        "token": label,
        "manufacturer": manufacturer,
        "model": model,
        "serial": serial,
        "slot_id": slot.slot_id,
        "slot_manufacturer": strip_padding(slot.manufacturer_id),
        "slot_description": strip_padding(slot.slot_description),
        "library_manufacturer": strip_padding(module.lib.manufacturer_id),
        "library_description": strip_padding(module.lib.library_description),
        "library_version": module.lib.library_version,
    }


def login_key(token: Token) -> tuple[object, ...]:
    """The key of `Module.logins`. With the slot: two tokens may have one label and no serial."""
    return (token.slot.slot_id, *token_identity(token))


def device_uri(token: Token) -> KeyUri:
    """The URI of a PKCS#11 token, without its slot id, which may change."""
    manufacturer, model, serial, label = token_identity(token)
    return KeyUri(token=label, manufacturer=manufacturer, model=model, serial=serial or None)


def object_uri(token: Token, thing: Object, kind: str) -> KeyUri:
    """The URI of an object on *token*; it matches no other object."""
    # An empty attribute is named as well ("id=", RFC 7512): without it other objects would match.
    return replace(device_uri(token), object=label_of(thing), id=id_of(thing), type=kind)


def user_name(user_type: int | None) -> str:
    """The name of a user type in the PIN log: `TokenUser.user`."""
    return "user" if user_type is None else f"user {user_type:#x}"


def pin_state(flags: TokenFlag) -> str:
    """The most severe of ``ok count-low to-be-changed final-try locked``, or ``unset``."""
    if not flags & TokenFlag.USER_PIN_INITIALIZED:
        return "unset"
    return next((word for flag, word in _PIN_FLAGS.items() if flags & flag), "ok")


def key_facts(module: Module, session: Session, keys: Iterable[Object]) -> list[KeyFacts]:
    """The attributes of the private *keys*."""
    token = session.token
    manufacturer, model, serial, label = token_identity(token)
    of_the_device: dict[str, Any] = {
        "mechanisms": frozenset(
            # A vendor-defined mechanism is an int.
            getattr(one, "name", None) or hex(one)
            for one in token.slot.get_mechanisms()
        ),
        "token_label": label,
        "manufacturer": manufacturer,
        "model": model,
        "serial": serial,
        "firmware": token.firmware_version,
        "library_manufacturer": strip_padding(module.lib.manufacturer_id),
        "library_description": strip_padding(module.lib.library_description),
        "library_version": module.lib.library_version,
    }
    return [_key_facts(session, key, of_the_device) for key in keys]


def _key_facts(session: Session, key: Object, of_the_device: dict[str, Any]) -> KeyFacts:
    kind = _attribute(key, Attribute.KEY_TYPE)
    public = _public_half(session, key) if kind == KeyType.RSA else None
    return KeyFacts(
        uri=object_uri(session.token, key, "private"),
        label=label_of(key),
        id=id_of(key),
        key_type=kind.name.lower() if isinstance(kind, KeyType) else "unknown",
        bits=public.bits if public else None,
        public=public,
        sensitive=_attribute(key, Attribute.SENSITIVE),
        always_sensitive=_attribute(key, Attribute.ALWAYS_SENSITIVE),
        extractable=_attribute(key, Attribute.EXTRACTABLE),
        never_extractable=_attribute(key, Attribute.NEVER_EXTRACTABLE),
        local=_attribute(key, Attribute.LOCAL),
        sign=_attribute(key, Attribute.SIGN),
        always_authenticate=_attribute(key, Attribute.ALWAYS_AUTHENTICATE),
        **of_the_device,
    )


def _public_half(session: Session, key: Object) -> RsaPublicKey | None:
    """
    The public key: from the private key's own attributes, else from the only public-key object with
    its CKA_ID, else from the only one with its label.
    """
    own = _rsa(key)
    if own is not None:
        return own
    modulus = _attribute(key, Attribute.MODULUS)
    for attribute in (Attribute.ID, Attribute.LABEL):
        value = _attribute(key, attribute)
        if not value:
            continue
        found = cryptoki.find_by_value(session, ObjectClass.PUBLIC_KEY, attribute, value)
        halves = {half for one in found if (half := _rsa(one))}
        if modulus is not None:
            halves = {half for half in halves if half.modulus == int.from_bytes(modulus, "big")}
        if len(halves) == 1:
            return halves.pop()
    return None


def _rsa(thing: Object) -> RsaPublicKey | None:
    modulus = _attribute(thing, Attribute.MODULUS)
    exponent = _attribute(thing, Attribute.PUBLIC_EXPONENT)
    if not modulus or not exponent:
        return None
    n, e = int.from_bytes(modulus, "big"), int.from_bytes(exponent, "big")
    # Values that no RSA key has (RFC 8017 section 3.1) are ignored.
    return RsaPublicKey(n, e) if n & e & 1 and 3 <= e < n else None


def certificates_of(session: Session) -> Iterator[StoredCertificate]:
    """The certificates that *session* shows; one that cannot be read has a *problem*."""
    found = cryptoki.find_objects(session, {Attribute.CLASS: ObjectClass.CERTIFICATE})
    return map(read_certificate, found)


def read_certificate(thing: Object) -> StoredCertificate:
    """One certificate; with a *problem* if it cannot be read."""
    thing = cryptoki.prefetched(thing, (Attribute.LABEL, Attribute.ID, Attribute.VALUE))
    label, key_id, der, problem = label_of(thing), id_of(thing), b"", None
    try:
        der = _first_value(cryptoki.read_attribute(thing, Attribute.VALUE) or b"")
    except Unreadable as exc:
        problem = f"its value was answered {exc}"
    if len(der) > _LARGEST_CERTIFICATE:
        der, problem = b"", f"it has {len(der)} bytes, more than {_LARGEST_CERTIFICATE}"
    elif not der and problem is None:
        problem = "it has no value on the device"
    if problem is not None:
        _log.warning("certificate %r cannot be read: %s", sanitized(label), problem)
    return StoredCertificate(der, label, key_id, problem)


def _first_value(value: bytes) -> bytes:
    # Cards store files of a fixed size: bytes after the certificate are padding.
    with contextlib.suppress(ValueError):
        return ders.first(value)
    return value


def _attribute(thing: Object, name: Attribute) -> Any:
    try:
        return cryptoki.read_attribute(thing, name)
    except Unreadable:
        return None


def read_label(thing: Object) -> str:
    """CKA_LABEL. Unreadable if it cannot be read."""
    # Some labels include the terminating NUL of C, which a URI cannot have.
    return (cryptoki.read_attribute(thing, Attribute.LABEL) or "").partition("\0")[0]


def label_of(thing: Object) -> str:
    """CKA_LABEL; empty if it cannot be read."""
    try:
        return read_label(thing)
    except Unreadable:
        return ""


def id_of(thing: Object) -> bytes:
    """CKA_ID; empty if it cannot be read."""
    return _attribute(thing, Attribute.ID) or b""


def unreadable_reason(thing: Object) -> str | None:
    """The reason why the label of *thing* cannot be read; ``None`` if it can."""
    try:
        read_label(thing)
    except Unreadable as exc:
        return str(exc)
    return None


def strip_padding(text: str) -> str:
    """The text of a fixed-size field."""
    # Fixed fields are padded with blanks; some modules end them with NUL and undefined bytes.
    return text.partition("\0")[0].rstrip()


def _serial(token: Token) -> str:
    # Binary serial numbers may differ only after a zero byte, so NUL does not end them.
    return token.serial.decode("utf-8", "replace").rstrip(" \0").replace("\0", " ")


def token_identity(token: Token) -> tuple[str, str, str, str]:
    """Manufacturer, model, serial number and label."""
    return (
        strip_padding(token.manufacturer_id),
        strip_padding(token.model),
        _serial(token),
        strip_padding(token.label),
    )


def display_name(token: Token) -> str:
    """Label and serial number of *token*, for messages."""
    label, serial = sanitized(strip_padding(token.label)), sanitized(_serial(token))
    return f"'{label}' (serial {serial or 'unknown'})"
