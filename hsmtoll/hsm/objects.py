"""
What is written to a device: a key pair made there, and certificates beside it.

Read-write sessions live here and nowhere else. A private key's value never enters.
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
from hsmtoll.errors import DeviceError, foreign
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.answers import ANSWERS
from hsmtoll.hsm.codes import away, number, said
from hsmtoll.hsm.facts import Stored
from hsmtoll.hsm.makers import maker_of
from hsmtoll.hsm.reading import certificates_of, key_facts, object_uri

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pkcs11 import Object, Session, Token

    from hsmtoll.hsm.calls import Calls
    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.uri import KeyUri

__all__ = ["generate", "keys", "store"]

#: What the private key shall be.
_KEPT: Final = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.SIGN: True}
#: What it shall not be able to do. SIGN_RECOVER is a signature, too.
_DENIED: Final = (Attribute.DECRYPT, Attribute.UNWRAP, Attribute.DERIVE)
_STRICT_PRIVATE: Final[dict[Attribute, Any]] = {
    **_KEPT,
    **dict.fromkeys((*_DENIED, Attribute.SIGN_RECOVER), False),
}
_STRICT_PUBLIC: Final[dict[Attribute, Any]] = {
    Attribute.VERIFY: True,
    **dict.fromkeys((Attribute.ENCRYPT, Attribute.WRAP, Attribute.VERIFY_RECOVER), False),
}
#: What devices do not let a template say, left out group after group: from strict to plain.
_LEFT_OUT: Final = (
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
#: Answers about the device, the login or the action as a whole: no other template helps.
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
#: What a key is whose CKA_EXTRACTABLE the device does not show.
_UNKNOWN: Final = "of unknown extractability"
#: Bytes of a CKA_ID that every card takes.
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
    A new RSA key pair on the device: sensitive, not extractable, for signing and nothing else.

    *key_id* None is a random one. What the device made is read back, and destroyed where it
    is not what was asked for. Raises DeviceError: ``key-exists`` for a label or id that is
    taken, ``key-refused`` where the device makes none for a program, ``key-too-able`` for a key
    that can do more than sign.
    """
    chosen = key_id or secrets.token_bytes(16)
    doing = f"generating the key '{foreign(label)}'"
    tool = _own_tool(calls.module_path)
    with _writing(calls, doing, tool, "key-refused") as (_, token, session):
        _refuse_taken(session, label, chosen)
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
        wrong = _wrong(made[1], always_authenticate=always_authenticate)
        if wrong:
            uri = object_uri(token, made[1], "private")
            hint = tool
            if wrong == _UNKNOWN:
                hint += (
                    ". This device does not say whether keys can be taken out of it: where its"
                    " documentation says that they cannot, HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY=true"
                    " lets such a key sign"
                )
            raise DeviceError(
                f"{doing}: the device made one that is {wrong}; {_destroyed(made, uri)}",
                hint=hint,
                code="key-too-able",
            )
        return object_uri(token, made[1], "private")


def keys(calls: Calls) -> tuple[KeyFacts, ...]:
    """What the device says about each of its private keys, after login."""
    with calls.writing("reading the keys", rw=False) as (module, _, session):
        found = cryptoki.found(session, {Attribute.CLASS: ObjectClass.PRIVATE_KEY})
        return tuple(key_facts(module, session, found))


def store(
    calls: Calls,
    certificates: Iterable[tuple[bytes, str, bytes]],
    *,
    hint: str,
) -> Stored:
    """
    Write certificates, given as (DER, label, CKA_ID), the leaf first, and read them back.

    What is there already, byte for byte, is left alone. Only the first must find room: what
    the device refuses after it is *left*. Raises DeviceError (``certificate-refused``) for the
    first, with *hint*.
    """
    written: list[bytes] = []
    present: list[bytes] = []
    left: list[bytes] = []
    doing = "writing certificates"
    with _writing(calls, doing, hint, "certificate-refused") as (_, _, session):
        before = _there(session)
        for place, (der, label, key_id) in enumerate(certificates):
            if der in before:
                present.append(der)
                continue
            try:
                session.create_object(_template(der, label, key_id))
            except p11.PKCS11Error as exc:
                named = f"writing the certificate '{foreign(label)}'"
                error = _refused(session, exc, named, hint, "certificate-refused")
                if place == 0:
                    raise error from None
                left.append(der)
            else:
                written.append(der)
        lost = before.union(written) - _there(session)
    if written and not lost:
        # A module may show what it has in memory: the device's own word is asked for.
        calls.reinitialize_module()
        with calls.writing("reading the certificates back", rw=False) as (_, _, session):
            lost = before.union(written) - _there(session)
    kept = [der for der in written if der not in lost]
    return Stored(tuple(kept), tuple(present), tuple(left), tuple(lost))


@contextlib.contextmanager
def _writing(
    calls: Calls, doing: str, hint: str, code: str
) -> Iterator[tuple[Module, Token, Session]]:
    """`Calls.writing`, where a refusal to write at all gets *hint* and *code*."""
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
    The error for what the device refused to write. Raises *exc* where the device is not there, or
    has lost the session.
    """
    if away(exc):
        with contextlib.suppress(p11.PKCS11Error):
            # Some say "device error" to what they do not like.
            session.token.slot.get_token()
            if isinstance(exc, p11.DeviceError):
                return DeviceError(_answer(doing, exc), hint=hint, code=code)
        raise exc
    return DeviceError(_answer(doing, exc), hint=hint, code=code)


def _answer(doing: str, exc: p11.PKCS11Error) -> str:
    return f"{doing}: the module answered {said(exc)}"


def _own_tool(module: Path) -> str:
    maker = maker_of(module)
    named = f" ({maker.tool})" if maker and maker.tool else ""
    return (
        f"make it with the device's own tool{named}: an RSA key of 2048 bits or more that is"
        " sensitive, not extractable and may sign; name it in HSMTOLL_HSM__KEY, and go on with"
        " `hsmtoll key csr`"
    )


def _there(session: Session) -> set[bytes]:
    return {each.der for each in certificates_of(session) if each.der}


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
    session: Session, bits: int, label: str, key_id: bytes, *, always_authenticate: bool
) -> tuple[Object, Object]:
    """The pair, by the strictest template that the device takes. PKCS11Error if it takes none."""
    public, private = dict(_STRICT_PUBLIC), dict(_STRICT_PRIVATE)
    if always_authenticate:
        private[Attribute.ALWAYS_AUTHENTICATE] = True
    failures: list[p11.PKCS11Error] = []
    for names in _LEFT_OUT:
        for name in names:
            # Without it python-pkcs11 puts in a value of its own.
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
            # Codes that have a meaning of their own are about no template either, but for two.
            numbered = number(exc) in ANSWERS.keys() - {0x1B, 0x68}
            if numbered or isinstance(exc, _FINAL):
                break
            # One that failed in its middle may have left a key; a device that is away says so.
            session.token.slot.get_token()
            _refuse_taken(session, label, key_id)
        else:
            return made
    raise failures[0]


def _narrow(key: Object) -> None:
    """Take away what the key can do besides signing, where the device lets it be taken away."""
    for name in _DENIED:
        if _told(key, name):
            with contextlib.suppress(p11.PKCS11Error, AttributeError):
                key[name] = False


def _destroyed(made: Iterable[Object], uri: KeyUri) -> str:
    """Destroy a pair that nobody wants; what became of it, in words."""
    there = 0
    for each in made:
        try:
            each.destroy()
        except p11.PKCS11Error:
            there += 1
    if there:
        return (
            f"it could not be destroyed and is still on the device: delete {foreign(uri)} with the"
            " device's own tool"
        )
    return "it was destroyed"


def _wrong(key: Object, *, always_authenticate: bool) -> str:
    """What is not as asked for, in words; empty if all is. Unreadable counts as wrong for two."""
    told = {name: _told(key, name) for name in (*_KEPT, *_DENIED)}
    wrong = [f"not {n.name.lower()}" for n in (Attribute.SENSITIVE, Attribute.SIGN) if not told[n]]
    if told[Attribute.EXTRACTABLE] is None:
        wrong.append(_UNKNOWN)
    elif told[Attribute.EXTRACTABLE]:
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
