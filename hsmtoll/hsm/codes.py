"""
The return values of a module (CKR codes), and the HsmTollError that each becomes.

`MEANING` has every class of ``pkcs11.exceptions``, which a test verifies. A class that a later
version adds becomes a DeviceError with its name in it. Codes without a class are in
`hsmtoll.hsm.return_codes`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError, HsmTollError, PinIncorrect, PinNotTried, sanitized
from hsmtoll.hsm.return_codes import RETURN_CODES, in_words

if TYPE_CHECKING:
    from types import TracebackType

    from hsmtoll.errors import Scope

__all__ = [
    "MEANING",
    "NOT_TRIED",
    "REFUSED",
    "SESSION_LIMIT_ERRORS",
    "Meaning",
    "about_the_device",
    "about_the_key_or_pin",
    "away",
    "ckr_code",
    "describe",
    "knows_no_context_login",
    "recoverable",
    "translate_pkcs11_errors",
    "translated",
    "untried",
]


class Meaning(NamedTuple):
    """
    The HsmTollError for a CKR code: its class, *code*, *hint* and *scope*. *recoverable*: a new
    session, a new login or a restarted module may help. *away*: every call fails like this one,
    because the session or the device is lost.
    """

    error: type[HsmTollError]
    code: str
    hint: str | None = None
    recoverable: bool = False
    scope: Scope | None = None
    away: bool = False


_GONE: Final = Meaning(
    DeviceError,
    "device-gone",
    "is the device plugged in, powered and reachable?",
    recoverable=True,
    away=True,
)
_FAILED: Final = Meaning(
    DeviceError,
    "device-failed",
    "see the module's own log; if it persists, ask the device's administrator or the maker",
    recoverable=True,
)
_ROOM: Final = _FAILED._replace(hint="end or delete what is not needed: the memory is used up")
_STALE: Final = Meaning(
    DeviceError,
    "session-lost",
    "a new session is opened automatically; if it persists, see the device's own log",
    recoverable=True,
    away=True,
)
_BUSY: Final = Meaning(
    DeviceError,
    "device-busy",
    "end what else uses the device, or ask its administrator for more sessions",
    recoverable=True,
    scope="attempt",
    away=True,
)
_LOGIN: Final = Meaning(
    DeviceError, "not-logged-in", "give the PIN: HSMTOLL_HSM__PIN_FILE or another source"
)
_MECHANISM: Final = Meaning(
    DeviceError, "mechanism", "`hsmtoll objects` shows what the device can do"
)
_KEY: Final = Meaning(DeviceError, "key-unusable", "`hsmtoll objects` shows the key's attributes")
_SECRET: Final = Meaning(
    DeviceError,
    "attribute",
    "the device does not show this or does not let it be set: use the device's own tool for it",
)
_REQUEST: Final = Meaning(
    DeviceError,
    "module-refused",
    "the device does not offer this through its module: use the device's own tool for it",
)
_WRITE: Final = Meaning(
    DeviceError,
    "device-read-only",
    "the device does not let programs write this: use the device's own tool for it",
)
_WRONG_PIN: Final = Meaning(
    PinIncorrect, "pin-incorrect", "it was tried once and will not be tried again: correct it"
)
_LOCKED: Final = Meaning(
    PinNotTried, "pin-locked", "the device's administrator (SO PIN or PUK) must unblock it"
)
_PIN_STATE: Final = Meaning(
    PinNotTried, "pin-state", "set or change the user PIN with the device's own tool"
)
_UNEXPECTED: Final = Meaning(
    DeviceError,
    "unexpected",
    "this answer does not belong to this call: ask the module's maker, with its log",
)
#: For a PIN that the module refuses without checking it.
_PIN_FORM: Final = Meaning(
    DeviceError,
    "pin-form",
    "the PIN has another form than this module requires: check its length; YubiHSM: four"
    " hexadecimal digits, then the password; CloudHSM: user:password; a device with a pinpad:"
    " HSMTOLL_HSM__PIN_PROMPT=pinpad",
)
#: By `ReturnCode.kind`.
_KINDS: Final = {
    "refused": _REQUEST,
    "away": _FAILED,
    "locked": _LOCKED,
    "pin": _WRONG_PIN,
    "pin-state": _PIN_STATE,
}

MEANING: Final[dict[type[Exception], Meaning]] = {
    p11.PKCS11Error: _FAILED,
    p11.AnotherUserAlreadyLoggedIn: _LOGIN._replace(hint="the SO is logged in in this process"),
    p11.ArgumentsBad: _REQUEST,
    p11.AttributeReadOnly: _SECRET,
    p11.AttributeSensitive: _SECRET,
    p11.AttributeTypeInvalid: _SECRET,
    p11.AttributeValueInvalid: _SECRET,
    p11.DataInvalid: _REQUEST,
    p11.DataLenRange: _REQUEST,
    p11.DeviceError: _GONE,
    p11.DeviceMemory: _ROOM,
    p11.DeviceRemoved: _GONE,
    p11.DomainParamsInvalid: _UNEXPECTED,
    p11.EncryptedDataInvalid: _UNEXPECTED,
    p11.EncryptedDataLenRange: _UNEXPECTED,
    p11.ExceededMaxIterations: _FAILED,
    p11.FunctionCancelled: _FAILED,
    p11.FunctionFailed: _FAILED,
    p11.FunctionNotSupported: _REQUEST,
    p11.FunctionRejected: _FAILED._replace(hint="a user refused it at the device"),
    p11.GeneralError: _FAILED,
    p11.HostMemory: _ROOM,
    p11.KeyHandleInvalid: _STALE,
    p11.KeyIndigestible: _UNEXPECTED,
    p11.KeyNeeded: _UNEXPECTED,
    p11.KeyNotNeeded: _UNEXPECTED,
    p11.KeyNotWrappable: _UNEXPECTED,
    p11.KeySizeRange: _KEY,
    p11.KeyTypeInconsistent: _KEY,
    p11.KeyUnextractable: _UNEXPECTED,
    p11.MechanismInvalid: _MECHANISM,
    p11.MechanismParamInvalid: _MECHANISM,
    p11.MultipleObjectsReturned: Meaning(
        DeviceError, "key-ambiguous", "name one by its id; `hsmtoll objects` lists them"
    ),
    p11.MultipleTokensReturned: Meaning(
        DeviceError, "device-ambiguous", "name one by its serial; `hsmtoll objects` lists them"
    ),
    p11.NoEvent: _UNEXPECTED,
    p11.NoSuchKey: Meaning(DeviceError, "key-missing", "`hsmtoll objects` lists the keys"),
    p11.NoSuchToken: _GONE._replace(code="device-missing"),
    p11.ObjectHandleInvalid: _STALE,
    p11.OperationActive: _STALE,
    p11.OperationNotInitialized: _STALE,
    p11.PinExpired: _PIN_STATE._replace(
        hint="it was correct but has expired: change it with the device's own tool, and then here"
    ),
    p11.PinIncorrect: _WRONG_PIN,
    p11.PinInvalid: _WRONG_PIN,
    p11.PinLenRange: _WRONG_PIN._replace(
        hint="the device does not accept its length: correct it; it will not be tried again"
    ),
    p11.PinLocked: _LOCKED,
    p11.PinTooWeak: _PIN_STATE,
    p11.PublicKeyInvalid: _KEY,
    p11.RandomNoRNG: _UNEXPECTED,
    p11.RandomSeedNotSupported: _UNEXPECTED,
    p11.SessionClosed: _STALE,
    p11.SessionCount: _BUSY,
    p11.SessionExists: _BUSY,
    p11.SessionHandleInvalid: _STALE,
    p11.SessionReadOnly: _WRITE,
    p11.SessionReadOnlyExists: _BUSY,
    p11.SessionReadWriteSOExists: _BUSY,
    p11.SignatureInvalid: _UNEXPECTED,
    p11.SignatureLenRange: _UNEXPECTED,
    p11.SlotIDInvalid: _GONE,
    p11.TemplateIncomplete: _WRITE,
    p11.TemplateInconsistent: _WRITE,
    p11.TokenNotPresent: _GONE,
    p11.TokenNotRecognised: _GONE,
    p11.TokenWriteProtected: _WRITE,
    p11.UnwrappingKeyHandleInvalid: _UNEXPECTED,
    p11.UnwrappingKeySizeRange: _UNEXPECTED,
    p11.UnwrappingKeyTypeInconsistent: _UNEXPECTED,
    p11.UserAlreadyLoggedIn: _LOGIN._replace(hint="other code of this process logged in"),
    p11.UserNotLoggedIn: _LOGIN,
    p11.UserPinNotInitialized: _PIN_STATE,
    p11.UserTooManyTypes: _BUSY,
    p11.WrappedKeyInvalid: _UNEXPECTED,
    p11.WrappedKeyLenRange: _UNEXPECTED,
    p11.WrappingKeyHandleInvalid: _UNEXPECTED,
    p11.WrappingKeySizeRange: _UNEXPECTED,
    p11.WrappingKeyTypeInconsistent: _UNEXPECTED,
}

#: Answers to C_Login that mean that the PIN is wrong; the drivers of some cards answer
#: CKR_USER_NOT_LOGGED_IN to a wrong PIN.
REFUSED: Final = (p11.PinIncorrect, p11.PinInvalid, p11.PinLenRange, p11.UserNotLoggedIn)
#: Answers to C_Login that mean that the PIN was not checked. All others leave that open.
NOT_TRIED: Final = (
    p11.AnotherUserAlreadyLoggedIn,
    p11.ArgumentsBad,
    p11.DeviceRemoved,
    p11.FunctionCancelled,
    p11.FunctionNotSupported,
    p11.FunctionRejected,
    p11.HostMemory,
    p11.ObjectHandleInvalid,
    p11.OperationActive,
    p11.OperationNotInitialized,
    p11.PinLocked,
    p11.SessionCount,
    p11.SessionHandleInvalid,
    p11.SessionReadOnly,
    p11.SessionReadOnlyExists,
    p11.SlotIDInvalid,
    p11.TokenNotPresent,
    p11.TokenNotRecognised,
    p11.UserAlreadyLoggedIn,
    p11.UserPinNotInitialized,
    p11.UserTooManyTypes,
)
#: Some devices have a single session, or no read-only sessions beside a read-write one.
SESSION_LIMIT_ERRORS: Final = (
    p11.SessionCount,
    p11.SessionExists,
    p11.SessionReadOnlyExists,
    p11.SessionReadWriteSOExists,
)
_USER_TYPE_INVALID: Final = 0x103
_NOT_INITIALIZED: Final = 0x190
# About the session, the login, the token's presence or the module; not about a single object.
_ABOUT_THE_DEVICE: Final = (
    p11.DeviceRemoved,
    p11.OperationActive,
    p11.SessionClosed,
    p11.SessionCount,
    p11.SessionHandleInvalid,
    p11.SlotIDInvalid,
    p11.TokenNotPresent,
    p11.TokenNotRecognised,
    p11.UserNotLoggedIn,
)
# Stale handles, and a refusal by the user at the device.
_ABOUT_THE_KEY: Final = (
    p11.FunctionCancelled,
    p11.FunctionRejected,
    p11.KeyHandleInvalid,
    p11.ObjectHandleInvalid,
)


def untried(exc: Exception) -> bool:
    """Whether *exc*, the answer to a login, means that the PIN was not checked."""
    return isinstance(exc, NOT_TRIED) or ckr_code(exc) in (_USER_TYPE_INVALID, _NOT_INITIALIZED)


def about_the_device(exc: Exception) -> bool:
    """Whether *exc* is about session, login, device or module, so that every call would fail."""
    return isinstance(exc, _ABOUT_THE_DEVICE) or ckr_code(exc) == _NOT_INITIALIZED


def about_the_key_or_pin(exc: Exception) -> bool:
    """
    Whether *exc*, the answer to a signature, is about the PIN, the user, the session or the device,
    so that another mechanism does not help.
    """
    about_the_pin = _meaning(exc).error in (PinIncorrect, PinNotTried)
    return about_the_pin or about_the_device(exc) or isinstance(exc, _ABOUT_THE_KEY)


def away(exc: Exception) -> bool:
    """Whether *exc* means that the session or the device is lost: `Meaning.away`."""
    return _meaning(exc).away


def knows_no_context_login(exc: Exception, *, required: bool) -> bool:
    """
    Whether *exc*, the answer to a context-specific login, means that the device has none. If it
    is *required* for the key, CKR_ARGUMENTS_BAD is about the form of the PIN instead.
    """
    if isinstance(exc, p11.ArgumentsBad):
        return not required
    unsupported = (p11.OperationNotInitialized, p11.FunctionNotSupported)
    return isinstance(exc, unsupported) or ckr_code(exc) == _USER_TYPE_INVALID


#: CKR codes that python-pkcs11 reports by text alone: a part of the text → code.
_NUMBERS: Final = {
    "User type invalid": 0x103,
    "Buffer was too small": 0x150,
    "(not initialized)": 0x190,
    "(already initialized)": 0x191,
    "Parallel not supported": 0xB4,
}
_UNMAPPED: Final = "Unmapped error code "


def ckr_code(exc: Exception) -> int | None:
    """The CKR code of *exc*, if python-pkcs11 has no class for it; else None."""
    text = str(exc)
    if type(exc) is not p11.PKCS11Error:
        return None
    if text.startswith(_UNMAPPED):
        return int(text.removeprefix(_UNMAPPED), 16)
    return next((code for part, code in _NUMBERS.items() if part in text), None)


def describe(exc: Exception) -> str:
    """The answer *exc* as text: one line, name or class first, untrusted parts escaped."""
    code = ckr_code(exc)
    if code is not None:
        return in_words(code)
    return f"{type(exc).__name__}: {sanitized(exc)}" if str(exc) else type(exc).__name__


def _meaning(exc: Exception) -> Meaning:
    code = ckr_code(exc)
    if code in RETURN_CODES:
        return _KINDS[RETURN_CODES[code].kind]._replace(hint=RETURN_CODES[code].advice)
    if code is not None:
        return _FAILED._replace(hint="ask the maker what this code means, with the module's log")
    return next((MEANING[kind] for kind in type(exc).__mro__ if kind in MEANING), _FAILED)


def translated(exc: Exception, doing: str, *, login: bool = False) -> HsmTollError:
    """
    The HsmTollError for *exc*; its text is *doing* and the name of the answer. *login*: *exc* is
    the answer to a PIN.
    """
    meaning = _PIN_FORM if login and isinstance(exc, p11.ArgumentsBad) else _meaning(exc)
    return meaning.error(
        f"{doing}: the module answered {describe(exc)}",
        hint=meaning.hint,
        code=meaning.code,
        retryable=meaning.recoverable,
        scope=meaning.scope,
    )


def recoverable(exc: BaseException) -> bool:
    """Whether a new session, a new login or a restarted module may help after *exc*."""
    if isinstance(exc, HsmTollError) and exc.retryable:
        return True
    source = exc.__cause__ if isinstance(exc, HsmTollError) else exc
    return isinstance(source, p11.PKCS11Error) and _meaning(source).recoverable


def translate_pkcs11_errors(doing: str) -> _Translation:
    """
    A context manager for calls of the module: PKCS11Error is raised as HsmTollError. *doing* as for
    `translated`.
    """
    return _Translation(doing)


class _Translation:
    """The context manager of `translate_pkcs11_errors`; a class is faster than a generator."""

    __slots__ = ("_doing",)

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            return
        if isinstance(exc, p11.PKCS11Error):
            raise translated(exc, self._doing) from exc
        if isinstance(exc, struct.error):
            # The length of an attribute does not fit its type.
            raise DeviceError(
                f"{self._doing}: the module answered with a value that cannot be read",
                hint="ask the module's maker, with its log",
                code="module-answer",
            ) from exc
