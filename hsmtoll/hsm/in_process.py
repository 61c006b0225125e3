"""
The device whose module runs in this process: find it, log in, prove the key, sign with it.

    question ── module ── p11_token by URI ── login (ledger) ── key by class + id/label
                                                                  │
                  signature, verified ◄── C_SignInit, C_Sign ◄── proven by its public half

Everything that touches the module happens with `PKCS11_LOCK` held. A private key's value never
enters this process: only handles do.
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
from hsmtoll.hsm.login import NO_ROOM, Handles, Login, PinLogin, state_after
from hsmtoll.hsm.module import PKCS11_LOCK, current, loaded, opened, restart, restarted
from hsmtoll.hsm.reading import certificates_of, device_uri, login_key, named
from hsmtoll.hsm.recovery import RESTART_PAUSE, SIGNING, CircuitBreaker, should_retry
from hsmtoll.hsm.select import KeySelector, on_others
from hsmtoll.hsm.signatures import SELF_TEST, Signable, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import Self

    from pkcs11 import Session, Token

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

#: Seconds, from and to, before each new start of a module that found no device at its very start.
#: Together longer than the workers of a server need, on a busy machine, to log in side by side.
_START_PAUSES: Final = ((0.1, 0.5), (0.2, 1.0), (0.4, 2.0))
_HASHED: Final = {
    "RS256": Mechanism.SHA256_RSA_PKCS,
    "RS384": Mechanism.SHA384_RSA_PKCS,
    "RS512": Mechanism.SHA512_RSA_PKCS,
}
_HASHED_NAMES: Final = frozenset(each.name for each in _HASHED.values())

#: What `named` returns, in words.
_NAMES: Final = ("manufacturer", "model", "serial", "label")


class InProcessDevice:
    """
    As `hsmtoll.hsm.device.Device`, with the module in this process.

    A call waits at most *lock_timeout* seconds for its turn. After an error the handles are
    dropped; what a new session, a new login or a restart of the module cures is cured within the
    call, and a device that is not there when the module starts is looked for again, at most three
    times. *audience* is that of the grants to be signed, *rules* raise for other grants that are
    not to be. *back_off*: whether callers are told ``device-down`` where nothing helped; not in a
    worker, for which the other side does it. *boot* is a clock in seconds that never goes back.
    """

    def __init__(
        self,
        module_path: Path,
        uri: KeyUri,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None = None,
        pin_log: PinLog,
        public_key: RsaPublicKey | None = None,
        use_final_try: bool = False,
        allow_exportable_key: bool = False,
        user_type: int | None = None,
        audience: str | None = None,
        rules: Callable[[Read], None] | None = None,
        lock_timeout: float = 60.0,
        back_off: bool = True,
        boot: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.module_path = module_path
        self.uri = uri
        self._name = foreign(uri)
        self._warned: set[str] = set()
        self._select = KeySelector(
            uri,
            public_key=public_key,
            allow_exportable_key=allow_exportable_key,
            warn=self._warn,
        )
        self._login = PinLogin(
            uri,
            pin=pin,
            signing_pin=signing_pin,
            pin_log=pin_log,
            use_final_try=use_final_try,
            user_type=user_type,
            warn=self._warn,
        )
        self._verifier = Verifier(self._name)
        self._audience = audience
        self._rules = rules
        self._lock_timeout = lock_timeout
        self._boot = boot
        self._sleep = sleep
        self._breaker = CircuitBreaker(uri, boot=boot) if back_off else None
        self._openings = 0
        self._open: Handles | None = None
        self._shared: Login | None = None
        # Who answered the first question; another one is not taken in its place.
        self._known: tuple[str, str, str, str] | None = None
        # The login was made again for this call, because the device had ended it.
        self._logged_in_anew = False
        # The device has shown that it knows no PIN for a single signature.
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

    # ------------------------------------------------------------------ the three questions

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        """As `Device.certificates`."""

        def look(here: Handles) -> tuple[StoredCertificate, ...]:
            self._log_in(here, force=force_login)
            return self._stored(here, near=near)

        return self._ask("reading certificates", look)

    def log_in(self, *, force: bool = False) -> None:
        """Log in where the device wants it, or with *force* whatever its flags say."""
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
            # A device that is gone says so here. One whose certificates alone cannot be searched
            # does not matter where they are all in a file.
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
        """As `Device.elsewhere`."""

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
        # Some show private keys to nobody, and do not say that they want a login.
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
        As `sign`, for a caller in another process, who verifies what comes out of this one: *by*
        is the public half that the device shows.
        """
        wanted = Signable(alg, unsigned)
        wanted.check_grant(self._audience, self._rules)
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
            user_type=self._login.user_type,
            lock_timeout=self._lock_timeout,
        )

    def token_users(self) -> tuple[TokenUser, ...]:
        """As `Device.places`."""
        from hsmtoll.hsm.inspect import token_users  # noqa: PLC0415 - as above

        return token_users(
            self.module_path,
            self.uri,
            user_type=self._login.user_type,
            lock_timeout=self._lock_timeout,
        )

    @contextlib.contextmanager
    def writing(self, doing: str, *, rw: bool = True) -> Iterator[tuple[Module, Token, Session]]:
        """
        A session after login, read-write unless not *rw*, for `hsmtoll.hsm.objects`, until the
        end. What this device knows about its key is forgotten: it may be another one now.
        """
        # What a start anew cures is cured before anything is written: no write is made again.
        self._ask(doing, self._login.log_in)
        with self._admitted(doing), PKCS11_LOCK.held(self._lock_timeout):
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
                            self._drop()
                            here.login.end()
            except BaseException:
                self._drop()
                raise

    def _read_write(self, here: Handles) -> Session:
        """A session that writes; it is the only one, the login's, where the device wants that."""
        try:
            return here.token.open(rw=True)
        except NO_ROOM:
            here.login.give_back(here.session)
            here.login.end()
        self._login.log_in(here, rw=True)
        here.session = here.login.anchor or here.token.open(rw=True)
        return here.session

    def reinitialize_module(self) -> None:
        """
        For `hsmtoll.hsm.objects`: so that what is read next comes from the device. Nothing is done
        where somebody else would lose a login by it, or a person would have to log in again.
        """
        with PKCS11_LOCK.held(self._lock_timeout):
            login, module = self._shared, loaded(self.module_path)
            if login is None or module is None or len(login.users) > 1:
                return
            if login.by_others or (login.there and (login.pin is None or login.pin.on_pinpad)):
                return
            login.end()
            restarted(module, now=self._boot(), pause=0)

    def close(self) -> None:
        """Give the sessions back; the last device on a p11_token logs out."""
        with PKCS11_LOCK.held(self._lock_timeout):
            here, self._open = self._open, None
            login, self._shared = self._shared, None
            if here is not None:
                here.login.give_back(here.session)
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
                if len(ways) < 2 or self._login.undecided or about_the_key_or_pin(exc):
                    raise
                first = exc
            # Listed, but for verifying alone, or not for this key, or not for this much data.
            here.new_session()
            facts = self._key(here, offered)
            try:
                signature = self._sign_once(here, offered, wanted, ways[1])
            except p11.PKCS11Error as exc:
                spoken = about_the_key_or_pin(exc) or self._login.undecided
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
        """A signature, with a PIN of its own where the key, or the settings, want one."""
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
            if not self._logged_in_anew or own_pin:
                raise
            raise DeviceError(
                f"signing: the module answered {said(exc)} right after a login: the key"
                f" {self._name} may want a PIN of its own",
                hint="Give it: HSMTOLL_HSM__SIGNING_PIN_FILE.",
                code="signing-pin",
            ) from exc
        self._without_context_login = plain
        return signed

    # ------------------------------------------------------------------ asking, and recovery

    def _admitted(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return self._breaker.trying(doing) if self._breaker else contextlib.nullcontext()

    def _ask(self, doing: str, work: Callable[[Handles], _T]) -> _T:
        """
        What *work* returns, after whatever it takes to have the device answer. Not asked while
        the device is known to be down; what is said here is judged.
        """
        with self._admitted(doing), PKCS11_LOCK.held(self._lock_timeout):
            if self._breaker:
                # The one before may have found out while this one waited.
                self._breaker.admit()
            self._login.undecided = self._logged_in_anew = False
            steps = self._recovery_steps(loaded(self.module_path), old=self._open is not None)
            while True:
                try:
                    with translate_pkcs11_errors(f"{doing} ({self._name})"):
                        here = self._opened()
                        answer = work(here)
                        self._known = self._known or named(here.token)
                        return answer
                except HsmTollError as exc:
                    self._drop()
                    if not should_retry(exc, steps):
                        self._login.pin_state = state_after(exc) or self._login.pin_state
                        raise
                except BaseException:
                    self._drop()
                    raise

    def _recovery_steps(
        self, there: Module | None, *, old: bool
    ) -> Iterator[Callable[[HsmTollError], bool]]:
        """What may help a call that found the module *there*, with a session that is *old*."""
        # A generator, because what is in it is made for the calls that fail alone.

        pauses = list(_START_PAUSES)

        def started_once_more(exc: HsmTollError) -> bool:
            # SoftHSM rewrites the file of a device at each login: a process that starts at that
            # moment reads half of it. A login that was made is not made again for it.
            login = self._shared
            made = login is not None and login.there and current(login.module)
            tried = self._login.undecided or made
            if there is not None or tried or not recoverable(exc) or not pauses:
                return False
            if isinstance(exc, PinNotTried):
                # It was given the PIN, though it did not look at it: once more, and no more.
                del pauses[1:]
            self._sleep(random.uniform(*pauses.pop(0)))  # noqa: S311 - jitter, not a secret
            restart(self.module_path)
            return True

        def new_session(exc: HsmTollError) -> bool:
            # What is not seen, or not allowed, is a matter of the login.
            needless = exc.code in ("key-missing", "not-logged-in")
            return old and self._may_help(exc) and not needless

        def new_login(exc: HsmTollError) -> bool:
            login = self._shared
            if login is None or not self._may_help(exc):
                return False
            if exc.code == "not-logged-in":
                # The device has ended the login, or wants one that its flags do not speak of.
                login.wanted = self._logged_in_anew = True
            elif not login.there:
                return False
            login.end()
            return True

        def module_started_again(exc: HsmTollError) -> bool:
            # One that was loaded for this very call is as fresh as it gets.
            if there is None or not recoverable(exc):
                return False
            if self._shared is not None:
                self._shared.end()
            done = restarted(there, now=self._boot(), pause=RESTART_PAUSE)
            # After a login whose fate is unknown it is the next call that gains by it.
            return done and not self._login.undecided

        yield from (started_once_more for _ in _START_PAUSES)
        yield from (new_session, new_login, module_started_again)

    def _may_help(self, exc: HsmTollError) -> bool:
        # A PIN whose try has an unknown fate is not tried again for the same call.
        if self._login.undecided:
            return False
        # A login that the device has lost looks like a key that is not there.
        lost = exc.code == "key-missing" and self._known is not None
        others = self._shared is not None and len(self._shared.users) > 0
        ended = exc.code == "not-logged-in" and self._login.pin is not None
        return recoverable(exc) or (lost and not others) or ended

    def _opened(self) -> Handles:
        module = opened(self.module_path)
        here = self._open
        if here is not None and here.module is module:
            return here
        token = self._select.token(module)
        self._same(token)
        login = module.logins.setdefault(login_key(token), Login(module))
        before = self._shared
        if before is not None and before is not login and self._known is not None:
            # The module was started again: the PIN that this device took is still good.
            login.pin, login.source = login.pin or before.pin, login.source or before.source
        self._open = Handles(module=module, token=token, login=login, session=login.session(token))
        self._shared = login
        login.users.add(self)
        self._openings += 1
        return self._open

    def _same(self, token: Token) -> None:
        """Refuse a device that has taken the place of the one that was used before."""
        known, now = self._known, named(token)
        if known is None or known == now:
            return
        changed = [each for each in zip(_NAMES, known, now, strict=True) if each[1] != each[2]]
        # What was there and is empty now was read while another process wrote it.
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

    def _drop(self) -> None:
        here, self._open = self._open, None
        if here is None or not current(here.module):
            return
        here.login.give_back(here.session)
        here.login.users.discard(self)

    def _warn(self, code: str, text: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            _log.warning("%s: %s", code, text)


def _mechanisms(alg: str, there: frozenset[str]) -> list[Mechanism]:
    """The mechanisms for *alg* that the device lists: the one that hashes first."""
    found = [each for each in (_HASHED[alg], Mechanism.RSA_PKCS) if each.name in there]
    if not found:
        raise DeviceError(
            f"the device can do neither {_HASHED[alg].name} nor RSA_PKCS: {alg} cannot be signed",
            hint="`hsmtoll objects` shows what the device can do.",
            code="mechanism",
        )
    return found
