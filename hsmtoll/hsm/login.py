"""
Logging in, once a device and process, under the rules of the PIN ledger: a PIN is tried once per
value, its flags are read first, and what became of a try is written down before anything else.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from pkcs11 import PROTECTED_AUTH, Attribute, ObjectClass, TokenFlag
from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError, HsmTollError, PinIncorrect, PinNotTried, foreign
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import REFUSED, translated, untried
from hsmtoll.hsm.pin_log import PinLog, PinRecord, TokenUser
from hsmtoll.hsm.reading import called, named, pin_state, user_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11 import Mechanism, Object, Session, Token

    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.pin import Pin, PinSource
    from hsmtoll.hsm.signatures import Signable
    from hsmtoll.hsm.uri import KeyUri

__all__ = ["NO_ROOM", "Handles", "Login", "PinLogin", "state_after"]

_log = logging.getLogger(__name__)

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
NO_ROOM: Final = (
    p11.SessionCount,
    p11.SessionExists,
    p11.SessionReadOnlyExists,
    p11.SessionReadWriteSOExists,
)
#: What the maker of a module, or of a device, begins with where the PIN's flags are kept.
_KEEPS_FLAGS: Final = ("SoftHSM", "OpenSC", "IBM")


@dataclass(slots=True, eq=False)
class Login:
    """What this process holds on one p11_token, shared by all devices on it."""

    module: Module
    #: The session that logged in: closing it logs everybody out.
    anchor: Session | None = None
    by_others: bool = False
    pin: Pin | None = field(default=None, repr=False)
    source: PinSource | None = field(default=None, repr=False)
    #: The devices of this process that use it.
    users: WeakSet[Any] = field(default_factory=WeakSet)
    #: The device wants a login, although its flags do not say so.
    wanted: bool = False
    #: It does not take a whole assertion with the hashing mechanism: the digest is made here.
    raw: bool = False

    @property
    def there(self) -> bool:
        """Whether anybody of this process is logged in."""
        return self.anchor is not None or self.by_others

    def end(self) -> None:
        """Log out: every session of the process on this p11_token loses its private keys."""
        self.module.close(self.anchor)
        self.anchor, self.by_others = None, False

    def session(self, token: Token) -> Session:
        """A session for one's own use, or the login's where the device has room for no other."""
        try:
            return token.open()
        except NO_ROOM:
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
class Handles:
    """What one device has open. All of it is void when the module or the login is another one."""

    module: Module
    token: Token
    login: Login
    session: Session
    key: Object | None = None
    found_with: Session | None = None
    facts: KeyFacts | None = None

    def new_session(self) -> None:
        """Another session in the place of one that a module may have left in pieces."""
        self.login.give_back(self.session)
        self.key = self.facts = None
        self.session = self.login.session(self.token)


class PinLogin:
    """
    How one device is logged in to: with the PIN of *pin*, and for each signature with that of
    *signing_pin* where one is given. *user_type* ``None`` is CKU_USER. *warn* gets a code and a
    sentence.
    """

    def __init__(
        self,
        uri: KeyUri,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None,
        pin_log: PinLog,
        use_final_try: bool,
        user_type: int | None,
        warn: Callable[[str, str], None],
    ) -> None:
        self._uri = uri
        self.pin = pin
        self.signing_pin = signing_pin if signing_pin is not pin else None
        self.pin_log = pin_log
        self._use_final_try = use_final_try
        self.user_type = user_type
        self._warn = warn
        #: How often a PIN was accepted: what was read before may not have been all.
        self.accepted = 0
        #: A try has an unknown fate: none is made again for the same call.
        self.undecided = False
        #: As `Device.pin_state`.
        self.pin_state: str | None = None
        self._signing: Pin | None = None

    def log_in(self, here: Handles, *, rw: bool = False) -> None:
        """Log in where the device wants it and nobody is; with *rw* by a session that writes."""
        login = here.login
        if login.there or self.pin is None:
            return
        flags = self._flags(here)
        if not (flags & TokenFlag.LOGIN_REQUIRED or login.wanted):
            return
        owner = TokenUser(*named(here.token), user=user_name(self.user_type))
        # What the device took before needs no asking again.
        pin = login.pin or self.pin.read(device=called(here.token))
        if pin.on_pinpad and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise DeviceError(
                f"{called(here.token)} has no pinpad of its own ({pin.source})",
                hint="Give the PIN another way: HSMTOLL_HSM__PIN_FILE, or PIN_PROMPT=terminal.",
                code="no-pinpad",
            )
        with self.pin_log.held(owner) as pin_record:
            # Another process may have used the tries up while this one waited.
            login.pin = None
            seen = self._intend(pin_record, pin, here)
            login.pin, login.source = pin, self.pin
            value = PROTECTED_AUTH if pin.on_pinpad else pin.reveal()
            try:
                # A maker's own role is a bare number, which its type hints leave out.
                user: Any = self.user_type
                login.anchor = _login_session(here, rw=rw, user_pin=value, user_type=user)
            except p11.UserAlreadyLoggedIn:
                pin_record.withdraw()
                login.by_others = True
                _log.warning(
                    "other code of this process is logged in to %s: the PIN was not proven",
                    called(here.token),
                )
            except p11.PinExpired:
                # It was right, and will be when it is tried again.
                pin_record.accept(pin)
                raise
            except REFUSED as exc:
                pin_record.refuse(pin)
                login.pin = None
                raise self._failed(here, pin, exc) from exc
            except p11.PKCS11Error as exc:
                if not untried(exc):
                    pin_record.mark_unknown(pin)
                    self.undecided = True
                    self.pin_state = "unresolved"
                    raise
                if self._locked_by(exc, here):
                    pin_record.refuse(pin)
                    login.pin = None
                else:
                    pin_record.withdraw()
                # A person who said no is not asked again for the same call.
                self.undecided = isinstance(exc, (p11.FunctionCancelled, p11.FunctionRejected))
                error = self._failed(here, pin, exc)
                if isinstance(exc, p11.UserPinNotInitialized):
                    # Against its own flags: the module read half of what the device holds.
                    error.retryable = bool(flags & TokenFlag.USER_PIN_INITIALIZED)
                raise error from exc
            else:
                pin_record.accept(pin)
                self.accepted += 1
                self.pin_state = pin_state(seen)

    def force_log_in(self, here: Handles) -> bool:
        """
        Log in whatever the flags say, and say whether that was done; a device that has no login
        is left as it is.
        """
        if here.login.there or self.pin is None:
            return False
        says_so = here.login.wanted or bool(self._flags(here) & TokenFlag.LOGIN_REQUIRED)
        here.login.wanted = True
        try:
            self.log_in(here)
        except HsmTollError as exc:
            cause = exc.__cause__
            if says_so or not (isinstance(cause, p11.PKCS11Error) and untried(cause)):
                raise
            here.login.wanted = False
            return False
        return True

    def sign(self, here: Handles, wanted: Signable, mechanism: Mechanism) -> bytes:
        """C_SignInit, context login, C_Sign, with nothing between (CKA_ALWAYS_AUTHENTICATE)."""
        source = self.signing_pin or self.pin
        pin = self._signing if self.signing_pin else here.login.pin
        if pin is None and source is not None:
            pin = source.read(device=f"the key on {called(here.token)}")
        if pin is None or pin.on_pinpad:
            raise DeviceError(
                f"the key {foreign(self._uri)} wants a PIN for every signature",
                hint="Give it: HSMTOLL_HSM__SIGNING_PIN_FILE; a pinpad cannot serve here.",
                code="signing-pin",
            )
        user = "signing" if self.signing_pin else user_name(self.user_type)
        with self.pin_log.held(TokenUser(*named(here.token), user=user)) as pin_record:
            seen = self._intend(pin_record, pin, here)
            key = cryptoki.able(here.key)
            try:
                data = wanted.input_for(mechanism)
                signed: bytes = key.sign(data, mechanism=mechanism, pin=pin.reveal())
            except p11.PinExpired:
                pin_record.accept(pin)
                raise
            except (p11.PinIncorrect, p11.PinInvalid, p11.PinLenRange) as exc:
                pin_record.refuse(pin)
                self._signing = None
                raise self._failed(here, pin, exc) from exc
            except p11.PKCS11Error as exc:
                # "Not logged in" is said of a login that was lost, and by some to a wrong PIN.
                lost = isinstance(exc, p11.UserNotLoggedIn) and pin_record.accepted_before
                if self._locked_by(exc, here):
                    pin_record.refuse(pin)
                    self._signing = None
                elif untried(exc) or lost or isinstance(exc, _OF_THE_SIGNATURE):
                    pin_record.withdraw()
                else:
                    pin_record.mark_unknown(pin)
                    self.undecided = True
                    self.pin_state = "unresolved"
                raise
            pin_record.accept(pin)
            self._signing = pin
            self.pin_state = pin_state(seen)
            return signed

    def _intend(self, pin_record: PinRecord, pin: Pin, here: Handles) -> TokenFlag:
        """Write down that *pin* is about to be tried; the flags as they are at that moment."""
        makers = (here.module.lib.manufacturer_id, here.token.manufacturer_id)
        flags = self._flags(here)
        pin_record.intend(
            pin,
            count_low=bool(flags & TokenFlag.USER_PIN_COUNT_LOW),
            keeps_flags=any(maker.startswith(_KEEPS_FLAGS) for maker in makers),
            user_confirmed=self._use_final_try,
        )
        return flags

    def _locked_by(self, exc: p11.PKCS11Error, here: Handles) -> bool:
        """
        Whether the try that *exc* answers was a wrong PIN, and the last: OpenSC says PinLocked to
        it. It is not tried at a device whose flag said so before; a TPM, which says it to a try
        that it does not make, has no flag.
        """
        if not isinstance(exc, p11.PinLocked):
            return False
        try:
            flags: TokenFlag = here.token.slot.get_token().flags
        except p11.PKCS11Error:
            return True  # nobody knows, and a right PIN is freed by `hsmtoll pin clear`
        return bool(flags & TokenFlag.USER_PIN_LOCKED)

    def _flags(self, here: Handles) -> TokenFlag:
        """The PIN's state as the device reports it now; refuses where a try could be the last."""
        flags: TokenFlag = here.token.slot.get_token().flags
        device = called(here.token)
        if flags & TokenFlag.USER_PIN_LOCKED:
            raise PinNotTried(
                f"the PIN of {device} is locked: it was not tried",
                hint="The device's administrator (SO PIN or PUK) must unblock it.",
                code="pin-locked",
            )
        if flags & TokenFlag.USER_PIN_FINAL_TRY and not self._use_final_try:
            raise PinNotTried(
                f"one more wrong PIN would lock {device}: it was not tried",
                hint="Log in once with the device's own tool, or say --use-final-try.",
                code="pin-final-try",
            )
        if flags & TokenFlag.USER_PIN_COUNT_LOW:
            self._warn("pin-count-low", f"a wrong PIN was given to {device} since the last login")
        if flags & TokenFlag.USER_PIN_TO_BE_CHANGED:
            self._warn("pin-to-be-changed", f"the PIN of {device} is to be changed")
        return flags

    def _failed(self, here: Handles, pin: Pin, exc: p11.PKCS11Error) -> HsmTollError:
        kind = p11.PinIncorrect() if isinstance(exc, REFUSED) else exc
        doing = f"the PIN of {called(here.token)} from {pin.source}"
        error = translated(kind, doing, login=True)
        if type(kind) is type(exc):
            return error
        return type(error)(f"{error} ({type(exc).__name__})", hint=error.hint, code=error.code)


def _login_session(here: Handles, *, rw: bool, **login: Any) -> Session:
    """A session that logs in; the only one where the device has room for no other."""
    try:
        return cryptoki.logged_in(here.token, here.module.path, rw=rw, **login)
    except NO_ROOM:
        if _has_room(here.token):
            raise  # the login was answered so, and not the session
        here.module.close(here.session)
    here.key = here.facts = None
    here.session = cryptoki.logged_in(here.token, here.module.path, rw=rw, **login)
    return here.session


def _has_room(token: Token) -> bool:
    try:
        token.open().close()
    except NO_ROOM:
        return False
    return True


def state_after(exc: HsmTollError) -> str | None:
    """What *exc* says of the PIN, in the words of `Device.pin_state`; ``None`` if nothing."""
    if isinstance(exc, PinIncorrect):
        return "refused"
    if isinstance(exc, PinNotTried):
        return _STATES.get(exc.code or "", "not-tried")
    return None


_STATES: Final = {
    "pin-locked": "locked",
    "pin-final-try": "final-try",
    "pin-count-low": "count-low",
    "pin-refused": "refused",
    "pin-unresolved": "unresolved",
}
