"""JSON that others wrote: read strictly where it decides something, leniently where it informs."""

from __future__ import annotations

import json
from typing import Any, Final

__all__ = ["read_lenient", "read_strict"]

#: Lists and objects that a text may have, and bytes for each one beyond: what they cost in time
#: and memory is a hundred times what their two bytes show.
_MOST_VALUES: Final = 20_000
_BYTES_EACH: Final = 32


def read_strict(raw: bytes | str) -> Any:
    """
    The value; ValueError for what is no JSON (RFC 8259 has neither NaN nor Infinity), is nested
    without end, or has a name twice in one object: readers differ in which one counts.
    """
    try:
        return json.loads(raw, parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def read_lenient(body: bytes) -> Any:
    """The value; ``None`` for what is no JSON, or has more values than its size explains."""
    if body.count(b"[") + body.count(b"{") > _MOST_VALUES + len(body) // _BYTES_EACH:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
