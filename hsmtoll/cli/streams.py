"""stdin, stdout and stderr of a command: the result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from hsmtoll.errors import ConfigurationError, OutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer

__all__ = [
    "StdoutClosed",
    "after_sending",
    "install_streams",
    "print_json",
    "print_result",
    "redirect_fd1_to_stderr",
    "to_json",
    "write_line",
]

RESULT_UNWRITTEN: Final = "result-unwritten"


class StdoutClosed(Exception):
    """The reader has closed stdout (EPIPE)."""


class _ResultStdout(io.FileIO):
    """stdout; write errors are ConfigurationError, a closed pipe StdoutClosed."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise StdoutClosed from None
        except OSError as exc:
            raise ConfigurationError(
                f"the result cannot be written ({exc.strerror})",
                hint="see where stdout goes: is it open, and is there room?",
                code=RESULT_UNWRITTEN,
            ) from exc


class _TolerantStderr(io.FileIO):
    """stderr; write errors (EPIPE, ENOSPC) are ignored."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def install_streams() -> None:
    """Replace stdout and stderr by streams that handle write errors and closed descriptors."""
    if sys.stdin is None:
        # Descriptor 0 is closed: let reads from it raise OSError.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    for number in (1, 2):
        # Another process that shares them, such as node, may have made them non-blocking.
        os.set_blocking(number, True)
    sys.stdout = _text(_ResultStdout(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_TolerantStderr(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: TextIO | None) -> TextIO:
    encoding = before.encoding if before else None
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


@contextlib.contextmanager
def after_sending(what: str) -> Iterator[None]:
    """
    Raise OutcomeUnknown if the answer to *what* cannot be written: with another exit code the
    user might send it again.
    """
    try:
        yield
    except ConfigurationError as exc:
        if exc.code != RESULT_UNWRITTEN:
            raise
        raise OutcomeUnknown(
            f"{what}: was sent, and {exc}",
            hint=f"look it up and do not repeat it; {exc.hint}",
            code=RESULT_UNWRITTEN,
        ) from exc


def write_line(line: str) -> None:
    # A single write, so that lines of several threads do not mix.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def redirect_fd1_to_stderr() -> None:
    """Redirect descriptor 1 to stderr, so that PKCS#11 modules cannot write into the result."""
    # Only for a stdout of `install_streams`; a test's is not changed.
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _ResultStdout) or raw.fileno() != 1:
        return
    sys.stdout.flush()
    # From 3 on: descriptor 2 may be closed, and is stderr.
    kept = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    os.dup2(2, 1)
    sys.stdout = _text(_ResultStdout(kept, "w"), sys.stdout)


def print_json(value: dict[str, Any]) -> None:
    click.echo(to_json({"schema": 1, **value}))


def print_result(value: dict[str, Any], *lines: str, as_json: bool) -> None:
    """Print *value* as JSON, or *lines*."""
    if as_json:
        print_json(value)
    else:
        click.echo("\n".join(lines))


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON for stdout; non-ASCII is escaped if the encoding of stdout lacks a character."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text
