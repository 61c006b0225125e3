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


def decode(kind: Any, encoded: Any) -> Any:
    """The value of the type *kind* whose encoding is *encoded*."""
    return _reader(kind)(encoded)


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

    def read(encoded: Any) -> Any:
        if _of(dict, encoded).keys() - members.keys():
            raise TypeError(f"no {kind}")
        return kind(**{name: members[name](each) for name, each in encoded.items()})

    return read


def _generic_reader(origin: Any, kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    readers = [_reader(kind) for kind in kinds if kind is not ...]
    if origin in (Union, types.UnionType):
        # None is written last in annotations, but is the most frequent value.
        return partial(_first_of, readers[::-1])
    if origin is dict:
        return lambda encoded: {
            _of(str, name): readers[1](each) for name, each in _of(dict, encoded).items()
        }
    if origin is tuple and kinds[-1] is not ...:
        return lambda encoded: tuple(
            read(each) for read, each in zip(readers, _of(list, encoded), strict=True)
        )
    made = frozenset if origin is frozenset else tuple
    return lambda encoded: made(map(readers[0], _of(list, encoded)))


def _first_of(readers: list[Callable[[Any], Any]], encoded: Any) -> Any:
    for read in readers:
        try:
            return read(encoded)
        except (TypeError, ValueError):
            continue
    raise TypeError("none of the types that are expected")


def _of(kind: type[_T], encoded: Any) -> _T:
    # Not isinstance, as True is an int.
    if type(encoded) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return encoded


_READERS: Final[dict[Any, Callable[[Any], Any]]] = {
    bytes: lambda encoded: _of(str, encoded).encode("iso-8859-1"),
    Path: lambda encoded: Path(_of(str, encoded)),
    int: lambda encoded: int(encoded, 16) if isinstance(encoded, str) else _of(int, encoded),
    float: lambda encoded: float(encoded) if type(encoded) is int else _of(float, encoded),
    HsmTollError: lambda encoded: from_data(_of(dict, encoded), unknown=DeviceError),
}


@lru_cache
def hints(of: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, or of a function's arguments and its ``return``."""
    return get_type_hints(of)
