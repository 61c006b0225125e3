"""
Selects the token and the key that a URI names: objects by class with label or id; between several
keys by the public key. No match, several matches and a missing login are different errors, which
list the URIs of what was found.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pkcs11 import Attribute, ObjectClass, TokenFlag
from pkcs11 import exceptions as p11

from hsmtoll import der as ders
from hsmtoll.errors import ConfigurationError, DeviceError, sanitized
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import about_the_device, describe
from hsmtoll.hsm.cryptoki import Unreadable
from hsmtoll.hsm.reading import (
    certificates_of,
    device_facts,
    device_uri,
    display_name,
    id_of,
    key_facts,
    label_of,
    login_key,
    object_uri,
    read_certificate,
    read_label,
    strip_padding,
    unreadable_reason,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pkcs11 import Object, Session, Slot, Token

    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.facts import KeyFacts, StoredCertificate
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey

__all__ = ["KeySelector", "on_other_tokens"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_KEY: Final = ObjectClass.PRIVATE_KEY
_CERTIFICATE: Final = ObjectClass.CERTIFICATE
_SMALLEST_KEY: Final = 2048
#: On a device with more certificates, those that do not belong to the key are not read.
_MANY: Final = 32
#: Maximum number of objects named in an error.
_SHOWN: Final = 10


class KeySelector:
    """
    Selects the token and the key by the settings. *warn* is called with a code and a sentence.
    """

    def __init__(self, settings: DeviceSettings, *, warn: Callable[[str, str], None]) -> None:
        self._uri = settings.uri
        self._public_key = settings.public_key
        self._allow_exportable_key = settings.allow_exportable_key
        self._warn = warn

    def token(self, module: Module) -> Token:
        """
        The token that the URI names. DeviceError: ``device-missing`` if none matches,
        ``device-ambiguous`` if several do.
        """
        seen: list[tuple[Slot, Token]] = []
        broken: list[str] = []
        for slot, token in module.slots():
            if isinstance(token, p11.PKCS11Error):
                broken.append(f"slot {slot.slot_id} answers {describe(token)}")
            else:
                seen.append((slot, token))
        fitting = [
            (slot, token)
            for slot, token in seen
            if self._uri.matches(**device_facts(module, slot, token))
        ]
        # Uninitialised tokens have no label; they are selected only if no other one matches.
        ready = [found for found in fitting if found[1].flags & TokenFlag.TOKEN_INITIALIZED]
        fitting = ready or fitting
        if len(fitting) == 1:
            return fitting[0][1]
        listed = _distinguished(fitting or seen) + broken
        raise DeviceError(
            f"{'several devices fit' if fitting else 'no device fits'}"
            f" {sanitized(self._uri.device_only())}",
            hint=_list("Seen: ", listed, "no device at all"),
            code="device-ambiguous" if fitting else "device-missing",
            retryable=not fitting,
        )

    def keys(self, session: Session) -> list[Object]:
        """
        The private keys that match the URI. ConfigurationError (``uri``) if it names another type
        of object.
        """
        if self._uri.type not in {None, "private"}:
            raise ConfigurationError(
                f"{sanitized(self._uri)} names a {self._uri.type} object, not a private key",
                hint="leave 'type' out, or write type=private",
                code="uri",
            )
        return self._matching(session, _KEY)

    def certificates(self, session: Session, *, near: bool) -> tuple[StoredCertificate, ...]:
        """
        All certificates that are visible in *session*; with *near*, if there are many, only those
        with the label or id of the key, and their issuers, unless there are none.
        """
        if near:
            first = cryptoki.find_objects(session, {Attribute.CLASS: _CERTIFICATE}, most=_MANY + 1)
            if len(first) <= _MANY:
                return tuple(map(read_certificate, first))
            keys = self._matching(session, _KEY)[:_SHOWN]
            if found := _near(session, keys, self._uri):
                return tuple(found)
        return tuple(certificates_of(session))

    def choose_key(
        self,
        module: Module,
        session: Session,
        found: list[Object],
        candidates: tuple[RsaPublicKey, ...],
    ) -> tuple[Object, KeyFacts]:
        """
        The key of those *found* that has a public key of the settings or of *candidates*, and its
        attributes. DeviceError (``key-ambiguous``) if several remain, and those of `Device.key` for
        a key that cannot be used.
        """
        proven = (self._public_key,) if self._public_key else candidates
        # Without a public key to choose by, only those named in the error are read.
        facts = key_facts(module, session, found if proven else found[:_SHOWN])
        if len(found) > 1 and proven:
            fits = [n for n, fact in enumerate(facts) if fact.public in proven]
            found, facts = [found[n] for n in fits] or found, [facts[n] for n in fits] or facts
        if len(found) > 1:
            raise DeviceError(
                f"{len(found)} private keys fit {sanitized(self._uri)}",
                hint=_list("Name one by its id: ", [str(fact.uri) for fact in facts], ""),
                code="key-ambiguous",
            )
        return found[0], self._usable(facts[0])

    def missing_key_error(
        self, module: Module, token: Token, session: Session, *, logged_in: bool
    ) -> DeviceError:
        """The error if no key matches: ``not-logged-in`` or ``key-missing``."""
        # Without a login, private keys are invisible.
        if token.flags & TokenFlag.LOGIN_REQUIRED and not logged_in:
            return DeviceError(
                f"the key {sanitized(self._uri)} cannot be seen: there is no login to"
                f" {display_name(token)}",
                hint="Give the PIN: HSMTOLL_HSM__PIN_FILE or another source.",
                code="not-logged-in",
            )
        every = cryptoki.find_objects(session, {Attribute.CLASS: _KEY})
        problems = [why for key in every if (why := unreadable_reason(key))]
        seen = [str(object_uri(token, key, "private")) for key in every[:_SHOWN]]
        hint = _list("Private keys there: ", seen, "none", more=len(every) - len(seen))
        if problems:
            hint += f"\n{len(problems)} of them cannot be read: {sanitized(problems[0])}"
        if other := self._on_another(module, token):
            hint += f"\nAnother device of the module has a key of that name: {other}"
        return DeviceError(
            f"no private key fits {sanitized(self._uri)}", hint=hint, code="key-missing"
        )

    def _matching(self, session: Session, kind: ObjectClass) -> list[Object]:
        """
        The objects of the class *kind* that match the URI, found by label and id, or if there are
        none by reading all.
        """
        wanted: dict[Attribute, Any] = {Attribute.CLASS: kind}
        narrow = {
            name: value
            for name, value in ((Attribute.LABEL, self._uri.object), (Attribute.ID, self._uri.id))
            if value
        }
        if narrow:
            try:
                found = cryptoki.find_objects(session, wanted | narrow)
            except p11.PKCS11Error as exc:
                # A damaged object makes a search by value fail, but no other search.
                if about_the_device(exc):
                    raise
                found = []
            if found := [key for key in found if self._fits(key)]:
                return found
        return [key for key in cryptoki.find_objects(session, wanted) if self._fits(key)]

    def _fits(self, key: Object) -> bool:
        try:
            label, key_id = read_label(key), id_of(key)
        except Unreadable:
            return False
        return self._uri.matches(object=label, id=key_id)

    def _on_another(self, module: Module, token: Token) -> str | None:
        """The URI of another token with such a key, if that is visible without a login."""
        if not self._uri.names_object:
            return None

        def named(session: Session) -> str | None:
            there = any(self._matching(session, kind) for kind in (_KEY, ObjectClass.PUBLIC_KEY))
            return str(device_uri(session.token)) if there else None

        return next(filter(None, on_other_tokens(module, token, named)), None)

    def _usable(self, fact: KeyFacts) -> KeyFacts:
        name = sanitized(fact.uri)
        given = self._public_key
        if fact.key_type != "rsa":
            raise DeviceError(
                f"the key {name} is of type {fact.key_type}: Maskinporten takes RS256, RS384 and"
                " RS512, which need an RSA key",
                hint="Use an RSA key of 2048 bits or more, and a certificate for it.",
                code="key-type",
            )
        if given is not None and fact.public not in {None, given}:
            raise DeviceError(
                f"HSMTOLL_HSM__PUBLIC_KEY is not the public key of {name}",
                code="key-mismatch",
            )
        public = fact.public or given
        bits = public.bits if public else fact.bits
        if bits is not None and bits < _SMALLEST_KEY:
            raise DeviceError(
                f"the key {name} has {bits} bits: {_SMALLEST_KEY} are the minimum", code="key-size"
            )
        if fact.sign is False:
            raise DeviceError(f"the key {name} may not sign (CKA_SIGN is false)", code="key-sign")
        if not fact.protected and not self._allow_exportable_key:
            shown = f"SENSITIVE {_shown(fact.sensitive)}, EXTRACTABLE {_shown(fact.extractable)}"
            raise DeviceError(
                f"the device does not report the key {name} as not exportable ({shown})",
                hint="Generate a key on the device, or set HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY=true.",
                code="key-exportable",
            )
        warnings = []
        if not (fact.never_extractable and fact.local):
            warnings.append("key-imported")
            self._warn("key-imported", f"the key {name} was, or may have been, outside the device")
        return replace(fact, public=public, bits=bits, warnings=tuple(warnings))


def on_other_tokens(module: Module, token: Token, ask: Callable[[Session], _T]) -> Iterator[_T]:
    """
    The results of *ask* for the module's other tokens, without a login; tokens that fail are
    skipped.
    """
    for _, other in module.slots():
        if isinstance(other, p11.PKCS11Error) or login_key(other) == login_key(token):
            continue
        session = None
        try:
            session = other.open()
            yield ask(session)
        except p11.PKCS11Error as exc:
            _log.info("%s is skipped: %s", display_name(other), describe(exc))
        finally:
            module.close(session)


def _near(session: Session, keys: Iterable[Object], uri: KeyUri) -> list[StoredCertificate]:
    """
    The certificates with an id or a label of *keys* or of *uri*, and their issuers that are found
    by CKA_SUBJECT.
    """
    names = {(Attribute.LABEL, uri.object), (Attribute.ID, uri.id)}
    for key in keys:
        names |= {(Attribute.LABEL, label_of(key)), (Attribute.ID, id_of(key))}
    wanted = [name for name in names if name[1]]
    found: dict[int | None, StoredCertificate] = {}
    searched = set(wanted)
    while wanted:
        for thing in cryptoki.find_by_value(session, _CERTIFICATE, *wanted.pop()):
            if thing.handle in found:
                continue
            found[thing.handle] = one = read_certificate(thing)
            with contextlib.suppress(ValueError):
                issuer = (Attribute.SUBJECT, ders.certificate_fields(one.der).issuer)
                if issuer not in searched:
                    searched.add(issuer)
                    wanted.append(issuer)
    return list(found.values())


def _distinguished(devices: list[tuple[Slot, Token]]) -> list[str]:
    """Their URIs, with the slot's description or number if the URIs would be equal."""
    uris = [device_uri(token) for _, token in devices]
    described = [
        replace(uri, slot_description=strip_padding(slot.slot_description))
        if uris.count(uri) > 1
        else uri
        for uri, (slot, _) in zip(uris, devices, strict=True)
    ]
    return [
        str(replace(uri, slot_id=slot.slot_id) if described.count(uri) > 1 else uri)
        for uri, (slot, _) in zip(described, devices, strict=True)
    ]


def _shown(value: bool | None) -> str:
    return "unknown" if value is None else str(value).lower()


def _list(before: str, names: list[str], none: str, *, more: int = 0) -> str:
    shown = [sanitized(name) for name in names[:_SHOWN]]
    more += len(names) - len(shown)
    return before + ("\n".join(shown + ([f"… and {more} more"] if more else [])) or none)
