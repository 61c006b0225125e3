"""
A device with the PKCS#11 module in this process: find the token, log in, find the key, sign.

    call ── module ── token by URI ── login (PIN log) ── key by class + id/label
                                                           │
             signature, verified ◄── C_SignInit, C_Sign ◄── matched with its public key

All calls to the module are made with `PKCS11_LOCK` held. This process never has the value of a
private key, only handles.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from pkcs11 import Mechanism
from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError, HsmTollError, PinNotTried, foreign
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import (
    about_the_device,
    about_the_key_or_pin,
    knows_no_context_login,
    recoverable,
    said,
    translate_pkcs11_errors,
)
from hsmtoll.hsm.facts import Signature, StoredCertificate
from hsmtoll.hsm.login import SESSION_LIMIT_ERRORS, Handles, Login, PinLogin, pin_state_after
from hsmtoll.hsm.module import PKCS11_LOCK, current, loaded, opened, restart, restarted
from hsmtoll.hsm.reading import certificates_of, device_uri, login_key, named
from hsmtoll.hsm.recovery import MIN_RESTART_INTERVAL, SIGNING, CircuitBreaker, should_retry
from hsmtoll.hsm.select import KeySelector, on_others
from hsmtoll.hsm.signatures import SELF_TEST, Signable, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from pkcs11 import Session, Token

    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, Stored
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.hsm.pin_log import PinLog, TokenUser
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey, SigningInput
    from hsmtoll.signing.grant import Read

__all__ = ["InProcessDevice"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Ranges of seconds before the module is initialised again because it found no device at first.
#: In total longer than the concurrent logins of a server's workers take on a busy machine.
_START_DELAYS: Final = ((0.1, 0.5), (0.2, 1.0), (0.4, 2.0))
_HASHED: Final = {
    "RS256": Mechanism.SHA256_RSA_PKCS,
    "RS384": Mechanism.SHA384_RSA_PKCS,
    "RS512": Mechanism.SHA512_RSA_PKCS,
}
_HASHED_NAMES: Final = frozenset(each.name for each in _HASHED.values())

#: The fields of the tuple that `named` returns.
_IDENTITY_FIELDS: Final = ("manufacturer", "model", "serial", "label")


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
        rules: Callable[[Read], None] | None = None,
        back_off: bool = True,
        boot: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self.module_path = settings.module_path
        self.uri = settings.uri
        self._name = foreign(settings.uri)
        self._warned: set[str] = set()
        self._select = KeySelector(settings, warn=self._warn)
        self._login = PinLogin(
            settings, pin=pin, signing_pin=signing_pin, pin_log=pin_log, warn=self._warn
        )
        self._verifier = Verifier(self._name)
        self._rules = rules
        self._boot = boot
        self._sleep = sleep
        self._breaker = CircuitBreaker(settings.uri, boot=boot) if back_off else None
        self._openings = 0
        self._open: Handles | None = None
        self._shared: Login | None = None
        # The token that was used first; another one in its place is refused.
        self._first_identity: tuple[str, str, str, str] | None = None
        # This call has logged in again, because the device had ended the login.
        self._relogged_in = False
        # The device has no context-specific login.
        self._without_context_login = False

    def __repr__(self) -> str:
        return f"InProcessDevice({self._name})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """As `Device.generation`."""
        return self._openings + self._login.accepted

    @property
    def pin_state(self) -> str | None:
        """As `Device.pin_state`."""
        return self._login.pin_state

    @property
    def pin_accepted(self) -> bool:
        """As `Device.pin_accepted`."""
        login = self._shared
        return login is not None and login.anchor is not None and login.source == self._login.pin

    # ------------------------------------------------------------------ certificates, key, signing

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        """As `Device.certificates`."""

        def look(here: Handles) -> tuple[StoredCertificate, ...]:
            self._log_in(here, force=force_login)
            return self._stored(here, near=near)

        return self._ask("reading certificates", look)

    def log_in(self, *, force: bool = False) -> None:
        """Log in if the device requires it, or with *force* regardless of its flags."""
        self._ask("logging in", partial(self._log_in, force=force))

    def _log_in(self, here: Handles, *, force: bool) -> None:
        if force:
            self._login.force_log_in(here)
        else:
            self._login.log_in(here)

    def _stored(self, here: Handles, *, near: bool) -> tuple[StoredCertificate, ...]:
        try:
            return self._select.certificates(here.session, near=near)
        except p11.PKCS11Error as exc:
            if about_the_device(exc):
                raise
            # Raises if the device is gone. If only the search for certificates fails, that does
            # not matter as long as they are all in a file.
            here.token.slot.get_token()
            _log.info("reading certificates once more after: %s", said(exc))
        here.new_session()
        try:
            return self._select.certificates(here.session, near=near)
        except p11.PKCS11Error as exc:
            if about_the_device(exc):
                raise
            return (StoredCertificate(b"", "", b"", f"the search was answered {said(exc)}"),)

    def other_certificates(self) -> tuple[StoredCertificate, ...]:
        """As `Device.other_certificates`."""

        def certificates(session: Session) -> list[StoredCertificate]:
            where = str(device_uri(session.token))
            return [replace(each, label=where) for each in certificates_of(session)]

        def look(here: Handles) -> tuple[StoredCertificate, ...]:
            found = on_others(here.module, here.token, certificates)
            return tuple(each for some in found for each in some)

        return self._ask("reading certificates of other devices", look)

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """As `Device.key`."""
        return self._ask("looking for the key", partial(self._key, candidates=tuple(candidates)))

    def _key(self, here: Handles, candidates: tuple[RsaPublicKey, ...]) -> KeyFacts:
        self._login.log_in(here)
        if here.facts is not None and here.found_with is here.login.anchor:
            return here.facts
        found = self._select.keys(here.session)
        # Some tokens hide private keys before a login without CKF_LOGIN_REQUIRED.
        if not found and self._login.force_log_in(here):
            found = self._select.keys(here.session)
        if not found:
            raise self._select.missing(
                here.module, here.token, here.session, logged_in=here.login.there
            )
        here.key, here.facts = self._select.one(here.module, here.session, found, candidates)
        here.found_with = here.login.anchor
        return here.facts

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

    # ------------------------------------------------------------------ administration

    def generate(
        self, *, bits: int, label: str, key_id: bytes | None, always_authenticate: bool
    ) -> KeyUri:
        """As `hsmtoll.hsm.objects.generate`."""
        from hsmtoll.hsm import objects  # noqa: PLC0415 - it writes to this device

        return objects.generate(
            self, bits=bits, label=label, key_id=key_id, always_authenticate=always_authenticate
        )

    def private_keys(self) -> tuple[KeyFacts, ...]:
        """As `Device.private_keys`."""
        from hsmtoll.hsm import objects  # noqa: PLC0415 - as above

        return objects.keys(self)

    def store(self, certificates: tuple[tuple[bytes, str, bytes], ...], *, hint: str) -> Stored:
        """As `hsmtoll.hsm.objects.store`."""
        from hsmtoll.hsm import objects  # noqa: PLC0415 - as above

        return objects.store(self, certificates, hint=hint)

    def inspect(self, *, log_in: bool = True) -> ModuleFacts:
        """As `Device.inspect`."""
        from hsmtoll.hsm.inspect import inspect  # noqa: PLC0415 - it opens such devices itself

        return inspect(
            self.module_path,
            pin_log=self._login.pin_log,
            uri=self.uri,
            pin=self._login.pin if log_in else None,
            user_type=self._settings.user_type,
            lock_timeout=self._settings.deadline,
        )

    def token_users(self) -> tuple[TokenUser, ...]:
        """As `Device.token_users`."""
        from hsmtoll.hsm.inspect import token_users  # noqa: PLC0415 - as above

        return token_users(
            self.module_path,
            self.uri,
            user_type=self._settings.user_type,
            lock_timeout=self._settings.deadline,
        )

    @contextlib.contextmanager
    def writing(self, doing: str, *, rw: bool = True) -> Iterator[tuple[Module, Token, Session]]:
        """
        A session after login for `hsmtoll.hsm.objects`, read-write if *rw*. Afterwards the key is
        looked up again, as it may have changed.
        """
        # Recover from failures now: a write is never repeated.
        self._ask(doing, self._login.log_in)
        with self._breaker_guard(doing), PKCS11_LOCK.held(self._settings.deadline):
            try:
                with translate_pkcs11_errors(f"{doing} ({self._name})"):
                    here = self._opened()
                    self._login.log_in(here)
                    session = self._read_write(here) if rw else here.session
                    try:
                        yield here.module, here.token, session
                    finally:
                        here.key = here.facts = None
                        if session is not here.session:
                            here.module.close(session)
                        elif rw:
                            self._discard_handles()
                            here.login.end()
            except BaseException:
                self._discard_handles()
                raise

    def _read_write(self, here: Handles) -> Session:
        """A read-write session; if the device permits no further one, it is the login's."""
        try:
            return here.token.open(rw=True)
        except SESSION_LIMIT_ERRORS:
            here.login.release(here.session)
            here.login.end()
        self._login.log_in(here, rw=True)
        here.session = here.login.anchor or here.token.open(rw=True)
        return here.session

    def reinitialize_module(self) -> None:
        """
        For `hsmtoll.hsm.objects`: discard the module's caches, so that the next read comes from the
        device. Does nothing if another device would lose its login, or if the user would have to
        enter the PIN again.
        """
        with PKCS11_LOCK.held(self._settings.deadline):
            login, module = self._shared, loaded(self.module_path)
            if login is None or module is None or len(login.users) > 1:
                return
            if login.logged_in_by_others or (
                login.there and (login.pin is None or login.pin.on_pinpad)
            ):
                return
            login.end()
            restarted(module, now=self._boot(), pause=0)

    def close(self) -> None:
        """Close the session; the last device on a token logs out."""
        with PKCS11_LOCK.held(self._settings.deadline):
            here, self._open = self._open, None
            login, self._shared = self._shared, None
            if here is not None:
                here.login.release(here.session)
            if login is not None:
                login.users.discard(self)
                if not login.users:
                    login.end()
                    login.pin = None

    # ------------------------------------------------------------------ one signature

    def _signed(self, wanted: Signable, offered: tuple[RsaPublicKey, ...]) -> Signature:
        def sign(here: Handles) -> Signature:
            facts = self._key(here, offered)
            if wanted.request_for is not None and facts.public is not None:
                wanted.check_request(facts.public)
            ways = _mechanisms(wanted.alg, facts.mechanisms)
            if here.login.raw and len(ways) > 1:
                ways = ways[1:]
            try:
                return Signature(self._sign_once(here, offered, wanted, ways[0]), facts.public)
            except p11.PKCS11Error as exc:
                if len(ways) < 2 or self._login.pin_outcome_unknown or about_the_key_or_pin(exc):
                    raise
                first = exc
            # The mechanism is listed, but only for verifying, or not for this key or data size.
            here.new_session()
            facts = self._key(here, offered)
            try:
                signature = self._sign_once(here, offered, wanted, ways[1])
            except p11.PKCS11Error as exc:
                spoken = about_the_key_or_pin(exc) or self._login.pin_outcome_unknown
                raise exc if spoken else first from None
            here.login.raw = True
            here.facts = replace(facts, mechanisms=facts.mechanisms - _HASHED_NAMES)
            return Signature(signature, facts.public)

        return self._ask(SIGNING, sign)

    def _sign_once(
        self,
        here: Handles,
        offered: tuple[RsaPublicKey, ...],
        wanted: Signable,
        mechanism: Mechanism,
    ) -> bytes:
        """Sign, with a context-specific login if the key or the settings require one."""
        facts, plain = self._key(here, offered), self._without_context_login
        own_pin = self._login.signing_pin is not None
        if not plain and (facts.always_authenticate or own_pin):
            try:
                return self._login.sign(here, wanted, mechanism)
            except p11.PKCS11Error as exc:
                if not knows_no_context_login(exc, told=facts.always_authenticate is True):
                    raise
            here.new_session()
            self._key(here, offered)
            plain = True
        try:
            data = wanted.input_for(mechanism)
            signed: bytes = cryptoki.able(here.key).sign(data, mechanism=mechanism)
        except p11.UserNotLoggedIn as exc:
            if not self._relogged_in or own_pin:
                raise
            raise DeviceError(
                f"signing: the module answered {said(exc)} right after a login: the key"
                f" {self._name} may want a PIN of its own",
                hint="Give it: HSMTOLL_HSM__SIGNING_PIN_FILE.",
                code="signing-pin",
            ) from exc
        self._without_context_login = plain
        return signed

    # ------------------------------------------------------------------ calls, and recovery

    def _breaker_guard(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return self._breaker.guard(doing) if self._breaker else contextlib.nullcontext()

    def _ask(self, doing: str, work: Callable[[Handles], _T]) -> _T:
        """
        Return the result of *work*, with automatic recovery. DeviceError (``device-down``) while
        the circuit breaker is open, which also counts the result.
        """
        with self._breaker_guard(doing), PKCS11_LOCK.held(self._settings.deadline):
            if self._breaker:
                # The breaker may have opened while this call waited for the lock.
                self._breaker.admit()
            self._login.pin_outcome_unknown = self._relogged_in = False
            steps = self._recovery_steps(loaded(self.module_path), old=self._open is not None)
            while True:
                try:
                    with translate_pkcs11_errors(f"{doing} ({self._name})"):
                        here = self._opened()
                        answer = work(here)
                        self._first_identity = self._first_identity or named(here.token)
                        return answer
                except HsmTollError as exc:
                    self._discard_handles()
                    if not should_retry(exc, steps):
                        self._login.pin_state = pin_state_after(exc) or self._login.pin_state
                        raise
                except BaseException:
                    self._discard_handles()
                    raise

    def _recovery_steps(
        self, there: Module | None, *, old: bool
    ) -> Iterator[Callable[[HsmTollError], bool]]:
        """
        The recovery steps of one call, in order. *there* is the module if it was loaded before the
        call, *old* whether the session was opened before it.
        """
        # A generator, because only failed calls need the steps.

        pauses = list(_START_DELAYS)

        def started_once_more(exc: HsmTollError) -> bool:
            # SoftHSM rewrites a token's file at each login, so a process that starts at that moment
            # reads half of it. Not after a login: that would have to be made again.
            login = self._shared
            made = login is not None and login.there and current(login.module)
            tried = self._login.pin_outcome_unknown or made
            if there is not None or tried or not recoverable(exc) or not pauses:
                return False
            if isinstance(exc, PinNotTried):
                # The PIN was sent, although not checked: repeat only once.
                del pauses[1:]
            self._sleep(random.uniform(*pauses.pop(0)))  # noqa: S311 - jitter, not a secret
            restart(self.module_path)
            return True

        def new_session(exc: HsmTollError) -> bool:
            # A missing key or permission needs a new login instead.
            needless = exc.code in ("key-missing", "not-logged-in")
            return old and self._may_help(exc) and not needless

        def new_login(exc: HsmTollError) -> bool:
            login = self._shared
            if login is None or not self._may_help(exc):
                return False
            if exc.code == "not-logged-in":
                # The device has ended the login, or requires one without CKF_LOGIN_REQUIRED.
                login.wanted = self._relogged_in = True
            elif not login.there:
                return False
            login.end()
            return True

        def module_started_again(exc: HsmTollError) -> bool:
            # Useless if the module was loaded for this very call.
            if there is None or not recoverable(exc):
                return False
            if self._shared is not None:
                self._shared.end()
            done = restarted(there, now=self._boot(), pause=MIN_RESTART_INTERVAL)
            # With an unknown login outcome this call must not log in again; the next one may.
            return done and not self._login.pin_outcome_unknown

        yield from (started_once_more for _ in _START_DELAYS)
        yield from (new_session, new_login, module_started_again)

    def _may_help(self, exc: HsmTollError) -> bool:
        # A PIN with an unknown outcome is not tried again by the same call.
        if self._login.pin_outcome_unknown:
            return False
        # After a lost login, private keys seem to be missing.
        lost = exc.code == "key-missing" and self._first_identity is not None
        others = self._shared is not None and len(self._shared.users) > 0
        ended = exc.code == "not-logged-in" and self._login.pin is not None
        return recoverable(exc) or (lost and not others) or ended

    def _opened(self) -> Handles:
        module = opened(self.module_path)
        here = self._open
        if here is not None and here.module is module:
            return here
        token = self._select.token(module)
        self._check_same_token(token)
        login = module.logins.setdefault(login_key(token), Login(module))
        before = self._shared
        if before is not None and before is not login and self._first_identity is not None:
            # The module was restarted: reuse the PIN that this device has accepted.
            login.pin, login.source = login.pin or before.pin, login.source or before.source
        self._open = Handles(module=module, token=token, login=login, session=login.session(token))
        self._shared = login
        login.users.add(self)
        self._openings += 1
        return self._open

    def _check_same_token(self, token: Token) -> None:
        """DeviceError (``device-changed``) if the token is not the one that was used before."""
        known, now = self._first_identity, named(token)
        if known is None or known == now:
            return
        changed = [
            each for each in zip(_IDENTITY_FIELDS, known, now, strict=True) if each[1] != each[2]
        ]
        # A field that is empty now was read while another process was writing it.
        half = any(was and not word for _, was, word in changed)
        told = ", ".join(
            f"{what} '{foreign(word)}', was '{foreign(was)}'" for what, was, word in changed
        )
        raise DeviceError(
            f"{self._name} is another device than before: {told}",
            hint="It was initialised anew, or exchanged. Start again to use it as it is.",
            code="device-changed",
            retryable=half,
        )

    def _discard_handles(self) -> None:
        here, self._open = self._open, None
        if here is None or not current(here.module):
            return
        here.login.release(here.session)
        here.login.users.discard(self)

    def _warn(self, code: str, text: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            _log.warning("%s: %s", code, text)


def _mechanisms(alg: str, there: frozenset[str]) -> list[Mechanism]:
    """The device's mechanisms for *alg*; first the one that includes the hash."""
    found = [each for each in (_HASHED[alg], Mechanism.RSA_PKCS) if each.name in there]
    if not found:
        raise DeviceError(
            f"the device can do neither {_HASHED[alg].name} nor RSA_PKCS: {alg} cannot be signed",
            hint="`hsmtoll objects` shows what the device can do.",
            code="mechanism",
        )
    return found
