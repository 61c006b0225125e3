"""
One key on one p11_token: find it, log in, prove it, sign with it.

    Device ── opened(module) ── p11_token by URI ── login (ledger) ── key by class + id/label
                                                                        │
                       signature, verified ◄── C_SignInit, C_Sign ◄── proven by its public half

Everything that touches the module happens with `GATE` held. A private key's value never
enters this room: only handles do.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakSet

from pkcs11 import PROTECTED_AUTH, Attribute, KeyType, Mechanism, ObjectClass, TokenFlag
from pkcs11 import exceptions as p11

from hsmtoll.errors import ConfigurationError, DeviceError, HsmTollError, PinNotTried, foreign
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import (
    REFUSED,
    about_the_device,
    about_the_key_or_pin,
    knows_no_context_login,
    recoverable,
    said,
    speaking,
    translated,
    untried,
)
from hsmtoll.hsm.cryptoki import Unreadable
from hsmtoll.hsm.ledger import Ledger, Page, Place
from hsmtoll.hsm.module import GATE, Module, current, loaded, opened, restart, restarted
from hsmtoll.hsm.recovery import RESTART_PAUSE, SIGNING, Breaker, mended
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import ALGS, RsaPublicKey, SigningInput, digest_info
from hsmtoll.x509 import der as ders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from pkcs11 import Object, Session, Slot, Token

    from hsmtoll.hsm.pin import Pin, PinSource

__all__ = ["Device", "KeyFacts", "StoredCertificate"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_LARGEST_CERTIFICATE: Final = 65536
#: What is signed to see that a device works: no grant, always the same, and as large as a grant
#: with x5c, because there are mechanisms that take less.
SELF_TEST: Final = SigningInput(b"hsmtoll self-test, not a grant".ljust(9216))

#: Seconds, from and to, before each new start of a module that found no device at its very start.
#: Together longer than the workers of a server need, on a busy machine, to log in side by side.
_START_PAUSES: Final = ((0.1, 0.5), (0.2, 1.0), (0.4, 2.0))
_SMALLEST_KEY: Final = 2048
# What C_SignInit and C_Sign say about the key, the mechanism or the data, and none to a PIN.
_OF_THE_SIGNATURE: Final = (
    p11.DataInvalid,
    p11.DataLenRange,
    p11.DeviceMemory,
    p11.KeyHandleInvalid,
    p11.KeySizeRange,
    p11.KeyTypeInconsistent,
    p11.MechanismInvalid,
    p11.MechanismParamInvalid,
)
#: There are devices that have one session, or let nobody read while somebody writes.
_NO_ROOM: Final = (
    p11.SessionCount,
    p11.SessionExists,
    p11.SessionReadOnlyExists,
    p11.SessionReadWriteSOExists,
)
_KEY: Final = ObjectClass.PRIVATE_KEY
_CERTIFICATE: Final = ObjectClass.CERTIFICATE
#: With more certificates on a device than this, those of other keys are left unread.
_MANY: Final = 32
#: How many objects a message names.
_SHOWN: Final = 10
#: What the maker of a module, or of a device, begins with where the PIN's flags are kept.
_KEEPS_FLAGS: Final = ("SoftHSM", "OpenSC", "IBM")
_HASHED: Final = {
    "RS256": Mechanism.SHA256_RSA_PKCS,
    "RS384": Mechanism.SHA384_RSA_PKCS,
    "RS512": Mechanism.SHA512_RSA_PKCS,
}
_HASHED_NAMES: Final = frozenset(each.name for each in _HASHED.values())


_PIN_FLAGS: Final = {
    TokenFlag.USER_PIN_LOCKED: "locked",
    TokenFlag.USER_PIN_FINAL_TRY: "final-try",
    TokenFlag.USER_PIN_COUNT_LOW: "count-low",
    TokenFlag.USER_PIN_TO_BE_CHANGED: "to-be-changed",
}


def user_name(user_type: int | None) -> str:
    """What the log of PINs calls a user of a device."""
    return "user" if user_type is None else f"user {user_type:#x}"


def pin_state(flags: TokenFlag) -> str:
    """The worst of ``ok count-low to-be-changed final-try locked``, or ``unset``."""
    if not flags & TokenFlag.USER_PIN_INITIALIZED:
        return "unset"
    return next((word for flag, word in _PIN_FLAGS.items() if flags & flag), "ok")


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """
    A certificate object: its DER, CKA_LABEL and CKA_ID as the device gives them. *problem* is why
    it cannot be read, and then *der* is empty.
    """

    der: bytes
    label: str
    id: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """
    What the module reports about a private key; nothing of it is proven but *public*, where a
    signature was checked. None means that the device does not say. *bits* is the modulus' size.
    """

    uri: KeyUri
    label: str
    id: bytes
    key_type: str
    bits: int | None
    public: RsaPublicKey | None
    sensitive: bool | None
    always_sensitive: bool | None
    extractable: bool | None
    never_extractable: bool | None
    local: bool | None
    sign: bool | None
    always_authenticate: bool | None
    mechanisms: frozenset[str]
    token_label: str
    manufacturer: str
    model: str
    serial: str
    firmware: tuple[int, int]
    library_manufacturer: str
    library_description: str
    library_version: tuple[int, int]
    warnings: tuple[str, ...] = ()

    @property
    def protected(self) -> bool:
        """Whether the device says that the key cannot be taken out of it."""
        return self.sensitive is True and self.extractable is False


@dataclass(slots=True, eq=False)
class Login:
    """What this process holds on one p11_token, shared by all Devices on it."""

    module: Module
    anchor: Session | None = None
    by_others: bool = False
    pin: Pin | None = field(default=None, repr=False)
    source: PinSource | None = field(default=None, repr=False)
    users: WeakSet[Device] = field(default_factory=WeakSet)
    #: The device wants a login, although its flags do not say so.
    wanted: bool = False
    #: It does not take a whole assertion with the hashing mechanism: the digest is made here.
    raw: bool = False

    @property
    def there(self) -> bool:
        return self.anchor is not None or self.by_others

    def end(self) -> None:
        """Log out: every session of the process on this p11_token loses its private keys."""
        self.module.close(self.anchor)
        self.anchor, self.by_others = None, False

    def session(self, token: Token) -> Session:
        """A session for one's own use, or the login's where the device has room for no other."""
        try:
            return token.open()
        except _NO_ROOM:
            if self.anchor is None:
                raise
            return self.anchor

    def give_back(self, session: Session) -> None:
        """Close what `session` returned, unless it is the login's."""
        if session is not self.anchor:
            self.module.close(session)

    def alive(self) -> bool:
        """Whether a restart of the module would take a login away that serves somebody."""
        if self.anchor is None:
            return self.by_others
        try:
            self.anchor.token.slot.get_token()
            # What is asked for is not there: it costs the same on a device full of objects.
            cryptoki.found(
                self.anchor, {Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: "hsmtoll"}
            )
        except p11.PKCS11Error:
            return False
        return True


@dataclass(slots=True, eq=False)
class _Open:
    """One Device's own handles. They are void when the module or the anchor is another one."""

    module: Module
    token: Token
    login: Login
    session: Session
    key: Object | None = None
    found_with: Session | None = None
    facts: KeyFacts | None = None


class Device:
    """
    A signing key behind a PKCS#11 module.

    Nothing is opened before the first call. Every method may be called from any thread; it
    waits at most *lock_timeout* seconds for its turn. After an error the handles are dropped;
    what a new session, a new login or a restart of the module cures is cured within the call,
    and a device that is not there when the module starts is looked for again, at most three times.
    Where nothing helps, the next callers are told ``device-down`` at once for a while
    (`hsmtoll.hsm.recovery`). *boot* is a clock in seconds that never goes back.
    """

    def __init__(
        self,
        module_path: Path,
        uri: KeyUri,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None = None,
        ledger: Ledger,
        public_key: RsaPublicKey | None = None,
        use_final_try: bool = False,
        allow_exportable_key: bool = False,
        user_type: int | None = None,
        lock_timeout: float = 60.0,
        boot: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.module_path = module_path
        self.uri = uri
        self._name = foreign(uri)
        self._pin = pin
        self._signing_pin = signing_pin if signing_pin is not pin else None
        self._ledger = ledger
        self._public_key = public_key
        self._use_final_try = use_final_try
        self._allow_exportable_key = allow_exportable_key
        #: Whose PIN it is at the device; ``None`` is CKU_USER.
        self.user_type = user_type
        self._lock_timeout = lock_timeout
        self._boot = boot
        self._sleep = sleep
        self._breaker = Breaker(uri, boot=boot)
        #: Goes up when the handles are new: what was read before may be out of date then.
        self.generation = 0
        #: The PIN's state as the device reported it at the last login; None before one.
        self.pin_state: str | None = None
        self._open: _Open | None = None
        self._shared: Login | None = None
        self._proven: RsaPublicKey | None = None
        self._accepted: Pin | None = None
        # Who answered the first question; another one is not taken in its place.
        self._known: tuple[str, str, str, str] | None = None
        self._undecided = False
        # The login was made again for this call, because the device had ended it.
        self._logged_in_anew = False
        # The device has shown that it knows no PIN for a single signature.
        self._without_context_login = False
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"Device({foreign(self.uri)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the four questions

    def certificates(self, *, near: bool = False) -> tuple[StoredCertificate, ...]:
        """
        The certificates that the device shows, in its order, after login where a PIN is given.
        With *near*, a device that has many is asked only for those that lie with the key, by
        CKA_ID or label, and for their issuers; for all where there are none.

        One that cannot be read, or is larger than 64 KiB, is there without its DER.
        """

        def look(here: _Open) -> tuple[StoredCertificate, ...]:
            self._log_in(here)
            return self._stored(here, near=near)

        return self._mended("reading certificates", look)

    def _stored(self, here: _Open, *, near: bool) -> tuple[StoredCertificate, ...]:
        try:
            return self._read_certificates(here.session, near=near)
        except p11.PKCS11Error as exc:
            if about_the_device(exc):
                raise
            # A device that is gone says so here. One whose certificates alone cannot be searched
            # does not matter where they are all in a file.
            here.token.slot.get_token()
            _log.info("reading certificates once more after: %s", said(exc))
        self._new_session(here)
        try:
            return self._read_certificates(here.session, near=near)
        except p11.PKCS11Error as exc:
            if about_the_device(exc):
                raise
            return (StoredCertificate(b"", "", b"", f"the search was answered {said(exc)}"),)

    def _read_certificates(self, session: Session, *, near: bool) -> tuple[StoredCertificate, ...]:
        if near:
            first = cryptoki.found(session, {Attribute.CLASS: _CERTIFICATE}, most=_MANY + 1)
            if len(first) <= _MANY:
                return tuple(map(_certificate, first))
            keys = self._matching(session)[:_SHOWN]
            if found := _near(session, keys, self.uri):
                return tuple(found)
        return tuple(certificates_of(session))

    def elsewhere(self) -> tuple[StoredCertificate, ...]:
        """
        The certificates that the module's other devices show without a login, each with its
        device's URI for a label.
        """

        def certificates(session: Session) -> list[StoredCertificate]:
            where = str(device_uri(session.token))
            return [replace(each, label=where) for each in certificates_of(session)]

        return self._mended(
            "reading certificates of other devices",
            lambda here: tuple(each for some in _others(here, certificates) for each in some),
        )

    def login(self, *, whatever: bool = False) -> bool:
        """
        Log in where the device wants it, or *whatever* its flags say. True where the device
        accepted a PIN from *this* source during this process's life; False where no login was
        needed, or where somebody else of the process had logged in already, which proves nothing
        about this PIN.
        """

        here = self._open
        if here is not None and here.login.there and current(here.module):
            # One that the device has lost since is noticed, and mended, when it is asked.
            return self._accepts(here)

        def log_in(here: _Open) -> bool:
            if whatever:
                self._log_in_anyway(here)
            else:
                self._log_in(here)
            return self._accepts(here)

        return self._mended("logging in", log_in)

    def _accepts(self, here: _Open) -> bool:
        return here.login.anchor is not None and here.login.source == self._pin

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """
        What the device says about the key, after login where a PIN is given.

        *candidates* are public keys of leaves: they choose between several keys. Raises
        DeviceError: ``key-missing``, ``key-ambiguous``, ``not-logged-in``, ``key-type``,
        ``key-size``, ``key-sign``, ``key-exportable``, ``key-mismatch``.
        """
        offered = tuple(candidates)

        def find(here: _Open) -> KeyFacts:
            self._log_in(here)
            return self._find(here, offered)

        return self._mended("looking for the key", find)

    def sign(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> bytes:
        """
        The RSASSA-PKCS1-v1_5 signature over *unsigned*, one of RS256, RS384, RS512.

        It is returned only if the key's public half verifies it. Where the device hides that
        half, one of *candidates* must verify it and is kept; without candidates the caller
        has to check. Raises DeviceError ``signature-wrong`` otherwise.
        """
        return self.signed(alg, unsigned, candidates=candidates)[0]

    def self_test(self, alg: str, *, candidates: Iterable[RsaPublicKey] = ()) -> bytes:
        """The signature over SELF_TEST, which is no grant; raises as `sign`."""
        return self.sign(alg, SELF_TEST, candidates=candidates)

    def signed(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> tuple[bytes, RsaPublicKey | None]:
        """As `sign`, with the public key that verified it in this process, if one did."""
        offered = tuple(candidates)
        facts, signature = self._signed(alg, unsigned, offered)
        learned = (self._proven,) if self._proven else ()
        halves = (facts.public,) if facts.public else (*learned, *offered)
        # What an earlier signature taught may have been another key by the same name.
        self._proven = None
        signature, self._proven = self._verified(halves, alg, unsigned, signature)
        return signature, self._proven

    def unproven(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> bytes:
        """As `sign`, for a caller in another process, who checks what comes out of this one."""
        return self._signed(alg, unsigned, tuple(candidates))[1]

    def _signed(
        self, alg: str, unsigned: SigningInput, offered: tuple[RsaPublicKey, ...]
    ) -> tuple[KeyFacts, bytes]:
        if alg not in ALGS:
            raise ConfigurationError(f"the algorithm is one of {', '.join(ALGS)}", code="alg")

        def sign(here: _Open) -> tuple[KeyFacts, bytes]:
            self._log_in(here)
            facts = self._find(here, offered)
            ways = _mechanisms(alg, unsigned, facts.mechanisms)
            if here.login.raw and len(ways) > 1:
                ways = ways[1:]
            mechanism, data = ways[0]
            try:
                return facts, self._sign_once(here, facts, data, mechanism)
            except p11.PKCS11Error as exc:
                if len(ways) < 2 or self._undecided or about_the_key_or_pin(exc):
                    raise
                first = exc
            # Listed, but for verifying alone, or not for this key, or not for this much data.
            mechanism, data = ways[1]
            self._new_session(here)
            facts = self._find(here, offered)
            try:
                signature = self._sign_once(here, facts, data, mechanism)
            except p11.PKCS11Error as exc:
                raise exc if about_the_key_or_pin(exc) or self._undecided else first from None
            here.login.raw = True
            here.facts = replace(facts, mechanisms=facts.mechanisms - _HASHED_NAMES)
            return facts, signature

        return self._mended(SIGNING, sign)

    def _sign_once(self, here: _Open, facts: KeyFacts, data: bytes, mechanism: Mechanism) -> bytes:
        """A signature, with a PIN of its own where the key, or the settings, want one."""
        plain = self._without_context_login
        if not plain and (facts.always_authenticate or self._signing_pin is not None):
            try:
                return self._sign_with_pin(here, data, mechanism)
            except p11.PKCS11Error as exc:
                if not knows_no_context_login(exc, told=facts.always_authenticate is True):
                    raise
            self._new_session(here)
            self._find(here, ())
            plain = True
        try:
            signed: bytes = cryptoki.able(here.key).sign(data, mechanism=mechanism)
        except p11.UserNotLoggedIn as exc:
            if not self._logged_in_anew or self._signing_pin is not None:
                raise
            raise DeviceError(
                f"signing: the module answered {said(exc)} right after a login: the key"
                f" {self._name} may want a PIN of its own",
                hint="Give it: HSMTOLL_HSM__SIGNING_PIN_FILE.",
                code="signing-pin",
            ) from exc
        self._without_context_login = plain
        return signed

    def _verified(
        self, halves: Iterable[RsaPublicKey], alg: str, unsigned: SigningInput, signature: bytes
    ) -> tuple[bytes, RsaPublicKey | None]:
        """
        The signature, whole, and the one of *halves* that verifies it; DeviceError if none does,
        ``None`` if there is none.
        """
        tried = False
        for public in halves:
            tried = True
            whole = public.padded(signature)
            if public.verify(alg, unsigned, whole):
                return whole, public
        if tried:
            raise DeviceError(
                f"the device's signature does not fit the public key of {self._name}",
                hint="The certificate belongs to another key, or the device is faulty.",
                code="signature-wrong",
            )
        return signature, None

    @contextlib.contextmanager
    def writing(self, doing: str, *, rw: bool = True) -> Iterator[tuple[Module, Token, Session]]:
        """
        A session after login, read-write unless not *rw*, for `hsmtoll.hsm.objects`, until the
        end. What this Device knows about its key is forgotten: it may be another one now.
        """
        # What a start anew cures is cured before anything is written: no write is made again.
        self._mended(doing, self._log_in)
        with self._using(doing) as here:
            self._log_in(here)
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

    def _read_write(self, here: _Open) -> Session:
        """A session that writes; it is the only one, the login's, where the device wants that."""
        try:
            return here.token.open(rw=True)
        except _NO_ROOM:
            here.login.give_back(here.session)
            here.login.end()
        self._log_in(here, rw=True)
        here.session = here.login.anchor or here.token.open(rw=True)
        return here.session

    def start_module_anew(self) -> None:
        """
        For `hsmtoll.hsm.objects`: so that what is read next comes from the device. Nothing is done
        where somebody else would lose a login by it, or a person would have to log in again.
        """
        with GATE.held(self._lock_timeout):
            login, module = self._shared, loaded(self.module_path)
            if login is None or module is None or len(login.users) > 1:
                return
            if login.by_others or (login.there and (login.pin is None or login.pin.on_pinpad)):
                return
            login.end()
            restarted(module, now=self._boot(), pause=0)

    def close(self) -> None:
        """Give the sessions back; the last Device on a p11_token logs out."""
        with GATE.held(self._lock_timeout):
            here, self._open = self._open, None
            login, self._shared = self._shared, None
            if here is not None:
                here.login.give_back(here.session)
            if login is not None:
                login.users.discard(self)
                if not login.users:
                    login.end()
                    login.pin = None

    # ------------------------------------------------------------------ module and p11_token

    @contextlib.contextmanager
    def _using(self, doing: str) -> Iterator[_Open]:
        with self._breaker.trying(doing), GATE.held(self._lock_timeout):
            self._breaker.admit()
            try:
                with speaking(f"{doing} ({self._name})"):
                    yield self._opened()
            except BaseException:
                self._drop()
                raise

    def _mended(self, doing: str, ask: Callable[[_Open], _T]) -> _T:
        """
        What *ask* returns, after whatever it takes to have the device answer. Not asked while
        the device is known to be down; what is said here is judged.
        """

        def call() -> _T:
            try:
                with speaking(f"{doing} ({self._name})"):
                    here = self._opened()
                    answer = ask(here)
                    self._known = self._known or _named(here.token)
                    return answer
            except BaseException:
                self._drop()
                raise

        with self._breaker.trying(doing), GATE.held(self._lock_timeout):
            # The one before may have found out while this one waited.
            self._breaker.admit()
            self._undecided = self._logged_in_anew = False
            return mended(call, self._cures(loaded(self.module_path), old=self._open is not None))

    def _cures(
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
            tried = self._undecided or made
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
            return done and not self._undecided

        yield from (started_once_more for _ in _START_PAUSES)
        yield from (new_session, new_login, module_started_again)

    def _may_help(self, exc: HsmTollError) -> bool:
        # A PIN whose try has an unknown fate is not tried again for the same call.
        if self._undecided:
            return False
        # A login that the device has lost looks like a key that is not there.
        lost = exc.code == "key-missing" and self._known is not None
        others = self._shared is not None and len(self._shared.users) > 0
        ended = exc.code == "not-logged-in" and self._pin is not None
        return recoverable(exc) or (lost and not others) or ended

    def _opened(self) -> _Open:
        module = opened(self.module_path)
        here = self._open
        if here is not None and here.module is module:
            return here
        _, token = self._choose(module)
        self._same(token)
        login = module.logins.setdefault(login_key(token), Login(module))
        before = self._shared
        if before is not None and before is not login and self._known is not None:
            # The module was started again: the PIN that this device took is still good.
            login.pin, login.source = login.pin or before.pin, login.source or before.source
        session = login.session(token)
        self._open = _Open(module=module, token=token, login=login, session=session)
        self._shared = login
        login.users.add(self)
        self.generation += 1
        return self._open

    def _same(self, token: Token) -> None:
        """Refuse a device that has taken the place of the one that was used before."""
        known, now = self._known, _named(token)
        if known is None or known == now:
            return
        # What was there and is empty now was read while another process wrote it.
        half = any(was and not word for was, word in zip(known, now, strict=True))
        raise DeviceError(
            f"{foreign(self.uri)} is another device than before: serial {foreign(now[2])}, and it"
            f" was {foreign(known[2])}",
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

    def _new_session(self, here: _Open) -> None:
        """Another session in the place of one that a module may have left in pieces."""
        here.login.give_back(here.session)
        here.key = here.facts = None
        here.session = here.login.session(here.token)

    def _choose(self, module: Module) -> tuple[Slot, Token]:
        seen: list[tuple[Slot, Token]] = []
        broken: list[str] = []
        for slot, token in module.slots():
            if isinstance(token, p11.PKCS11Error):
                broken.append(f"slot {slot.slot_id} answers {said(token)}")
            else:
                seen.append((slot, token))
        fitting = [
            (slot, token)
            for slot, token in seen
            if self.uri.matches(**device_facts(module, slot, token))
        ]
        # Uninitialised slots have no name; they are meant only if nothing else fits.
        ready = [found for found in fitting if found[1].flags & TokenFlag.TOKEN_INITIALIZED]
        fitting = ready or fitting
        if len(fitting) == 1:
            return fitting[0]
        listed = _told_apart(fitting or seen) + broken
        raise DeviceError(
            f"{'several devices fit' if fitting else 'no device fits'}"
            f" {foreign(self.uri.device_only())}",
            hint=_list("Seen: ", listed, "no device at all"),
            code="device-ambiguous" if fitting else "device-missing",
            retryable=not fitting,
        )

    # ------------------------------------------------------------------ login

    def _log_in(self, here: _Open, *, rw: bool = False) -> None:
        login = here.login
        if login.there or self._pin is None:
            return
        flags = self._flags(here)
        if not (flags & TokenFlag.LOGIN_REQUIRED or login.wanted):
            return
        place = Place(*_named(here.token), user=user_name(self.user_type))
        # What the device took before needs no asking again.
        pin = login.pin or self._pin.read(device=_called(here.token))
        if pin.on_pinpad and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise DeviceError(
                f"{_called(here.token)} has no pinpad of its own ({pin.source})",
                hint="Give the PIN another way: HSMTOLL_HSM__PIN_FILE, or PIN_PROMPT=terminal.",
                code="no-pinpad",
            )
        with self._ledger.held(place) as page:
            # Another process may have used the tries up while this one waited.
            login.pin = None
            self._intend(page, pin, here)
            login.pin, login.source = pin, self._pin
            value = PROTECTED_AUTH if pin.on_pinpad else pin.reveal()
            try:
                # A maker's own role is a bare number, which its type hints leave out.
                user: Any = self.user_type
                login.anchor = self._login_session(here, rw=rw, user_pin=value, user_type=user)
            except p11.UserAlreadyLoggedIn:
                page.withdraw()
                login.by_others = True
                _log.warning(
                    "other code of this process is logged in to %s: the PIN was not proven",
                    _called(here.token),
                )
            except p11.PinExpired:
                # It was right, and will be when it is tried again.
                page.accept(pin)
                raise
            except REFUSED as exc:
                page.refuse(pin)
                login.pin = None
                raise self._login_failed(here, pin, exc) from exc
            except p11.PKCS11Error as exc:
                if not untried(exc):
                    page.doubt(pin)
                    self._undecided = True
                    raise
                if self._locked_by(exc, here):
                    page.refuse(pin)
                    login.pin = None
                else:
                    page.withdraw()
                # A person who said no is not asked again for the same call.
                self._undecided = isinstance(exc, (p11.FunctionCancelled, p11.FunctionRejected))
                error = self._login_failed(here, pin, exc)
                if isinstance(exc, p11.UserPinNotInitialized):
                    # Against its own flags: the module read half of what the device holds.
                    error.retryable = bool(flags & TokenFlag.USER_PIN_INITIALIZED)
                raise error from exc
            else:
                page.accept(pin)
                # What was read before may not have been all.
                self.generation += 1

    def _login_session(self, here: _Open, *, rw: bool, **login: Any) -> Session:
        try:
            return cryptoki.logged_in(here.token, here.module.path, rw=rw, **login)
        except _NO_ROOM:
            if _has_room(here.token):
                raise  # the login was answered so, and not the session
            here.module.close(here.session)
        here.key = here.facts = None
        here.session = cryptoki.logged_in(here.token, here.module.path, rw=rw, **login)
        return here.session

    def _log_in_anyway(self, here: _Open) -> bool:
        """
        Log in whatever the flags say, and say whether that was done; a device that has no login
        is left as it is.
        """
        if here.login.there or self._pin is None:
            return False
        says_so = here.login.wanted or bool(self._flags(here) & TokenFlag.LOGIN_REQUIRED)
        here.login.wanted = True
        try:
            self._log_in(here)
        except HsmTollError as exc:
            cause = exc.__cause__
            if says_so or not (isinstance(cause, p11.PKCS11Error) and untried(cause)):
                raise
            here.login.wanted = False
            return False
        return True

    def _intend(self, page: Page, pin: Pin, here: _Open) -> None:
        makers = (here.module.lib.manufacturer_id, here.token.manufacturer_id)
        page.intend(
            pin,
            count_low=bool(self._flags(here) & TokenFlag.USER_PIN_COUNT_LOW),
            keeps_flags=any(maker.startswith(_KEEPS_FLAGS) for maker in makers),
            vouched=self._use_final_try,
        )

    def _locked_by(self, exc: p11.PKCS11Error, here: _Open) -> bool:
        """
        Whether the try that *exc* answers was a wrong PIN, and the last: OpenSC says PinLocked to
        it (HSM.md 6). It is not tried at a device whose flag said so before; a TPM, which says it
        to a try that it does not make, has no flag.
        """
        if not isinstance(exc, p11.PinLocked):
            return False
        try:
            flags: TokenFlag = here.token.slot.get_token().flags
        except p11.PKCS11Error:
            return True  # nobody knows, and a right PIN is freed by `hsmtoll pin clear`
        return bool(flags & TokenFlag.USER_PIN_LOCKED)

    def _flags(self, here: _Open) -> TokenFlag:
        """The PIN's state as the device reports it now; refuses where a try could be the last."""
        flags: TokenFlag = here.token.slot.get_token().flags
        self.pin_state = pin_state(flags)
        called = _called(here.token)
        if flags & TokenFlag.USER_PIN_LOCKED:
            raise PinNotTried(
                f"the PIN of {called} is locked: it was not tried",
                hint="The device's administrator (SO PIN or PUK) must unblock it.",
                code="pin-locked",
            )
        if flags & TokenFlag.USER_PIN_FINAL_TRY and not self._use_final_try:
            raise PinNotTried(
                f"one more wrong PIN would lock {called}: it was not tried",
                hint="Log in once with the device's own tool, or say --use-final-try.",
                code="pin-final-try",
            )
        if flags & TokenFlag.USER_PIN_COUNT_LOW:
            self._warn("pin-count-low", f"a wrong PIN was given to {called} since the last login")
        if flags & TokenFlag.USER_PIN_TO_BE_CHANGED:
            self._warn("pin-to-be-changed", f"the PIN of {called} is to be changed")
        return flags

    def _login_failed(self, here: _Open, pin: Pin, exc: p11.PKCS11Error) -> HsmTollError:
        kind = p11.PinIncorrect() if isinstance(exc, REFUSED) else exc
        doing = f"the PIN of {_called(here.token)} from {pin.source}"
        error = translated(kind, doing, login=True)
        if type(kind) is type(exc):
            return error
        return type(error)(f"{error} ({type(exc).__name__})", hint=error.hint, code=error.code)

    def _sign_with_pin(self, here: _Open, data: bytes, mechanism: Mechanism) -> bytes:
        """C_SignInit, context login, C_Sign, with nothing between (CKA_ALWAYS_AUTHENTICATE)."""
        source = self._signing_pin or self._pin
        pin = self._accepted if self._signing_pin else here.login.pin
        if pin is None and source is not None:
            pin = source.read(device=f"the key on {_called(here.token)}")
        if pin is None or pin.on_pinpad:
            raise DeviceError(
                f"the key {foreign(self.uri)} wants a PIN for every signature",
                hint="Give it: HSMTOLL_HSM__SIGNING_PIN_FILE; a pinpad cannot serve here.",
                code="signing-pin",
            )
        user = "signing" if self._signing_pin else user_name(self.user_type)
        with self._ledger.held(Place(*_named(here.token), user=user)) as page:
            self._intend(page, pin, here)
            key = cryptoki.able(here.key)
            try:
                signed: bytes = key.sign(data, mechanism=mechanism, pin=pin.reveal())
            except p11.PinExpired:
                page.accept(pin)
                raise
            except (p11.PinIncorrect, p11.PinInvalid, p11.PinLenRange) as exc:
                page.refuse(pin)
                self._accepted = None
                raise self._login_failed(here, pin, exc) from exc
            except p11.PKCS11Error as exc:
                # "Not logged in" is said of a login that was lost, and by some to a wrong PIN.
                lost = isinstance(exc, p11.UserNotLoggedIn) and page.accepted_before
                if self._locked_by(exc, here):
                    page.refuse(pin)
                    self._accepted = None
                elif untried(exc) or lost or isinstance(exc, _OF_THE_SIGNATURE):
                    page.withdraw()
                else:
                    page.doubt(pin)
                    self._undecided = True
                raise
            page.accept(pin)
            self._accepted = pin
            return signed

    # ------------------------------------------------------------------ the key

    def _find(self, here: _Open, candidates: tuple[RsaPublicKey, ...]) -> KeyFacts:
        if here.facts is not None and here.found_with is here.login.anchor:
            return here.facts
        if self.uri.type not in {None, "private"}:
            raise ConfigurationError(
                f"{foreign(self.uri)} names a {self.uri.type} object, not a private key",
                hint="Leave 'type' out, or write type=private.",
                code="uri",
            )
        found = self._matching(here.session)
        # Some show private keys to nobody, and do not say that they want a login.
        if not found and self._log_in_anyway(here):
            found = self._matching(here.session)
        if not found:
            raise self._no_key(here)
        proven = (self._public_key,) if self._public_key else candidates
        # Where nothing chooses between them, they are named, and no more than are shown.
        facts = key_facts(here.module, here.session, found if proven else found[:_SHOWN])
        if len(found) > 1 and proven:
            fits = [n for n, fact in enumerate(facts) if fact.public in proven]
            found, facts = [found[n] for n in fits] or found, [facts[n] for n in fits] or facts
        if len(found) > 1:
            raise DeviceError(
                f"{len(found)} private keys fit {foreign(self.uri)}",
                hint=_list("Name one by its id: ", [str(fact.uri) for fact in facts], ""),
                code="key-ambiguous",
            )
        fact = self._usable(facts[0])
        here.key, here.found_with, here.facts = found[0], here.login.anchor, fact
        return fact

    def _matching(self, session: Session, kind: ObjectClass = _KEY) -> list[Object]:
        """The keys that fit the URI; all are looked through only where none is found by name."""
        wanted: dict[Attribute, Any] = {Attribute.CLASS: kind}
        narrow = {
            name: value
            for name, value in ((Attribute.LABEL, self.uri.object), (Attribute.ID, self.uri.id))
            if value
        }
        if narrow:
            try:
                found = cryptoki.found(session, wanted | narrow)
            except p11.PKCS11Error as exc:
                # One object that is damaged stops a search by value, and no other.
                if about_the_device(exc):
                    raise
                found = []
            if found := [key for key in found if self._fits(key)]:
                return found
        return [key for key in cryptoki.found(session, wanted) if self._fits(key)]

    def _fits(self, key: Object) -> bool:
        try:
            label, key_id = _text(key), _id(key)
        except Unreadable:
            return False
        return self.uri.matches(object=label, id=key_id)

    def _no_key(self, here: _Open) -> DeviceError:
        # Without a login private keys are invisible, not forbidden.
        required = here.token.flags & TokenFlag.LOGIN_REQUIRED
        if required and not here.login.there:
            return DeviceError(
                f"the key {foreign(self.uri)} cannot be seen: nobody is logged in to"
                f" {_called(here.token)}",
                hint="Give the PIN: HSMTOLL_HSM__PIN_FILE or another source.",
                code="not-logged-in",
            )
        every = cryptoki.found(here.session, {Attribute.CLASS: _KEY})
        unread = [why for key in every if (why := _unread(key))]
        seen = [str(object_uri(here.token, key, "private")) for key in every[:_SHOWN]]
        hint = _list("Private keys there: ", seen, "none", more=len(every) - len(seen))
        if unread:
            hint += f"\n{len(unread)} of them cannot be read: {foreign(unread[0])}"
        if other := self._on_another(here):
            hint += f"\nAnother device of the module has one of that name: {other}"
        return DeviceError(
            f"no private key fits {foreign(self.uri)}", hint=hint, code="key-missing"
        )

    def _on_another(self, here: _Open) -> str | None:
        """The URI of another device with a key of that name, as far as it shows without a PIN."""
        if not self.uri.names_object:
            return None

        def named(session: Session) -> str | None:
            there = any(self._matching(session, kind) for kind in (_KEY, ObjectClass.PUBLIC_KEY))
            return str(device_uri(session.token)) if there else None

        return next(filter(None, _others(here, named)), None)

    def _usable(self, fact: KeyFacts) -> KeyFacts:
        name = foreign(fact.uri)
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
                f"the public key given (HSMTOLL_HSM__PUBLIC_KEY) is not the one of {name}",
                code="key-mismatch",
            )
        public = fact.public or given
        bits = public.bits if public else fact.bits
        if bits is not None and bits < _SMALLEST_KEY:
            raise DeviceError(
                f"the key {name} has {bits} bits: {_SMALLEST_KEY} are the least", code="key-size"
            )
        if fact.sign is False:
            raise DeviceError(f"the key {name} may not sign (CKA_SIGN is false)", code="key-sign")
        if not fact.protected and not self._allow_exportable_key:
            said = f"SENSITIVE {_said(fact.sensitive)}, EXTRACTABLE {_said(fact.extractable)}"
            raise DeviceError(
                f"the device does not say that the key {name} stays inside it ({said})",
                hint="Generate a key on the device, or set HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY=true.",
                code="key-exportable",
            )
        warnings = []
        if not (fact.never_extractable and fact.local):
            warnings.append("key-imported")
            self._warn("key-imported", f"the key {name} was, or may have been, outside the device")
        return replace(fact, public=public, bits=bits, warnings=tuple(warnings))

    def _warn(self, code: str, text: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            _log.warning("%s: %s", code, text)


# ---------------------------------------------------------------------- facts, used by inspect


def device_facts(module: Module, slot: Slot, token: Token) -> dict[str, Any]:
    """What an RFC 7512 URI can ask of a device, by the names of KeyUri's fields."""
    manufacturer, model, serial, label = _named(token)
    return {
        "token": label,
        "manufacturer": manufacturer,
        "model": model,
        "serial": serial,
        "slot_id": slot.slot_id,
        "slot_manufacturer": _cut(slot.manufacturer_id),
        "slot_description": _cut(slot.slot_description),
        "library_manufacturer": _cut(module.lib.manufacturer_id),
        "library_description": _cut(module.lib.library_description),
        "library_version": module.lib.library_version,
    }


def _others(here: _Open, ask: Callable[[Session], _T]) -> Iterator[_T]:
    """The answers of the module's other devices, without a login; one that fails has none."""
    for _, token in here.module.slots():
        if isinstance(token, p11.PKCS11Error) or login_key(token) == login_key(here.token):
            continue
        session = None
        try:
            session = token.open()
            yield ask(session)
        except p11.PKCS11Error as exc:
            _log.info("%s is passed over: %s", _called(token), said(exc))
        finally:
            here.module.close(session)


def _has_room(token: Token) -> bool:
    try:
        token.open().close()
    except _NO_ROOM:
        return False
    return True


def login_key(token: Token) -> tuple[object, ...]:
    """Whose login it is. By slot as well: two devices may carry one label and no serial."""
    return (token.slot.slot_id, *_named(token))


def device_uri(token: Token) -> KeyUri:
    """The URI of a p11_token, without its slot's number, which may change."""
    manufacturer, model, serial, label = _named(token)
    return KeyUri(token=label, manufacturer=manufacturer, model=model, serial=serial or None)


def object_uri(token: Token, thing: Object, kind: str) -> KeyUri:
    """The URI of an object on *token*, ready to paste."""
    # What is empty is named as well ("id=", RFC 7512): without it other objects would fit too.
    return replace(device_uri(token), object=_label(thing), id=_id(thing), type=kind)


def key_facts(module: Module, session: Session, keys: Iterable[Object]) -> list[KeyFacts]:
    """What the device says about the private *keys*."""
    token = session.token
    manufacturer, model, serial, label = _named(token)
    of_the_device: dict[str, Any] = {
        "mechanisms": frozenset(
            # A vendor's own mechanism is a bare number.
            getattr(one, "name", None) or hex(one)
            for one in token.slot.get_mechanisms()
        ),
        "token_label": label,
        "manufacturer": manufacturer,
        "model": model,
        "serial": serial,
        "firmware": token.firmware_version,
        "library_manufacturer": _cut(module.lib.manufacturer_id),
        "library_description": _cut(module.lib.library_description),
        "library_version": module.lib.library_version,
    }
    return [_key_facts(session, key, of_the_device) for key in keys]


def _key_facts(session: Session, key: Object, of_the_device: dict[str, Any]) -> KeyFacts:
    kind = _attribute(key, Attribute.KEY_TYPE)
    public = _public_half(session, key) if kind == KeyType.RSA else None
    return KeyFacts(
        uri=object_uri(session.token, key, "private"),
        label=_label(key),
        id=_id(key),
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
    """The key's own MODULUS, else the one public-key object with its id, else with its label."""
    own = _rsa(key)
    if own is not None:
        return own
    modulus = _attribute(key, Attribute.MODULUS)
    for attribute in (Attribute.ID, Attribute.LABEL):
        value = _attribute(key, attribute)
        if not value:
            continue
        found = cryptoki.with_value(session, ObjectClass.PUBLIC_KEY, attribute, value)
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
    # What no RSA key has (RFC 8017 section 3.1) tells nothing.
    return RsaPublicKey(n, e) if n & e & 1 and 3 <= e < n else None


def certificates_of(session: Session) -> Iterator[StoredCertificate]:
    """The certificates that *session* shows; one that cannot be read has a *problem*."""
    return map(_certificate, cryptoki.found(session, {Attribute.CLASS: _CERTIFICATE}))


def _near(session: Session, keys: Iterable[Object], uri: KeyUri) -> list[StoredCertificate]:
    """
    The certificates that have an id or a label of *keys*, or that *uri* names, and those that
    issued them, as far as a search by CKA_SUBJECT finds them.
    """
    names = {(Attribute.LABEL, uri.object), (Attribute.ID, uri.id)}
    for key in keys:
        names |= {(Attribute.LABEL, _label(key)), (Attribute.ID, _id(key))}
    wanted = [name for name in names if name[1]]
    found: dict[int | None, StoredCertificate] = {}
    asked = set(wanted)
    while wanted:
        for thing in cryptoki.with_value(session, _CERTIFICATE, *wanted.pop()):
            if thing.handle in found:
                continue
            found[thing.handle] = one = _certificate(thing)
            with contextlib.suppress(ValueError):
                issuer = (Attribute.SUBJECT, ders.certificate_fields(one.der).issuer)
                if issuer not in asked:
                    asked.add(issuer)
                    wanted.append(issuer)
    return list(found.values())


def _certificate(thing: Object) -> StoredCertificate:
    thing = cryptoki.at_once(thing, (Attribute.LABEL, Attribute.ID, Attribute.VALUE))
    label, key_id, der, problem = _label(thing), _id(thing), b"", None
    try:
        der = _first_value(cryptoki.read(thing, Attribute.VALUE) or b"")
    except Unreadable as exc:
        problem = f"its value was answered {exc}"
    if len(der) > _LARGEST_CERTIFICATE:
        der, problem = b"", f"it has {len(der)} bytes, and {_LARGEST_CERTIFICATE} are the most"
    elif not der and problem is None:
        problem = "it has no value on the device"
    if problem is not None:
        _log.warning("certificate %r cannot be read: %s", foreign(label), problem)
    return StoredCertificate(der, label, key_id, problem)


def _first_value(value: bytes) -> bytes:
    # Cards keep files of a fixed size: what follows a certificate there is padding.
    with contextlib.suppress(ValueError):
        return ders.first(value)
    return value


def _mechanisms(
    alg: str, unsigned: SigningInput, there: frozenset[str]
) -> list[tuple[Mechanism, bytes]]:
    """The ways to sign that the device lists, with what each is given: the hashing one first."""
    ways = [
        (_HASHED[alg], bytes(unsigned)),
        (Mechanism.RSA_PKCS, digest_info(alg, unsigned)),
    ]
    found = [way for way in ways if way[0].name in there]
    if not found:
        raise DeviceError(
            f"the device can do neither {_HASHED[alg].name} nor RSA_PKCS: {alg} cannot be signed",
            hint="`hsmtoll objects` shows what the device can do.",
            code="mechanism",
        )
    return found


def _attribute(thing: Object, name: Attribute) -> Any:
    try:
        return cryptoki.read(thing, name)
    except Unreadable:
        return None


def _text(thing: Object) -> str:
    # Some write the end of a string in C along with it, which no URI can say.
    return (cryptoki.read(thing, Attribute.LABEL) or "").partition("\0")[0]


def _label(thing: Object) -> str:
    try:
        return _text(thing)
    except Unreadable:
        return ""


def _id(thing: Object) -> bytes:
    return _attribute(thing, Attribute.ID) or b""


def _unread(thing: Object) -> str | None:
    """Why not even the label of *thing* can be read; ``None`` if it can."""
    try:
        _text(thing)
    except Unreadable as exc:
        return str(exc)
    return None


def _cut(text: str) -> str:
    # A fixed field is filled up with blanks; some end it as C does, and what follows is rubbish.
    return text.partition("\0")[0].rstrip()


def _serial(token: Token) -> str:
    # Two numbers in binary may differ behind a zero only.
    return token.serial.decode("utf-8", "replace").rstrip(" \0").replace("\0", " ")


def _named(token: Token) -> tuple[str, str, str, str]:
    return _cut(token.manufacturer_id), _cut(token.model), _serial(token), _cut(token.label)


def _called(token: Token) -> str:
    return f"'{foreign(_cut(token.label))}' (serial {foreign(_serial(token)) or 'unknown'})"


def _told_apart(devices: list[tuple[Slot, Token]]) -> list[str]:
    """Their URIs, with what tells the slots apart where the devices look the same."""
    uris = [device_uri(token) for _, token in devices]
    described = [
        replace(uri, slot_description=_cut(slot.slot_description)) if uris.count(uri) > 1 else uri
        for uri, (slot, _) in zip(uris, devices, strict=True)
    ]
    return [
        str(replace(uri, slot_id=slot.slot_id) if described.count(uri) > 1 else uri)
        for uri, (slot, _) in zip(described, devices, strict=True)
    ]


def _said(value: bool | None) -> str:
    return "not told" if value is None else str(value).lower()


def _list(before: str, names: list[str], none: str, *, more: int = 0) -> str:
    shown = [foreign(name) for name in names[:_SHOWN]]
    more += len(names) - len(shown)
    return before + ("\n".join(shown + ([f"… and {more} more"] if more else [])) or none)
