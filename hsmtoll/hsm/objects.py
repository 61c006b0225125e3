"""
Writes to a device: generates a key pair, and stores certificates. No other module uses read-write
sessions. The value of a private key never leaves the device.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, CertificateType, KeyType, ObjectClass
from pkcs11 import exceptions as p11
from pkcs11.constants import DEFAULT

from hsmtoll.der import certificate_fields
from hsmtoll.errors import DeviceError, sanitized
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import away, ckr_code, describe
from hsmtoll.hsm.facts import Stored
from hsmtoll.hsm.makers import maker_of
from hsmtoll.hsm.reading import certificates_of, key_facts, object_uri
from hsmtoll.hsm.return_codes import RETURN_CODES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pkcs11 import Object, Session, Token

    from hsmtoll.hsm.calls import Calls
    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.uri import KeyUri

__all__ = ["generate", "keys", "store"]

#: Required attributes of a new private key.
_REQUIRED: Final = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.SIGN: True}
#: Operations that it must not permit. SIGN_RECOVER makes signatures as well.
_DENIED: Final = (Attribute.DECRYPT, Attribute.UNWRAP, Attribute.DERIVE)
_STRICT_PRIVATE: Final[dict[Attribute, Any]] = {
    **_REQUIRED,
    **dict.fromkeys((*_DENIED, Attribute.SIGN_RECOVER), False),
}
_STRICT_PUBLIC: Final[dict[Attribute, Any]] = {
    Attribute.VERIFY: True,
    **dict.fromkeys((Attribute.ENCRYPT, Attribute.WRAP, Attribute.VERIFY_RECOVER), False),
}
#: Attributes that some devices refuse in a template: after each refusal, another group is omitted.
_OMITTED_STEP_BY_STEP: Final = (
    (),
    (Attribute.SIGN_RECOVER, Attribute.VERIFY_RECOVER),
    (Attribute.DERIVE,),
    (Attribute.ENCRYPT, Attribute.WRAP),
    (Attribute.UNWRAP,),
    (Attribute.DECRYPT,),
    (Attribute.EXTRACTABLE,),
    (Attribute.SENSITIVE,),
    (Attribute.SIGN, Attribute.VERIFY, Attribute.PRIVATE),
)
#: Errors about the device, the login or the operation, for which no other template helps.
_FINAL: Final = (
    p11.DeviceMemory,
    p11.DeviceRemoved,
    p11.FunctionCancelled,
    p11.FunctionNotSupported,
    p11.FunctionRejected,
    p11.KeySizeRange,
    p11.MechanismInvalid,
    p11.MechanismParamInvalid,
    p11.SessionClosed,
    p11.SessionCount,
    p11.SessionHandleInvalid,
    p11.SessionReadOnly,
    p11.TokenNotPresent,
    p11.TokenWriteProtected,
    p11.UserNotLoggedIn,
)
#: For a key whose CKA_EXTRACTABLE cannot be read.
_UNKNOWN: Final = "of unknown extractability"
#: Bytes of a CKA_ID that every card accepts.
_SHORT_ID: Final = 2


def generate(
    calls: Calls,
    *,
    bits: int,
    label: str,
    key_id: bytes | None,
    always_authenticate: bool,
) -> KeyUri:
    """
    Generate an RSA key pair of *bits* bits on the device: sensitive, not extractable, only for
    signing. Returns the URI of the private key.

    *key_id* None: a random CKA_ID. The attributes are read back, and the pair is destroyed if they
    differ from those requested. Raises DeviceError: ``key-exists`` if label or id are in use,
    ``key-refused`` if the device does not generate keys for programs, ``key-too-able`` for a key
    that permits more than signing.
    """
    chosen = key_id or secrets.token_bytes(16)
    doing = f"generating the key '{sanitized(label)}'"
    tool = _own_tool(calls.module_path)
    with _writing(calls, doing, tool, "key-refused") as (_, token, session):
        _check_not_in_use(session, label, chosen)
        try:
            made = _pair(session, bits, label, chosen, always_authenticate=always_authenticate)
        except p11.PKCS11Error as exc:
            hint = tool
            if isinstance(exc, p11.KeySizeRange):
                hint = f"try another size (--bits 2048); {hint}"
            elif len(chosen) > _SHORT_ID and not isinstance(exc, _FINAL):
                hint = f"cards take ids of one or two bytes: try --id 01; {hint}"
            if always_authenticate:
                hint = f"try without --always-authenticate; {hint}"
            raise _refused(session, exc, doing, hint, "key-refused") from None
        _narrow(made[1])
        wrong = _differences(made[1], always_authenticate=always_authenticate)
        if wrong:
            uri = object_uri(token, made[1], "private")
            hint = tool
            if wrong == _UNKNOWN:
                hint += (
                    ". This device does not report whether keys are extractable: if its"
                    " documentation says that they are not, HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY=true"
                    " lets such a key sign"
                )
            raise DeviceError(
                f"{doing}: the device generated one that is {wrong}; {_destroyed(made, uri)}",
                hint=hint,
                code="key-too-able",
            )
        return object_uri(token, made[1], "private")


def keys(calls: Calls) -> tuple[KeyFacts, ...]:
    """As `Device.private_keys`."""
    with calls.writing("reading the keys", rw=False) as (module, _, session):
        found = cryptoki.find_objects(session, {Attribute.CLASS: ObjectClass.PRIVATE_KEY})
        return tuple(key_facts(module, session, found))


def store(
    calls: Calls,
    certificates: Iterable[tuple[bytes, str, bytes]],
    *,
    hint: str,
) -> Stored:
    """
    Write *certificates*, each as (DER, label, CKA_ID), the leaf first, and read them back.

    Those stored already, byte for byte, are not written again. DeviceError
    (``certificate-refused``, with *hint*) if the device refuses the first; if it refuses a later
    one, that is in `Stored.left`.
    """
    written: list[bytes] = []
    present: list[bytes] = []
    left: list[bytes] = []
    doing = "writing certificates"
    with _writing(calls, doing, hint, "certificate-refused") as (_, _, session):
        before = _stored_ders(session)
        for place, (der, label, key_id) in enumerate(certificates):
            if der in before:
                present.append(der)
                continue
            try:
                session.create_object(_template(der, label, key_id))
            except p11.PKCS11Error as exc:
                named = f"writing the certificate '{sanitized(label)}'"
                error = _refused(session, exc, named, hint, "certificate-refused")
                if place == 0:
                    raise error from None
                left.append(der)
            else:
                written.append(der)
        lost = before.union(written) - _stored_ders(session)
    if written and not lost:
        # The module may have returned cached objects: read them from the device again.
        calls.reinitialize_module()
        with calls.writing("reading the certificates back", rw=False) as (_, _, session):
            lost = before.union(written) - _stored_ders(session)
    kept = [der for der in written if der not in lost]
    return Stored(tuple(kept), tuple(present), tuple(left), tuple(lost))


@contextlib.contextmanager
def _writing(
    calls: Calls, doing: str, hint: str, code: str
) -> Iterator[tuple[Module, Token, Session]]:
    """`Calls.writing`, with *hint* and *code* for the error if the device refuses to write."""
    try:
        with calls.writing(doing) as opened:
            yield opened
    except DeviceError as exc:
        if not isinstance(exc.__cause__, p11.PKCS11Error) or away(exc.__cause__):
            raise
        raise DeviceError(str(exc), hint=hint, code=code) from exc.__cause__


def _refused(
    session: Session, exc: p11.PKCS11Error, doing: str, hint: str, code: str
) -> DeviceError:
    """
    The error for a refused write. Raises *exc* if the device is gone or has lost the session.
    """
    if away(exc):
        with contextlib.suppress(p11.PKCS11Error):
            # Some devices answer CKR_DEVICE_ERROR to a template that they refuse.
            session.token.slot.get_token()
            if isinstance(exc, p11.DeviceError):
                return DeviceError(_answer(doing, exc), hint=hint, code=code)
        raise exc
    return DeviceError(_answer(doing, exc), hint=hint, code=code)


def _answer(doing: str, exc: p11.PKCS11Error) -> str:
    return f"{doing}: the module answered {describe(exc)}"


def _own_tool(module: Path) -> str:
    maker = maker_of(module)
    named = f" ({maker.tool})" if maker and maker.tool else ""
    return (
        f"generate it with the device's own tool{named}: an RSA key of 2048 bits or more,"
        " sensitive, not extractable, permitted to sign; set HSMTOLL_HSM__KEY to its URI"
        " and continue with `hsmtoll key csr`"
    )


def _stored_ders(session: Session) -> set[bytes]:
    return {each.der for each in certificates_of(session) if each.der}


def _check_not_in_use(session: Session, label: str, key_id: bytes) -> None:
    taken: tuple[tuple[Attribute, str | bytes, str], ...] = (
        (Attribute.LABEL, label, f"label '{sanitized(label)}'"),
        (Attribute.ID, key_id, f"id {key_id.hex()}"),
    )
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        for name, value, words in taken:
            if cryptoki.find_by_value(session, kind, name, value):
                raise DeviceError(
                    f"generating the key '{sanitized(label)}': a key with the {words} exists",
                    hint="Nothing is overwritten: choose another label and id.",
                    code="key-exists",
                )


def _pair(
    session: Session, bits: int, label: str, key_id: bytes, *, always_authenticate: bool
) -> tuple[Object, Object]:
    """
    Public and private key, by the strictest template that the device accepts. PKCS11Error if it
    accepts none.
    """
    public, private = dict(_STRICT_PUBLIC), dict(_STRICT_PRIVATE)
    if always_authenticate:
        private[Attribute.ALWAYS_AUTHENTICATE] = True
    failures: list[p11.PKCS11Error] = []
    for names in _OMITTED_STEP_BY_STEP:
        for name in names:
            # Without DEFAULT, python-pkcs11 adds a value of its own.
            public[name] = private[name] = DEFAULT
        try:
            made: tuple[Object, Object] = session.generate_keypair(
                KeyType.RSA,
                bits,
                id=key_id,
                label=label,
                store=True,
                public_template=public,
                private_template=private,
            )
        except p11.PKCS11Error as exc:
            failures.append(exc)
            # Codes of `RETURN_CODES` are not about the template, except CKR_ACTION_PROHIBITED and
            # CKR_KEY_FUNCTION_NOT_PERMITTED.
            final = ckr_code(exc) in RETURN_CODES.keys() - {0x1B, 0x68}
            if final or isinstance(exc, _FINAL):
                break
            # Raises if the device is gone, or if the failed attempt has left a key behind.
            session.token.slot.get_token()
            _check_not_in_use(session, label, key_id)
        else:
            return made
    raise failures[0]


def _narrow(key: Object) -> None:
    """Remove other permissions than signing from the key, if the device permits that."""
    for name in _DENIED:
        if _flag(key, name):
            with contextlib.suppress(p11.PKCS11Error, AttributeError):
                key[name] = False


def _destroyed(made: Iterable[Object], uri: KeyUri) -> str:
    """Destroy the pair. Returns a clause for the error: whether that succeeded."""
    remaining = 0
    for each in made:
        try:
            each.destroy()
        except p11.PKCS11Error:
            remaining += 1
    if remaining:
        return (
            "it could not be destroyed and is still on the device: "
            f"delete {sanitized(uri)} with the device's own tool"
        )
    return "it was destroyed"


def _differences(key: Object, *, always_authenticate: bool) -> str:
    """
    The differences from the requested attributes, as text; empty if there are none. An unreadable
    SENSITIVE, SIGN or EXTRACTABLE is a difference.
    """
    found = {name: _flag(key, name) for name in (*_REQUIRED, *_DENIED)}
    wrong = [f"not {n.name.lower()}" for n in (Attribute.SENSITIVE, Attribute.SIGN) if not found[n]]
    if found[Attribute.EXTRACTABLE] is None:
        wrong.append(_UNKNOWN)
    elif found[Attribute.EXTRACTABLE]:
        wrong.append("extractable")
    wrong += [f"able to {name.name.lower()}" for name in _DENIED if found[name]]
    if always_authenticate and _flag(key, Attribute.ALWAYS_AUTHENTICATE) is not True:
        wrong.append("usable without a PIN for each signature")
    return ", ".join(wrong)


def _flag(key: Object, name: Attribute) -> bool | None:
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
