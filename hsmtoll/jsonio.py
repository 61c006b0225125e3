"""Parsing of untrusted JSON: strict for decisions, lenient for information."""

from __future__ import annotations

import json
from typing import Any, Final

__all__ = ["read_lenient", "read_strict"]

#: Limit for lists and objects, which need a hundred times the memory of their two bytes: this
#: number, and one more for each so many bytes of the text.
_MAX_CONTAINERS: Final = 20_000
_BYTES_PER_CONTAINER: Final = 32


def read_strict(raw: bytes | str) -> Any:
    """
    The parsed value. ValueError if *raw* is not JSON (NaN and Infinity are not, RFC 8259), is
    nested too deeply, or has a duplicate name in an object, of which parsers take different values.
    """
    try:
        return json.loads(
            raw, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates
        )
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def read_lenient(body: bytes) -> Any:
    """The parsed value; ``None`` if *body* is not JSON or has too many lists and objects."""
    if body.count(b"[") + body.count(b"{") > _MAX_CONTAINERS + len(body) // _BYTES_PER_CONTAINER:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a duplicate name in an object")
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
