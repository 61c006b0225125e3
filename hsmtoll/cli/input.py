"""What a command is given: texts, files and stdin, and the JSON in them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from hsmtoll.errors import UsageError, foreign
from hsmtoll.jsonio import read_strict

__all__ = [
    "NO_JSON",
    "no_json",
    "parse_json",
    "place_of",
    "read_body",
    "read_content",
    "read_stdin",
]

#: Levels. The messages of the guide have some ten.
_DEEPEST: Final = 100

#: Characters. A longer text is no path.
_MAX_PATH: Final = 4_096

#: Why what looks like JSON may be none.
NO_JSON: Final = (
    "it has neither NaN nor Infinity (RFC 8259), and here no name twice in one object and"
    f" {_DEEPEST} levels at most"
)


def read_body(given: str | None) -> bytes | None:
    if given is None or not given.startswith("@"):
        # The bytes that were typed, whatever encoding they are in.
        return os.fsencode(given) if given is not None else None
    return read_content(given, "body:")


def read_content(file: str, what: str) -> bytes:
    """The bytes of FILE or @FILE; - or @- is stdin. UsageError where they cannot be read."""
    name = file.removeprefix("@")
    if name == "-":
        return read_stdin(what.partition(":")[0])
    try:
        return Path(name).read_bytes()
    except OSError as exc:
        raise UsageError(
            f"{what} {foreign(name)} cannot be read ({exc.strerror})",
            hint="~ is not expanded here; write the whole path" if name[:1] == "~" else None,
        ) from exc


def read_stdin(what: str, limit: int = -1) -> bytes:
    try:
        return sys.stdin.buffer.read(limit)
    except OSError as exc:
        raise UsageError(f"{what}: stdin cannot be read ({exc.strerror})") from exc


def parse_json(raw: bytes) -> Any:
    """*raw* as JSON; ValueError as `read_strict`, and for more levels than a message has."""
    value = read_strict(raw)
    level = [value]
    for _ in range(_DEEPEST):
        # Only what holds others has a next level.
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def place_of(exc: ValueError) -> str:
    """Where the JSON of a message is wrong, if that is known."""
    if isinstance(exc, json.JSONDecodeError):
        return f" (line {exc.lineno}, column {exc.colno})"
    return ""


def no_json(given: str) -> str:
    there = len(given) < _MAX_PATH and "\0" not in given and Path(given).is_file()
    return f"did you mean @{foreign(given)}?" if there else NO_JSON
