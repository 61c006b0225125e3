"""stdin, stdout and stderr of a command: the result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from hsmtoll.errors import ConfigurationError, OutcomeUnknown, foreign

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer

__all__ = [
    "ReaderLeft",
    "StderrHandler",
    "after_sending",
    "keep_for_results",
    "own_streams",
    "print_json",
    "print_result",
    "say",
    "to_json",
    "write_line",
]

UNWRITTEN: Final = "result-unwritten"


class ReaderLeft(Exception):
    """Nobody reads stdout any more."""


class _Result(io.FileIO):
    """stdout: what cannot be written is told as what it is, whichever command wrote it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise ReaderLeft from None
        except OSError as exc:
            raise ConfigurationError(
                f"the result cannot be written ({exc.strerror})",
                hint="see where stdout goes: is it open, and is there room?",
                code=UNWRITTEN,
            ) from exc


class _Remarks(io.FileIO):
    """stderr: what cannot be told there changes no outcome."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def own_streams() -> None:
    """From now on stdout and stderr are ours: neither crashes, whatever they lead to."""
    if sys.stdin is None:
        # It was closed: whoever reads it is told so by the system.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    for number in (1, 2):
        # Another program that has them as well, such as node, may have set them otherwise.
        os.set_blocking(number, True)
    sys.stdout = _text(_Result(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Remarks(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: TextIO | None) -> TextIO:
    encoding = before.encoding if before else None
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


@contextlib.contextmanager
def after_sending(what: str) -> Iterator[None]:
    """
    Where *what* was sent and the answer cannot be written, OutcomeUnknown: another code would
    look as if it could be sent again.
    """
    try:
        yield
    except ConfigurationError as exc:
        if exc.code != UNWRITTEN:
            raise
        raise OutcomeUnknown(
            f"{what}: was sent, and {exc}",
            hint=f"look it up and do not repeat it; {exc.hint}",
            code=UNWRITTEN,
        ) from exc


def say(line: str, prefix: str = "hsmtoll") -> None:
    write_line(f"{prefix}: {line}")


def write_line(line: str) -> None:
    # One write for all of it: two threads would mix their lines.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def keep_for_results() -> None:
    """From now on descriptor 1 leads where stderr does: modules write where they like."""
    # Somebody else's stdout (a test's) stays what it is.
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Result) or raw.fileno() != 1:
        return
    sys.stdout.flush()
    # Never 2, which would lead here again.
    kept = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    os.dup2(2, 1)
    sys.stdout = _text(_Result(kept, "w"), sys.stdout)


class StderrHandler(logging.Handler):
    """Log records as lines of ours, wherever stderr points at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {foreign(record.getMessage())}")


def print_json(value: dict[str, Any]) -> None:
    click.echo(to_json({"schema": 1, **value}))


def print_result(value: dict[str, Any], *lines: str, as_json: bool) -> None:
    """*value* for programs, or *lines* for a person."""
    if as_json:
        print_json(value)
    else:
        click.echo("\n".join(lines))


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON for stdout; with escapes of its own where the locale does not hold a character."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text
