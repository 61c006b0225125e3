"""
What python-pkcs11 does not do by itself where a module answers oddly.

    found       a search that leaves no report of the interpreter on stderr behind
    with_value  a search by value that one damaged object does not stop
    read        one attribute, asked for twice where the answer says nothing about the device
    at_once     several attributes by one question, where the module answers it
    slots       every slot, although one of them answers C_GetSlotInfo with an error
    logged_in   a session with a login, and none where the login is refused
    closed      a session, although C_Logout is refused
    able        a private key that signs, although CKA_SIGN cannot be read

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

from hsmtoll.hsm.codes import about_the_device, number, said

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pkcs11 import Object, ObjectClass, Session, Slot, Token

#: Two names that python-pkcs11 does not document, and that nothing public takes the place of:
#: SignMixin, because it gives ``sign`` to keys alone that show CKA_SIGN, and FunctionFailed, which
#: is all that it passes over when it asks an object for its class (`able`, `_patient`).
#: Its version is bounded in pyproject.toml; a test of each says what a new one lacks.
_inner: Any = _pkcs11

__all__ = [
    "Unreadable",
    "able",
    "at_once",
    "closed",
    "found",
    "logged_in",
    "read",
    "slots",
    "with_value",
]

#: What the standard lets a module say to an attribute that it does not show.
_NOT_SHOWN: Final = (p11.AttributeTypeInvalid, p11.AttributeSensitive)
_BUFFER_TOO_SMALL: Final = 0x150
#: How often the list of slots is asked for while readers are plugged in.
_TRIES: Final = 3


class Unreadable(Exception):
    """An attribute that cannot be read; its text is the reason, in a few words."""


# ---------------------------------------------------------------------- objects


def found(
    session: Session, wanted: dict[Attribute, Any], *, most: int | None = None
) -> list[Object]:
    """
    The objects that match, *most* of them at the most. One that answers every question with an
    error is among them.

    Raises PKCS11Error where the search itself is refused.
    """
    with _quiet(), _patient():
        try:
            search: Any = session.get_objects(wanted)
            with contextlib.closing(search):
                return list(islice(search, most))
        except PKCS11Error as exc:
            # C_FindObjectsFinal is called in any case, and its refusal hides the first one.
            first = exc.__context__
            raise (first if isinstance(first, PKCS11Error) else exc) from None


def with_value(session: Session, kind: ObjectClass, name: Attribute, value: Any) -> list[Object]:
    """The objects of the class *kind* whose attribute *name* has the *value*; errors as `found`."""
    try:
        return found(session, {Attribute.CLASS: kind, name: value})
    except PKCS11Error as exc:
        if about_the_device(exc):
            raise
    # One object that is damaged stops a search by value, and no other.
    return [one for one in found(session, {Attribute.CLASS: kind}) if _has(one, name, value)]


def _has(thing: Object, name: Attribute, value: Any) -> bool:
    try:
        return bool(read(thing, name) == value)
    except Unreadable:
        return False


def read(thing: Object, name: Attribute) -> Any:
    """
    The value of the attribute *name*.

    Raises Unreadable where the device does not show it, and PKCS11Error where the answer is
    about the session, the login or the device, and not about this object.
    """
    try:
        try:
            return thing[name]
        except _NOT_SHOWN:
            raise
        except PKCS11Error as exc:
            if about_the_device(exc):
                raise
            # A device that is gone says so here, in words that cannot be misunderstood.
            thing.session.token.slot.get_token()
            return thing[name]
    except PKCS11Error as exc:
        if about_the_device(exc):
            raise
        raise Unreadable(said(exc)) from exc
    except (ValueError, NotImplementedError, MemoryError, struct.error) as exc:
        # A maker's own value, or one of a length that its type does not have.
        raise Unreadable("a value that cannot be understood") from exc


def at_once(thing: Object, names: Sequence[Attribute]) -> Any:
    """
    *thing*, with those of *names* that one question gets read already; the others are read when
    they are asked for. Raises PKCS11Error as `read`.
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
    """An object of which some attributes are read already."""

    def __init__(self, thing: Object, values: dict[Attribute, Any]) -> None:
        self.session = thing.session
        self._thing = thing
        self._values = values

    def __getitem__(self, name: Attribute) -> Any:
        return self._values[name] if name in self._values else self._thing[name]


def able(key: Any) -> Any:
    """*key* with python-pkcs11's ``sign``, which it has only where CKA_SIGN can be read."""
    if hasattr(key, "sign"):
        return key
    return type("PrivateKey", (_inner.SignMixin, type(key)), {})(key.wrapper)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    # python-pkcs11 asks each object for ten attributes at once, and then one by one, where it goes
    # on after three codes alone. Modules answer with many others to an attribute that they do not
    # know, and with any to an object that is damaged; without this nothing is found then.
    before = _inner.FunctionFailed
    _inner.FunctionFailed = PKCS11Error
    try:
        yield
    finally:
        _inner.FunctionFailed = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # A search that was refused at its beginning is ended all the same when it is collected; what
    # the module says to that would be printed by the interpreter, in two parts.
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
#: The text of a CK_SLOT_INFO, and all of it: flags and two versions follow.
_SLOT_TEXT, _SLOT_INFO = 64 + 32, 64 + 32 + 8 + 4


def slots(lib: Any, path: str) -> list[tuple[Slot, PKCS11Error | None]]:
    """Every slot with a token in it, and the error that C_GetSlotInfo gives for it, if any."""
    for left in reversed(range(_TRIES)):
        try:
            return [(slot, None) for slot in lib.get_slots(token_present=True)]
        except PKCS11Error as exc:
            if number(exc) == _BUFFER_TOO_SMALL and left:
                continue  # one more was plugged in between its two questions
            if about_the_device(exc):
                raise
            return _slots_one_by_one(lib, path, exc)
    return []


def _slots_one_by_one(
    lib: Any, path: str, first: PKCS11Error
) -> list[tuple[Slot, PKCS11Error | None]]:
    # python-pkcs11 gives no slot at all where one of them cannot be described. So, for one
    # question, an empty description takes the place of the error.
    broken: dict[int, int] = {}

    def described(real: Any, slot: int, info: int) -> int:
        answer = int(real(slot, info))
        if answer:
            broken[slot] = answer
            ctypes.memset(info, ord(" "), _SLOT_TEXT)
            ctypes.memset(info + _SLOT_TEXT, 0, _SLOT_INFO - _SLOT_TEXT)
        return 0

    with _instead_of(_GET_SLOT_INFO, path, _Call, described) as replaced:
        if not replaced:
            raise first
        seen: list[Slot] = lib.get_slots(token_present=True)
    if not broken:
        raise first  # it was about something else
    return [(slot, _unmapped(broken.get(slot.slot_id))) for slot in seen]


def _unmapped(answer: int | None) -> PKCS11Error | None:
    return None if answer is None else PKCS11Error(f"Unmapped error code {answer:#x}")


def logged_in(token: Token, path: str, **login: Any) -> Session:
    """
    A session of the module at *path*, with a login.

    python-pkcs11 opens the session first, and leaves it open where the login is refused, so that
    each refusal would take one of those that the device has. It is closed here, unless the module
    has a list of functions of its own for everybody, as p11-kit does.
    """
    left: list[int] = []
    me = threading.get_ident()

    def opened(real: Any, slot: int, flags: int, *rest: Any) -> int:
        answer = int(real(slot, flags, *rest))
        # Others in the process may use the module, too.
        if not answer and threading.get_ident() == me:
            left.append(ctypes.c_ulong.from_address(rest[-1]).value)
        return answer

    with _instead_of(_OPEN_SESSION, path, _Open, opened):
        try:
            return token.open(**login)
        except BaseException:
            for handle in left:
                _close(path, handle)
            raise


@contextlib.contextmanager
def _instead_of(place: int, path: str, kind: Any, ours: Callable[..., int]) -> Iterator[bool]:
    """
    In the list of functions of the module at *path*, *ours* in the place of one of the type *kind*,
    which it gets as its first argument. Yields whether the list lets that be done.
    """
    table = _table(path)
    if table is None or not _writable(ctypes.addressof(table)):
        yield False
        return
    before = table[place]
    real = kind(before)
    # Held by its name: ctypes frees what nobody holds.
    entry = kind(lambda *given: ours(real, *given))
    table[place] = ctypes.cast(entry, ctypes.c_void_p).value
    try:
        yield True
    finally:
        table[place] = before


def closed(session: Any, path: str) -> None:
    """
    Close *session* of the module at *path*; what is lost already is let go of.

    python-pkcs11 logs out first where the session was opened with a PIN, and leaves it open where
    the module refuses that: after a login that the device has ended, each would stay for good.
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
    """The module's own list of functions. That of p11-kit is a new one for everybody who asks."""
    try:
        get = ctypes.CDLL(path).C_GetFunctionList
    except (OSError, AttributeError):
        return None
    there = ctypes.c_void_p()
    if get(ctypes.byref(there)) or not there.value:
        return None
    # Behind the version, which takes the room of a pointer.
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
