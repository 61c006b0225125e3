"""
A device with the PKCS#11 module in this process.

    Calls ──► Connection           module, token by URI, session        (calls, connection)
      │
      └─────► Lookup               login (PIN log), certificates, key   (lookup, login, select)
              SigningKey           C_SignInit, C_Sign                   (signing_key)
              Verifier             the signature, with the public key   (signatures)

All calls to the module are made with `PKCS11_LOCK` held. This process never has the value of a
private key, only handles.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from hsmtoll.errors import HsmTollError, sanitized
from hsmtoll.hsm import objects
from hsmtoll.hsm.calls import Calls
from hsmtoll.hsm.connection import Connection
from hsmtoll.hsm.inspect import module_facts, token_users
from hsmtoll.hsm.login import PinLogin
from hsmtoll.hsm.lookup import Lookup
from hsmtoll.hsm.module import PKCS11_LOCK
from hsmtoll.hsm.recovery import SIGNING, CircuitBreaker
from hsmtoll.hsm.select import KeySelector
from hsmtoll.hsm.signatures import SELF_TEST, Signable, Verifier
from hsmtoll.hsm.signing_key import SigningKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, Signature, Stored, StoredCertificate
    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.hsm.pin_log import PinLog, TokenUser
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey, SigningInput
    from hsmtoll.signing.grant import ParsedGrant

__all__ = ["InProcessDevice"]

_log = logging.getLogger(__name__)


class InProcessDevice:
    """
    As `hsmtoll.hsm.device.Device`, with the module in this process.

    After an error a call discards its handles and tries again with a new session, a new login, and
    a restarted module, in this order. If a module finds no device when it is first initialised,
    that is repeated, at most three times. *rules* raise for grants that must not be signed.
    *back_off*: use a circuit breaker (``device-down``); not in a worker, whose parent has one.
    *boot* is a monotonic clock in seconds.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None = None,
        pin_log: PinLog,
        rules: Callable[[ParsedGrant], None] | None = None,
        back_off: bool = True,
        boot: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.uri = settings.uri
        self._settings = settings
        self._name = sanitized(settings.uri)
        self._rules = rules
        self._warned: set[str] = set()
        selector = KeySelector(settings, warn=self._warn)
        self._pin_login = PinLogin(
            settings, pin=pin, signing_pin=signing_pin, pin_log=pin_log, warn=self._warn
        )
        self._connection = Connection(settings, selector)
        self._lookup = Lookup(selector, self._pin_login)
        self._signing_key = SigningKey(self._name, self._lookup, self._pin_login)
        self._verifier = Verifier(self._name)
        self._calls = Calls(
            settings,
            self._connection,
            self._pin_login,
            breaker=CircuitBreaker(settings.uri, boot=boot) if back_off else None,
            boot=boot,
            sleep=sleep,
        )

    def __repr__(self) -> str:
        return f"InProcessDevice({self._name})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """As `Device.generation`."""
        return self._connection.openings + self._pin_login.accepted

    @property
    def pin_state(self) -> str | None:
        """As `Device.pin_state`."""
        return self._pin_login.pin_state

    @property
    def pin_accepted(self) -> bool:
        """As `Device.pin_accepted`."""
        login = self._connection.login
        return (
            login is not None and login.anchor is not None and login.source == self._pin_login.pin
        )

    # ------------------------------------------------------------------ certificates, key, signing

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        """As `Device.certificates`."""
        work = partial(self._lookup.certificates, near=near, force_login=force_login)
        return self._calls.run("reading certificates", work)

    def other_certificates(self) -> tuple[StoredCertificate, ...]:
        """As `Device.other_certificates`."""
        doing = "reading certificates of other devices"
        return self._calls.run(doing, self._lookup.other_certificates)

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """As `Device.key`."""
        work = partial(self._lookup.key, candidates=tuple(candidates))
        return self._calls.run("looking for the key", work)

    def sign(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> Signature:
        """As `Device.sign`."""
        offered = tuple(candidates)
        made = self.unverified(alg, unsigned, candidates=offered)
        return self._verifier.verified(alg, unsigned, made, offered)

    def unverified(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> Signature:
        """
        As `sign`, without verification: the parent process verifies. *by* of the result is the
        public key that the device shows.
        """
        wanted = Signable(alg, unsigned)
        wanted.check_grant(self._settings.audience, self._rules)
        return self._signed(wanted, tuple(candidates))

    def self_test(
        self, alg: str, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> RsaPublicKey | None:
        """As `Device.self_test`."""
        offered = tuple(candidates)
        made = self._signed(Signable(alg, SELF_TEST), offered)
        return self._verifier.verified(alg, SELF_TEST, made, offered).by

    def sign_request(self, alg: str, info: bytes, *, public: RsaPublicKey) -> bytes:
        """As `Device.sign_request`."""
        made = self._signed(Signable(alg, info, request_for=public), (public,))
        return self._verifier.verified(alg, info, made, (public,)).value

    def _signed(self, wanted: Signable, candidates: tuple[RsaPublicKey, ...]) -> Signature:
        work = partial(self._signing_key.sign, wanted=wanted, candidates=candidates)
        return self._calls.run(SIGNING, work)

    # ------------------------------------------------------------------ administration

    def generate(
        self, *, bits: int, label: str, key_id: bytes | None, always_authenticate: bool
    ) -> KeyUri:
        """As `Device.generate`."""
        return objects.generate(
            self._calls,
            bits=bits,
            label=label,
            key_id=key_id,
            always_authenticate=always_authenticate,
        )

    def private_keys(self) -> tuple[KeyFacts, ...]:
        """As `Device.private_keys`."""
        return objects.keys(self._calls)

    def store(self, certificates: tuple[tuple[bytes, str, bytes], ...], *, hint: str) -> Stored:
        """As `Device.store`."""
        return objects.store(self._calls, certificates, hint=hint)

    def inspect(self, *, log_in: bool = True) -> ModuleFacts:
        """As `Device.inspect`."""
        with PKCS11_LOCK.held(self._settings.deadline):
            problem = self._login_problem() if log_in else None
            # After the login, which restarts a module that has read a half-written token.
            return module_facts(
                self._settings.module_path, self.uri, self._pin_login.pin_log, problem
            )

    def _login_problem(self) -> HsmTollError | None:
        """Log in. Returns the error if that fails; None as well if there is no PIN."""
        if self._pin_login.pin is None:
            return None
        try:
            # Some tokens hide private keys, although they do not require a login.
            self._calls.run("logging in", self._pin_login.force_log_in)
        except HsmTollError as exc:
            return exc
        return None

    def token_users(self) -> tuple[TokenUser, ...]:
        """As `Device.token_users`."""
        with PKCS11_LOCK.held(self._settings.deadline):
            return token_users(self._settings)

    def close(self) -> None:
        """Close the session; the last device on a token logs out."""
        self._calls.close()

    def _warn(self, code: str, text: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            _log.warning("%s: %s", code, text)
