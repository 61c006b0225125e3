"""
Messages and log records on stderr: lines of text or JSON objects, by one formatter.

A record may have *event*, *profile*, *caller*, *jti* and *trace* (``extra``): members
of the JSON object. Nothing else of a record is written, no traceback in particular.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hsmtoll.cli.streams import write_line
from hsmtoll.errors import sanitized

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["StderrHandler", "at_least_info", "say", "use_format"]

_MEMBERS: Final = ("profile", "caller", "jti", "trace")

#: Level → priority of syslog(3).
_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class _Formatter(logging.Formatter):
    """*as_json*: one JSON object a record. *journal*: stderr is journald's."""

    as_json = False
    journal = False

    def format(self, record: logging.LogRecord) -> str:
        """Format *record*; ``prefix`` and ``hints`` are attributes of a message of `say`."""
        prefix = getattr(record, "prefix", None)
        # A log record may quote anything; a message was put together from what is safe to show.
        message = sanitized(record.getMessage()) if prefix is None else record.getMessage()
        level = record.levelname.lower()
        hints: tuple[str, ...] = getattr(record, "hints", ())
        if self.as_json:
            lines = [self._object(record, level, message, hints)]
        else:
            start = f"hsmtoll: {level}: " if prefix is None else prefix
            lines = [f"{start}{message}", *(f"hint: {each}" for each in hints)]
        if self.journal:
            # sd-daemon(3): journald takes the priority off again.
            lines = [f"<{_PRIORITIES.get(record.levelno, 3)}>{each}" for each in lines]
        return "\n".join(lines)

    @staticmethod
    def _object(record: logging.LogRecord, level: str, message: str, hints: Iterable[str]) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        members = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": level,
            "event": getattr(record, "event", record.name.removeprefix("hsmtoll.")),
            "message": message,
            "hint": "\n".join(hints),
            **{name: sanitized(getattr(record, name, None) or "") for name in _MEMBERS},
        }
        # ASCII only: control characters and line separators of any kind are escaped.
        return json.dumps({name: value for name, value in members.items() if value})


_formatter: Final = _Formatter()


def use_format(name: str | None) -> None:
    """Write JSON if *name* is ``json``; detect whether stderr is journald's (systemd.exec(5))."""
    _formatter.as_json = name == "json"
    try:
        seen = os.fstat(2)
    except OSError:
        return
    _formatter.journal = os.environ.get("JOURNAL_STREAM") == f"{seen.st_dev}:{seen.st_ino}"


def say(
    message: str,
    *,
    level: int = logging.INFO,
    event: str = "message",
    code: str | None = None,
    hints: tuple[str, ...] = (),
    jti: str | None = None,
    trace: str | None = None,
) -> None:
    """Write *message*, of one line, and *hints*. *code* is that of an error: it is the event."""
    attributes = {
        "name": "hsmtoll",
        "msg": message,
        "levelno": level,
        "levelname": logging.getLevelName(level),
        "prefix": "hsmtoll: " if code is None else f"hsmtoll: {code}: ",
        "hints": hints,
        "event": code or event,
        "jti": jti,
        "trace": trace,
    }
    write_line(_formatter.format(logging.makeLogRecord(attributes)))


class StderrHandler(logging.Handler):
    """Writes log records to the current sys.stderr, as other messages."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_formatter)

    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))


def at_least_info(name: str) -> None:
    """Log what a daemon does (INFO) with the logger *name*, even without -v."""
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
