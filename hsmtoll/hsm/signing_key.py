"""
One signature by the key of a device: the mechanism, the context-specific login, C_Sign.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pkcs11 import Mechanism
from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import about_the_key_or_pin, describe, knows_no_context_login
from hsmtoll.hsm.facts import Signature

if TYPE_CHECKING:
    from hsmtoll.hsm.connection import Handles
    from hsmtoll.hsm.login import PinLogin
    from hsmtoll.hsm.lookup import Lookup
    from hsmtoll.hsm.signatures import Signable
    from hsmtoll.jws import RsaPublicKey

__all__ = ["SigningKey"]

_HASHED: Final = {
    "RS256": Mechanism.SHA256_RSA_PKCS,
    "RS384": Mechanism.SHA384_RSA_PKCS,
    "RS512": Mechanism.SHA512_RSA_PKCS,
}
_HASHED_NAMES: Final = frozenset(each.name for each in _HASHED.values())


class SigningKey:
    """Signs with the key of *lookup*; *name* is the key's in errors."""

    def __init__(self, name: str, lookup: Lookup, pin_login: PinLogin) -> None:
        self._name = name
        self._lookup = lookup
        self._pin_login = pin_login
        # The device has no context-specific login.
        self._without_context_login = False

    def sign(
        self, handles: Handles, wanted: Signable, candidates: tuple[RsaPublicKey, ...]
    ) -> Signature:
        """Sign *wanted*. *by* of the result is the public key that the device shows."""
        facts = self._lookup.key(handles, candidates)
        if wanted.request_for is not None and facts.public is not None:
            wanted.check_request(facts.public)
        usable = _mechanisms(wanted.alg, facts.mechanisms)
        if handles.login.hash_here and len(usable) > 1:
            usable = usable[1:]
        try:
            return Signature(self._sign_once(handles, candidates, wanted, usable[0]), facts.public)
        except p11.PKCS11Error as exc:
            if len(usable) < 2 or self._is_final(exc):
                raise
            first = exc
        # The mechanism is listed, but only for verifying, or not for this key or data size.
        handles.new_session()
        facts = self._lookup.key(handles, candidates)
        try:
            signature = self._sign_once(handles, candidates, wanted, usable[1])
        except p11.PKCS11Error as exc:
            raise exc if self._is_final(exc) else first from None
        handles.login.hash_here = True
        handles.facts = replace(facts, mechanisms=facts.mechanisms - _HASHED_NAMES)
        return Signature(signature, facts.public)

    def _is_final(self, exc: p11.PKCS11Error) -> bool:
        """Whether another mechanism cannot help, or must not be tried."""
        return self._pin_login.pin_outcome_unknown or about_the_key_or_pin(exc)

    def _sign_once(
        self,
        handles: Handles,
        candidates: tuple[RsaPublicKey, ...],
        wanted: Signable,
        mechanism: Mechanism,
    ) -> bytes:
        """Sign, with a context-specific login if the key or the settings require one."""
        facts = self._lookup.key(handles, candidates)
        without_login = self._without_context_login
        own_pin = self._pin_login.signing_pin is not None
        if not without_login and (facts.always_authenticate or own_pin):
            try:
                return self._pin_login.sign(handles, wanted, mechanism)
            except p11.PKCS11Error as exc:
                if not knows_no_context_login(exc, required=facts.always_authenticate is True):
                    raise
            handles.new_session()
            self._lookup.key(handles, candidates)
            without_login = True
        try:
            data = wanted.input_for(mechanism)
            signed: bytes = cryptoki.with_sign(handles.key).sign(data, mechanism=mechanism)
        except p11.UserNotLoggedIn as exc:
            if not self._pin_login.relogged_in or own_pin:
                raise
            raise DeviceError(
                f"signing: the module answered {describe(exc)} right after a login: the key"
                f" {self._name} may require a PIN of its own",
                hint="Set HSMTOLL_HSM__SIGNING_PIN_FILE.",
                code="signing-pin",
            ) from exc
        self._without_context_login = without_login
        return signed


def _mechanisms(alg: str, listed: frozenset[str]) -> list[Mechanism]:
    """The device's mechanisms for *alg*; first the one that includes the hash."""
    found = [each for each in (_HASHED[alg], Mechanism.RSA_PKCS) if each.name in listed]
    if not found:
        raise DeviceError(
            f"the device can do neither {_HASHED[alg].name} nor RSA_PKCS: {alg} cannot be signed",
            hint="`hsmtoll objects` shows what the device can do.",
            code="mechanism",
        )
    return found
