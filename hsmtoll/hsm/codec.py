"""
Encodes values as JSON for the pipe between a device and its worker, and decodes them by type.

`decode` raises TypeError or ValueError for anything but the expected type: a worker whose module
has corrupted its memory can send neither code nor a value that the annotation does not allow.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NewType,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from hsmtoll.errors import DeviceError, HsmTollError, from_data, to_data

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["decode", "encode", "hints"]

_T = TypeVar("_T")

#: JSON readers keep smaller integers exact; larger ones, as of RSA, are sent as hexadecimal text.
_LARGEST: Final = 2**53


def encode(value: Any) -> Any:
    """*value* in the types of JSON; bytes become text, one character each (ISO 8859-1)."""
    if value is None or isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < _LARGEST else hex(value)
    if isinstance(value, bytes):
        return value.decode("iso-8859-1")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, HsmTollError):
        return to_data(value)
    if isinstance(value, dict):
        return {name: encode(each) for name, each in value.items()}
    if is_dataclass(value):
        return {each.name: encode(getattr(value, each.name)) for each in fields(value)}
    return [encode(each) for each in value]


def decode(kind: Any, said: Any) -> Any:
    """The value of the type *kind* that was encoded as *said*."""
    return _reader(kind)(said)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """The decoder for *kind*, made once, as each signature uses it."""
    if isinstance(kind, NewType):
        return _reader(kind.__supertype__)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_reader(kind)
    if get_origin(kind) is not None:
        return _generic_reader(get_origin(kind), get_args(kind))
    return _READERS.get(kind) or partial(_of, kind or type(None))


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    members = {each.name: _reader(hints(kind)[each.name]) for each in fields(kind)}

    def read(said: Any) -> Any:
        if _of(dict, said).keys() - members.keys():
            raise TypeError(f"no {kind}")
        return kind(**{name: members[name](each) for name, each in said.items()})

    return read


def _generic_reader(origin: Any, kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    readers = [_reader(kind) for kind in kinds if kind is not ...]
    if origin in (Union, types.UnionType):
        # None is written last in annotations, but is the most frequent value.
        return partial(_first_of, readers[::-1])
    if origin is dict:
        return lambda said: {
            _of(str, name): readers[1](each) for name, each in _of(dict, said).items()
        }
    if origin is tuple and kinds[-1] is not ...:
        return lambda said: tuple(
            read(each) for read, each in zip(readers, _of(list, said), strict=True)
        )
    made = frozenset if origin is frozenset else tuple
    return lambda said: made(map(readers[0], _of(list, said)))


def _first_of(readers: list[Callable[[Any], Any]], said: Any) -> Any:
    for read in readers:
        try:
            return read(said)
        except (TypeError, ValueError):
            continue
    raise TypeError("none of the types that are expected")


def _of(kind: type[_T], said: Any) -> _T:
    # Not isinstance, as True is an int.
    if type(said) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return said


_READERS: Final[dict[Any, Callable[[Any], Any]]] = {
    bytes: lambda said: _of(str, said).encode("iso-8859-1"),
    Path: lambda said: Path(_of(str, said)),
    int: lambda said: int(said, 16) if isinstance(said, str) else _of(int, said),
    float: lambda said: float(said) if type(said) is int else _of(float, said),
    HsmTollError: lambda said: from_data(_of(dict, said), unknown=DeviceError),
}


@lru_cache
def hints(of: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, or of a function's arguments and its ``return``."""
    return get_type_hints(of)
