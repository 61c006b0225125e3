"""
Workarounds: PKCS#11 functions through python-pkcs11, for modules that deviate from the standard.

    find_objects    objects by template; one unreadable object does not end the search
    find_by_value   objects by one value, although one object makes C_FindObjects fail
    read_attribute  one attribute; a second attempt if the first error is not about the device
    prefetched      several attributes with one C_GetAttributeValue, if the module supports that
    list_slots      every slot, although C_GetSlotInfo fails for one
    open_logged_in  a session after C_Login; closed if C_Login fails
    close_session   closes a session, although C_Logout fails
    with_sign       a private key with ``sign``, although CKA_SIGN cannot be read

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import sys
import threading
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, PKCS11Error, _pkcs11
from pkcs11 import exceptions as p11

from hsmtoll.hsm.codes import about_the_device, ckr_code, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pkcs11 import Object, ObjectClass, Session, Slot, Token

#: Two undocumented names of python-pkcs11 are used, because no public ones serve: SignMixin, as
#: only keys with a readable CKA_SIGN get ``sign`` (`with_sign`), and FunctionFailed, the only error
#: that it tolerates when it reads the class of an object (`_tolerant`). pyproject.toml bounds the
#: version, and a test of each notices if a new version lacks it.
_inner: Any = _pkcs11

__all__ = [
    "Unreadable",
    "close_session",
    "find_by_value",
    "find_objects",
    "list_slots",
    "open_logged_in",
    "prefetched",
    "read_attribute",
    "with_sign",
]

#: The answers of the standard for an attribute that cannot be read.
_NOT_SHOWN: Final = (p11.AttributeTypeInvalid, p11.AttributeSensitive)
_BUFFER_TOO_SMALL: Final = 0x150
#: Attempts to list the slots while readers are being plugged in.
_TRIES: Final = 3


class Unreadable(Exception):
    """An attribute that cannot be read; its text is the reason, in a few words."""


# ---------------------------------------------------------------------- objects


def find_objects(
    session: Session, wanted: dict[Attribute, Any], *, most: int | None = None
) -> list[Object]:
    """
    The objects that match *wanted*, at most *most*; also those whose attributes cannot be read.
    PKCS11Error if the search itself fails.
    """
    with _without_reports(), _tolerant():
        try:
            search: Any = session.get_objects(wanted)
            with contextlib.closing(search):
                return list(islice(search, most))
        except PKCS11Error as exc:
            # C_FindObjectsFinal is called in any case, and its error hides the first one.
            first = exc.__context__
            raise (first if isinstance(first, PKCS11Error) else exc) from None


def find_by_value(session: Session, kind: ObjectClass, name: Attribute, value: Any) -> list[Object]:
    """The objects of the class *kind* whose *name* has the *value*; errors as `find_objects`."""
    try:
        return find_objects(session, {Attribute.CLASS: kind, name: value})
    except PKCS11Error as exc:
        if about_the_device(exc):
            raise
    # A damaged object makes a search by value fail, but no other search.
    return [one for one in find_objects(session, {Attribute.CLASS: kind}) if _has(one, name, value)]


def _has(thing: Object, name: Attribute, value: Any) -> bool:
    try:
        return bool(read_attribute(thing, name) == value)
    except Unreadable:
        return False


def read_attribute(thing: Object, name: Attribute) -> Any:
    """
    The value of the attribute *name*.

    Raises Unreadable if it cannot be read, and PKCS11Error if the error is about the session, the
    login or the device instead of this object.
    """
    try:
        try:
            return thing[name]
        except _NOT_SHOWN:
            raise
        except PKCS11Error as exc:
            if about_the_device(exc):
                raise
            # Raises an unambiguous error if the device is gone.
            thing.session.token.slot.get_token()
            return thing[name]
    except PKCS11Error as exc:
        if about_the_device(exc):
            raise
        raise Unreadable(describe(exc)) from exc
    except (ValueError, NotImplementedError, MemoryError, struct.error) as exc:
        # A vendor-defined value, or one whose length does not fit its type.
        raise Unreadable("a value that cannot be parsed") from exc


def prefetched(thing: Object, names: Sequence[Attribute]) -> Any:
    """
    *thing*, with the attributes *names* read in advance by one call, if the module can do that;
    otherwise they are read on access. Raises PKCS11Error as `read_attribute`.
    """
    try:
        return _Known(thing, thing.get_attributes(list(names)))
    except PKCS11Error as exc:
        if about_the_device(exc):
            raise
    except (ValueError, NotImplementedError, MemoryError, struct.error):
        pass
    return thing


class _Known:
    """An object with some attributes read in advance."""

    def __init__(self, thing: Object, values: dict[Attribute, Any]) -> None:
        self.session = thing.session
        self._thing = thing
        self._values = values

    def __getitem__(self, name: Attribute) -> Any:
        return self._values[name] if name in self._values else self._thing[name]


def with_sign(key: Any) -> Any:
    """*key* with a ``sign`` method, which python-pkcs11 adds only if CKA_SIGN can be read."""
    if hasattr(key, "sign"):
        return key
    return type("PrivateKey", (_inner.SignMixin, type(key)), {})(key.wrapper)


@contextlib.contextmanager
def _tolerant() -> Iterator[None]:
    # python-pkcs11 reads ten attributes of each object at once, and after an error one by one,
    # tolerating three codes. Modules return many others for an attribute that they do not know,
    # and any for a damaged object; the whole search would fail.
    before = _inner.FunctionFailed
    _inner.FunctionFailed = PKCS11Error
    try:
        yield
    finally:
        _inner.FunctionFailed = before


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    # If C_FindObjectsInit fails, python-pkcs11 still calls C_FindObjectsFinal when the search is
    # garbage-collected; the interpreter would print the error of that to stderr.
    except_hook, unraisable_hook = sys.excepthook, sys.unraisablehook

    def printed(kind: Any, exc: BaseException, trace: Any) -> None:
        if not isinstance(exc, PKCS11Error):
            except_hook(kind, exc, trace)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if not isinstance(args.exc_value, PKCS11Error):
            unraisable_hook(args)

    sys.excepthook, sys.unraisablehook = printed, unraisable
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = except_hook, unraisable_hook


# ---------------------------------------------------------------------- slots and sessions

_GET_SLOT_INFO, _OPEN_SESSION, _CLOSE_SESSION, _FUNCTIONS = 5, 12, 13, 68
_Call = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p)
_Open = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, *[ctypes.c_void_p] * 3)
_Close = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)
#: Bytes of the two texts of a CK_SLOT_INFO, and of the whole: flags and two versions follow.
_SLOT_TEXT, _SLOT_INFO = 64 + 32, 64 + 32 + 8 + 4


def list_slots(lib: Any, path: str) -> list[tuple[Slot, PKCS11Error | None]]:
    """Every slot with a token, and the error of C_GetSlotInfo for it, if any."""
    for left in reversed(range(_TRIES)):
        try:
            return [(slot, None) for slot in lib.get_slots(token_present=True)]
        except PKCS11Error as exc:
            if ckr_code(exc) == _BUFFER_TOO_SMALL and left:
                continue  # a reader was plugged in between the two calls of C_GetSlotList
            if about_the_device(exc):
                raise
            return _slots_one_by_one(lib, path, exc)
    return []


def _slots_one_by_one(
    lib: Any, path: str, first: PKCS11Error
) -> list[tuple[Slot, PKCS11Error | None]]:
    # python-pkcs11 returns no slots at all if C_GetSlotInfo fails for one. So, for one listing,
    # C_GetSlotInfo is replaced by a function that returns an empty description instead.
    broken: dict[int, int] = {}

    def described(real: Any, slot: int, info: int) -> int:
        answer = int(real(slot, info))
        if answer:
            broken[slot] = answer
            ctypes.memset(info, ord(" "), _SLOT_TEXT)
            ctypes.memset(info + _SLOT_TEXT, 0, _SLOT_INFO - _SLOT_TEXT)
        return 0

    with _function_replaced(_GET_SLOT_INFO, path, _Call, described) as replaced:
        if not replaced:
            raise first
        seen: list[Slot] = lib.get_slots(token_present=True)
    if not broken:
        raise first  # C_GetSlotInfo was not the cause
    return [(slot, _unmapped(broken.get(slot.slot_id))) for slot in seen]


def _unmapped(answer: int | None) -> PKCS11Error | None:
    return None if answer is None else PKCS11Error(f"Unmapped error code {answer:#x}")


def open_logged_in(token: Token, path: str, **login: Any) -> Session:
    """
    A session after C_Login, of the module at *path*.

    python-pkcs11 opens the session first, and leaves it open if C_Login fails, so that each failure
    would use up one of the device's sessions. It is closed here, unless the function list of the
    module cannot be found, as with p11-kit, which returns a new one to each caller.
    """
    left: list[int] = []
    me = threading.get_ident()

    def opened(real: Any, slot: int, flags: int, *rest: Any) -> int:
        answer = int(real(slot, flags, *rest))
        # Other code in this process may open sessions at the same time.
        if not answer and threading.get_ident() == me:
            left.append(ctypes.c_ulong.from_address(rest[-1]).value)
        return answer

    with _function_replaced(_OPEN_SESSION, path, _Open, opened):
        try:
            return token.open(**login)
        except BaseException:
            for handle in left:
                _close(path, handle)
            raise


@contextlib.contextmanager
def _function_replaced(
    place: int, path: str, kind: Any, replacement: Callable[..., int]
) -> Iterator[bool]:
    """
    Replace the function at index *place* of the module's CK_FUNCTION_LIST by *replacement*, which
    gets the original, of type *kind*, as its first argument. Yields whether that was possible.
    """
    table = _table(path)
    if table is None or not _writable(ctypes.addressof(table)):
        yield False
        return
    before = table[place]
    real = kind(before)
    # A named reference, because ctypes frees a callback without one.
    entry = kind(lambda *given: replacement(real, *given))
    table[place] = ctypes.cast(entry, ctypes.c_void_p).value
    try:
        yield True
    finally:
        table[place] = before


def close_session(session: Any, path: str) -> None:
    """
    Close *session* of the module at *path*; errors are ignored.

    python-pkcs11 calls C_Logout first if the session was opened with a PIN, and leaves it open if
    that fails, as it does after the device has ended the login.
    """
    with contextlib.suppress(PKCS11Error):
        session.close()
        return
    _close(path, session.handle)


def _close(path: str, handle: int) -> None:
    table = _table(path)
    if table is not None and table[_CLOSE_SESSION]:
        _Close(table[_CLOSE_SESSION])(handle)


@lru_cache
def _table(path: str) -> Any:
    """The module's CK_FUNCTION_LIST; a copy without effect for p11-kit. None if there is none."""
    try:
        get = ctypes.CDLL(path).C_GetFunctionList
    except (OSError, AttributeError):
        return None
    there = ctypes.c_void_p()
    if get(ctypes.byref(there)) or not there.value:
        return None
    # After the version, which is padded to the size of a pointer.
    return (ctypes.c_void_p * _FUNCTIONS).from_address(there.value + ctypes.sizeof(ctypes.c_void_p))


def _writable(address: int) -> bool:
    try:
        with Path("/proc/self/maps").open(encoding="ascii", errors="replace") as maps:
            for line in maps:
                area, rights, *_ = line.split(maxsplit=2)
                start, end = (int(each, 16) for each in area.split("-"))
                if start <= address < end:
                    return "w" in rights
    except OSError:
        pass
    return False
