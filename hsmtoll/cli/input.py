"""Input of the commands: text, files and stdin, and JSON in them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from hsmtoll.errors import UsageError, sanitized
from hsmtoll.jsonio import read_strict

__all__ = ["check_json", "read_body", "read_content", "read_json", "read_message", "read_stdin"]

#: Levels. The messages of the guide have about ten.
_DEEPEST: Final = 100

#: Characters. A longer text is not a path.
_MAX_PATH: Final = 4_096

_NOT_JSON: Final = (
    "JSON as in RFC 8259 is expected: no NaN or Infinity, no name twice in one object,"
    f" at most {_DEEPEST} levels"
)


def read_body(given: str) -> bytes:
    """The bytes of *given*: text, @FILE, or @- for stdin. UsageError if they cannot be read."""
    # The bytes that were typed, in whatever encoding.
    return read_content(given, "body:") if given.startswith("@") else os.fsencode(given)


def read_content(file: str, what: str) -> bytes:
    """The bytes of FILE or @FILE; - or @- is stdin. UsageError if they cannot be read."""
    name = file.removeprefix("@")
    if name == "-":
        return read_stdin(what.partition(":")[0])
    try:
        return Path(name).read_bytes()
    except OSError as exc:
        raise UsageError(
            f"{what} {sanitized(name)} cannot be read ({exc.strerror})",
            hint="~ is not expanded here; write the whole path" if name[:1] == "~" else None,
        ) from exc


def read_stdin(what: str, limit: int = -1) -> bytes:
    """stdin, *limit* bytes at most. UsageError, beginning with *what*, if it cannot be read."""
    try:
        return sys.stdin.buffer.read(limit)
    except OSError as exc:
        raise UsageError(f"{what}: stdin cannot be read ({exc.strerror})") from exc


def read_json(given: str, what: str) -> Any:
    """*given* as for `read_body`, parsed as JSON. UsageError, beginning with *what*."""
    return check_json(read_body(given), what, given)


def check_json(raw: bytes, what: str, given: str = "") -> Any:
    """*raw* parsed as JSON. UsageError, beginning with *what*; *given* may be a file's name."""
    try:
        value = read_strict(raw)
        _check_depth(value)
    except ValueError as exc:
        at = exc if isinstance(exc, json.JSONDecodeError) else None
        place = f" (line {at.lineno}, column {at.colno})" if at else ""
        is_path = 0 < len(given) < _MAX_PATH and "\0" not in given and Path(given).is_file()
        raise UsageError(
            f"{what} is not JSON{place}",
            hint=f"did you mean @{sanitized(given)}?" if is_path else _NOT_JSON,
        ) from None
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        # Only containers have a next level.
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def read_message(given: str | None) -> dict[str, Any]:
    """
    The JSON object of `hsmtoll submit`: in FILE or @FILE, on stdin (None, -), or as text if *given*
    begins with {. UsageError if there is none.
    """
    if given is not None and given.lstrip().startswith("{"):
        raw = os.fsencode(given)
    else:
        raw = read_content(given or "-", "submit: neither a JSON object nor a file:")
    message = check_json(raw, "submit: the message")
    if not isinstance(message, dict):
        raise UsageError("submit: the message is not a JSON object", hint="{…} is expected")
    try:
        json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        # Valid JSON (an escape, many digits) that cannot be encoded again.
        raise UsageError(
            "submit: the message contains half of a surrogate pair or too large a number"
        ) from None
    return message
