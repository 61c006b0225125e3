"""
Login, once per token and process. Each PIN value is tried once: the token's PIN flags are read
first, and the result of each try is written to the PIN log before anything else happens.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from pkcs11 import PROTECTED_AUTH, TokenFlag
from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError, HsmTollError, PinIncorrect, PinNotTried, sanitized
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import REFUSED, SESSION_LIMIT_ERRORS, translated, untried
from hsmtoll.hsm.pin_log import PinLog, PinRecord, TokenUser
from hsmtoll.hsm.reading import display_name, pin_state, token_identity, user_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from pkcs11 import Mechanism, Session, Token

    from hsmtoll.hsm.connection import Handles
    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.pin import Pin, PinSource
    from hsmtoll.hsm.signatures import Signable

__all__ = ["PinLogin", "pin_state_after"]

_log = logging.getLogger(__name__)

#: What became of a PIN after a failed operation.
_Outcome: TypeAlias = Literal["accepted", "refused", "unchecked", "unknown"]

# Errors of C_SignInit and C_Sign about the key, the mechanism or the data; none is about a PIN.
_SIGNATURE_ERRORS: Final = (
    p11.DataInvalid,
    p11.DataLenRange,
    p11.DeviceMemory,
    p11.KeyHandleInvalid,
    p11.KeySizeRange,
    p11.KeyTypeInconsistent,
    p11.MechanismInvalid,
    p11.MechanismParamInvalid,
)
#: Prefixes of the manufacturers of modules or tokens that maintain the PIN flags.
_MAKERS_WITH_PIN_FLAGS: Final = ("SoftHSM", "OpenSC", "IBM")


class PinLogin:
    """
    Logs in to one device with the PIN of *pin*, and for each signature with that of *signing_pin*,
    if given. *warn* is called with a code and a sentence.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None,
        pin_log: PinLog,
        warn: Callable[[str, str], None],
    ) -> None:
        self._uri = settings.uri
        self.pin = pin
        self.signing_pin = signing_pin if signing_pin is not pin else None
        self.pin_log = pin_log
        self._use_final_try = settings.use_final_try
        self._user_type = settings.user_type
        self._warn = warn
        #: Number of accepted PINs. After a login the device may show more objects.
        self.accepted = 0
        #: The outcome of a try is unknown: the same call makes no further one.
        self.pin_outcome_unknown = False
        #: The same call has logged in again, because the device had ended the login.
        self.relogged_in = False
        #: As `Device.pin_state`.
        self.pin_state: str | None = None
        self._signing: Pin | None = None

    def begin_call(self) -> None:
        """Reset what is known of the PIN tries of one call."""
        self.pin_outcome_unknown = self.relogged_in = False

    def log_in(self, handles: Handles, *, rw: bool = False) -> None:
        """Log in if that is required and not done yet; with *rw* in a read-write session."""
        login = handles.login
        if login.is_logged_in or self.pin is None:
            return
        flags = self._flags(handles)
        if not (flags & TokenFlag.LOGIN_REQUIRED or login.wanted):
            return
        # A PIN that the device has accepted is not read again.
        pin = login.pin or self.pin.read(device=display_name(handles.token))
        if pin.on_pinpad and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise DeviceError(
                f"{display_name(handles.token)} has no pinpad of its own ({pin.source})",
                hint="Give the PIN another way: HSMTOLL_HSM__PIN_FILE, or PIN_PROMPT=terminal.",
                code="no-pinpad",
            )
        owner = TokenUser(*token_identity(handles.token), user=user_name(self._user_type))
        with self.pin_log.held(owner) as pin_record:
            # Check again: another process may have used up the tries while this one waited.
            login.pin = None
            flags = self._record_intent(pin_record, pin, handles)
            login.pin, login.source = pin, self.pin
            try:
                login.anchor = _login_session(handles, pin, rw=rw, user_type=self._user_type)
            except p11.UserAlreadyLoggedIn:
                pin_record.withdraw()
                login.logged_in_by_others = True
                _log.warning(
                    "other code of this process is logged in to %s: the PIN was not verified",
                    display_name(handles.token),
                )
            except p11.PKCS11Error as exc:
                error = self._failed_login(handles, pin_record, pin, flags, exc)
                if error is None:
                    raise
                raise error from exc
            else:
                self._record_accepted(pin_record, pin, flags)
                self.accepted += 1

    def _failed_login(
        self,
        handles: Handles,
        pin_record: PinRecord,
        pin: Pin,
        flags: TokenFlag,
        exc: p11.PKCS11Error,
    ) -> HsmTollError | None:
        """
        Record the answer *exc* to C_Login. Returns the error for it; None if the caller's is right,
        because the answer is not about this PIN.
        """
        refused = isinstance(exc, REFUSED)
        outcome = self._record_failure(
            handles, pin_record, pin, exc, refused=refused, unchecked=untried(exc)
        )
        if outcome in ("accepted", "unknown"):
            return None
        if outcome == "refused":
            handles.login.pin = None
        # The user has cancelled (pinpad): do not prompt again for the same call.
        if isinstance(exc, (p11.FunctionCancelled, p11.FunctionRejected)):
            self.pin_outcome_unknown = True
        error = self._login_error(handles, pin, exc)
        if isinstance(exc, p11.UserPinNotInitialized):
            # If it contradicts the flags, the module has read a half-written token.
            error.retryable = bool(flags & TokenFlag.USER_PIN_INITIALIZED)
        return error

    def force_log_in(self, handles: Handles) -> bool:
        """
        Log in regardless of CKF_LOGIN_REQUIRED. Returns whether that was done: False if the device
        has no login.
        """
        if handles.login.is_logged_in or self.pin is None:
            return False
        required = handles.login.wanted or bool(self._flags(handles) & TokenFlag.LOGIN_REQUIRED)
        handles.login.wanted = True
        try:
            self.log_in(handles)
        except HsmTollError as exc:
            cause = exc.__cause__
            if required or not (isinstance(cause, p11.PKCS11Error) and untried(cause)):
                raise
            handles.login.wanted = False
            return False
        return True

    def read_write_session(self, handles: Handles) -> Session:
        """A read-write session; if the device permits no further one, it is the login's."""
        try:
            return handles.token.open(rw=True)
        except SESSION_LIMIT_ERRORS:
            handles.login.release(handles.session)
            handles.login.end()
        self.log_in(handles, rw=True)
        handles.session = handles.login.anchor or handles.token.open(rw=True)
        return handles.session

    def sign(self, handles: Handles, wanted: Signable, mechanism: Mechanism) -> bytes:
        """C_SignInit, context-specific C_Login, C_Sign (CKA_ALWAYS_AUTHENTICATE)."""
        pin = self._pin_for_signing(handles)
        user = "signing" if self.signing_pin else user_name(self._user_type)
        with self.pin_log.held(TokenUser(*token_identity(handles.token), user=user)) as pin_record:
            flags = self._record_intent(pin_record, pin, handles)
            key = cryptoki.with_sign(handles.key)
            try:
                data = wanted.input_for(mechanism)
                signed: bytes = key.sign(data, mechanism=mechanism, pin=pin.reveal())
            except p11.PKCS11Error as exc:
                refused = isinstance(exc, (p11.PinIncorrect, p11.PinInvalid, p11.PinLenRange))
                # Means a lost login, but some devices answer it to a wrong PIN.
                lost = isinstance(exc, p11.UserNotLoggedIn) and pin_record.accepted_before
                unchecked = untried(exc) or lost or isinstance(exc, _SIGNATURE_ERRORS)
                outcome = self._record_failure(
                    handles, pin_record, pin, exc, refused=refused, unchecked=unchecked
                )
                if outcome == "refused":
                    self._signing = None
                if refused:
                    raise self._login_error(handles, pin, exc) from exc
                raise
            self._record_accepted(pin_record, pin, flags)
            self._signing = pin
            return signed

    def _pin_for_signing(self, handles: Handles) -> Pin:
        source = self.signing_pin or self.pin
        pin = self._signing if self.signing_pin else handles.login.pin
        if pin is None and source is not None:
            pin = source.read(device=f"the key on {display_name(handles.token)}")
        if pin is None or pin.on_pinpad:
            raise DeviceError(
                f"the key {sanitized(self._uri)} requires a PIN for every signature",
                hint="Set HSMTOLL_HSM__SIGNING_PIN_FILE; a pinpad cannot be used for this.",
                code="signing-pin",
            )
        return pin

    def _record_accepted(self, pin_record: PinRecord, pin: Pin, flags: TokenFlag) -> None:
        pin_record.accept(pin)
        self.pin_state = pin_state(flags)

    def _record_failure(
        self,
        handles: Handles,
        pin_record: PinRecord,
        pin: Pin,
        exc: p11.PKCS11Error,
        *,
        refused: bool,
        unchecked: bool,
    ) -> _Outcome:
        """
        Record in the PIN log what *exc*, the answer to *pin*, means. *refused*: the PIN is wrong;
        *unchecked*: the device did not check it.
        """
        if isinstance(exc, p11.PinExpired):
            pin_record.accept(pin)
            return "accepted"
        if refused or self._was_last_try(exc, handles):
            pin_record.refuse(pin)
            return "refused"
        if unchecked:
            pin_record.withdraw()
            return "unchecked"
        pin_record.mark_unknown(pin)
        self.pin_outcome_unknown = True
        self.pin_state = "unresolved"
        return "unknown"

    def _record_intent(self, pin_record: PinRecord, pin: Pin, handles: Handles) -> TokenFlag:
        """Record that *pin* is about to be tried. Returns the token's current flags."""
        makers = (handles.module.lib.manufacturer_id, handles.token.manufacturer_id)
        flags = self._flags(handles)
        pin_record.intend(
            pin,
            count_low=bool(flags & TokenFlag.USER_PIN_COUNT_LOW),
            keeps_flags=any(maker.startswith(_MAKERS_WITH_PIN_FLAGS) for maker in makers),
            user_confirmed=self._use_final_try,
        )
        return flags

    def _was_last_try(self, exc: p11.PKCS11Error, handles: Handles) -> bool:
        """
        Whether *exc* means that the last try was used up by a wrong PIN. OpenSC answers PinLocked
        to that try. A token that was locked before has a flag for it and is not tried; a TPM,
        which answers PinLocked without checking the PIN, has no flag.
        """
        if not isinstance(exc, p11.PinLocked):
            return False
        try:
            flags: TokenFlag = handles.token.slot.get_token().flags
        except p11.PKCS11Error:
            return True  # unknown: the safe answer; `hsmtoll pin clear` permits a correct PIN again
        return bool(flags & TokenFlag.USER_PIN_LOCKED)

    def _flags(self, handles: Handles) -> TokenFlag:
        """The token's current flags. PinNotTried if the PIN is locked or has its last try left."""
        flags: TokenFlag = handles.token.slot.get_token().flags
        device = display_name(handles.token)
        if flags & TokenFlag.USER_PIN_LOCKED:
            raise PinNotTried(
                f"the PIN of {device} is locked: it was not tried",
                hint="The device's administrator (SO PIN or PUK) must unblock it.",
                code="pin-locked",
            )
        if flags & TokenFlag.USER_PIN_FINAL_TRY and not self._use_final_try:
            raise PinNotTried(
                f"one more wrong PIN would lock {device}: it was not tried",
                hint="Log in once with the device's own tool, or use --use-final-try.",
                code="pin-final-try",
            )
        if flags & TokenFlag.USER_PIN_COUNT_LOW:
            self._warn("pin-count-low", f"a wrong PIN was given to {device} since the last login")
        if flags & TokenFlag.USER_PIN_TO_BE_CHANGED:
            self._warn("pin-to-be-changed", f"the PIN of {device} is to be changed")
        return flags

    def _login_error(self, handles: Handles, pin: Pin, exc: p11.PKCS11Error) -> HsmTollError:
        kind = p11.PinIncorrect() if isinstance(exc, REFUSED) else exc
        doing = f"the PIN of {display_name(handles.token)} from {pin.source}"
        error = translated(kind, doing, login=True)
        if type(kind) is type(exc):
            return error
        return type(error)(f"{error} ({type(exc).__name__})", hint=error.hint, code=error.code)


def _login_session(handles: Handles, pin: Pin, *, rw: bool, user_type: Any) -> Session:
    """Log in with a new session, or with the only one if the device has no further one."""
    # A vendor-defined user type is an int, which python-pkcs11's hints omit.
    value = PROTECTED_AUTH if pin.on_pinpad else pin.reveal()
    login = {"rw": rw, "user_pin": value, "user_type": user_type}
    try:
        return cryptoki.open_logged_in(handles.token, handles.module.path, **login)
    except SESSION_LIMIT_ERRORS:
        if _can_open_session(handles.token):
            raise  # the error is the login's, not that of opening the session
        handles.module.close(handles.session)
    handles.key = handles.facts = None
    handles.session = cryptoki.open_logged_in(handles.token, handles.module.path, **login)
    return handles.session


def _can_open_session(token: Token) -> bool:
    try:
        token.open().close()
    except SESSION_LIMIT_ERRORS:
        return False
    return True


def pin_state_after(exc: HsmTollError) -> str | None:
    """The `Device.pin_state` that follows from *exc*; ``None`` if it is not about the PIN."""
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
