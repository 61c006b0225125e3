"""
Sources of a PIN, and the type that holds one.

A PIN is read only when a login needs it. It is never taken from the command line.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import locale
import logging
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.files import check_trusted, first_untrusted_component

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.settings import Hsm

__all__ = [
    "Pin",
    "PinCommand",
    "PinFile",
    "PinPad",
    "PinSource",
    "PinTerminal",
    "PinValue",
    "cancel_prompt",
    "source_of",
]

_log = logging.getLogger(__name__)
#: Longer than any PIN or passphrase of a device; a larger file is not a PIN file.
_LONGEST: Final = 1024
#: Bytes: the longest PIN with a line break, and one more byte to notice that it is longer.
_MOST_READ: Final = _LONGEST + 2

#: Words that only a shell interprets, and beginnings of such words.
_OPERATORS: Final = frozenset({"|", "||", "&&", "<", ">", ">>"})
_FOR_SHELLS: Final = ("$", "`", "<", ">", "2>")
_SHELL: Final = "put it into a script, or write sh -c '…'"


class Pin:
    """
    A PIN and its source. Its repr is ``Pin(from HSMTOLL_HSM__PIN)``, without the value.

    *origin* is the name of the source, and for a file its inode and mtime; nothing in it is derived
    from the value. *typed*: the user has just entered it. The PIN of a pinpad has no value, because
    the device prompts for it itself.
    """

    __slots__ = ("_value", "origin", "source", "typed")

    def __init__(
        self, value: str | None, *, source: str, version: str = "", typed: bool = False
    ) -> None:
        self._value = value
        self.source = source
        self.typed = typed or value is None
        self.origin = f"{source} {version}".rstrip()

    @property
    def on_pinpad(self) -> bool:
        """Whether the user enters the PIN at the device (protected authentication path)."""
        return self._value is None

    def reveal(self) -> str | None:
        """The value, for C_Login and for the hashes of the PIN log; None with a pinpad."""
        return self._value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pin) or self.origin != other.origin:
            return False
        value, other_value = (each.reveal() or "" for each in (self, other))
        return hmac.compare_digest(value.encode(), other_value.encode())

    def __hash__(self) -> int:
        return hash(self.origin)

    def __repr__(self) -> str:
        return f"Pin(from {self.source})"

    def __reduce__(self) -> str:
        raise TypeError("a PIN cannot be pickled or copied")


class PinSource(Protocol):
    """A source of a PIN."""

    def read(self, *, device: str) -> Pin:
        """
        The PIN; *device* is the name of the device for a prompt. ConfigurationError
        (``pin-source``) if there is none.
        """


@dataclass(frozen=True, slots=True)
class PinValue:
    """A PIN that is the value of a setting."""

    value: Pin

    @classmethod
    def of(cls, value: str, *, name: str = "HSMTOLL_HSM__PIN") -> PinValue:
        """*value* is the text of the setting *name*."""
        return cls(_pin(value, source=name))

    def read(self, *, device: str) -> Pin:
        """The value of the setting."""
        del device
        return self.value


@dataclass(frozen=True, slots=True)
class PinFile:
    """
    A PIN in a file of one line, with or without a line break. Links are followed, so that systemd
    credentials and Kubernetes secrets work. From a named pipe, the PIN must come within *timeout*
    seconds.
    """

    path: Path
    name: str = "HSMTOLL_HSM__PIN_FILE"
    timeout: float = 30.0

    def read(self, *, device: str) -> Pin:
        """The file's line. A file that others may change is refused."""
        del device
        try:
            # Without O_NONBLOCK, open() of a named pipe waits for a writer without limit.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(self.path, flags), "rb", buffering=0) as file:
                facts = os.fstat(file.fileno())
                checked = stat.S_ISREG(facts.st_mode) or stat.S_ISFIFO(facts.st_mode)
                # Whoever can write a wrong PIN can lock the device; so can the file's group.
                if checked and facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise ConfigurationError(
                        f"the PIN file {sanitized(self.path)} can be written by others",
                        hint=f"chmod go-w {sanitized(self.path)}",
                        code="pin-file-writable",
                    )
                if facts.st_mode & stat.S_IROTH and stat.S_ISREG(facts.st_mode):
                    _log.warning("the PIN file %s can be read by everybody", sanitized(self.path))
                place = first_untrusted_component(self.path)
                if place is not None:
                    raise ConfigurationError(
                        f"the PIN file {sanitized(self.path)}: "
                        f"others may change {sanitized(place)}",
                        hint="root or you must own it and each directory and link of its path;"
                        f" nobody else may write to them: chmod go-w {sanitized(place)}",
                        code="pin-file-writable",
                    )
                data = _whole(file, self.timeout)
        except OSError as exc:
            raise ConfigurationError(
                f"the PIN file {sanitized(self.path)} ({self.name}) cannot be read: {exc.strerror}",
                code="pin-source",
            ) from exc
        version = f"inode {facts.st_ino} mtime {facts.st_mtime_ns}"
        return _pin(_line(data, name=self.name), source=self.name, version=version)


def _whole(file: FileIO, timeout: float) -> bytes:
    """The content of *file*, at most _MOST_READ bytes. TimeoutError after *timeout* seconds."""
    data, until = b"", time.monotonic() + timeout
    ready = select.poll()
    ready.register(file, select.POLLIN)
    while len(data) < _MOST_READ:
        if not ready.poll(1000 * max(until - time.monotonic(), 0)):
            raise TimeoutError(errno.ETIMEDOUT, f"not all of it came within {timeout:g} s")
        part = file.read(_MOST_READ - len(data))
        if not part:
            break
        data += part
    return data


@dataclass(frozen=True, slots=True, repr=False)
class PinCommand:
    """
    A command that prints the PIN. It runs without a shell, without a terminal, at most *timeout*
    seconds, and without HSMTOLL_ variables in its environment.
    """

    command: str
    name: str = "HSMTOLL_HSM__PIN_COMMAND"
    timeout: float = 30.0

    def read(self, *, device: str) -> Pin:
        """
        The output of the command; its stderr is that of this process. Its argv is never shown,
        except for a file in it that others may change, which is refused (``unsafe-file``).
        """
        del device
        # Errors are raised outside of the except blocks: the original exceptions contain the argv
        # or the output, and would stay reachable as __context__.
        failed = None
        try:
            argv = shlex.split(self.command)
        except ValueError:
            argv = []
        if not argv:
            raise self._failed("is not a command line")
        # A program that gets the operator as an argument may print other text than the PIN.
        if operator := next((word for word in argv if word in _OPERATORS), None):
            raise self._failed(f"has {operator} in it: it is run without a shell", hint=_SHELL)
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HSMTOLL_")}
        _check_files(argv, f"the PIN command ({self.name}):")
        try:
            # A new session, so that its children are killed with it after the time limit.
            process = subprocess.Popen(
                argv,
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as exc:
            failed = f"cannot be started: {getattr(exc, 'strerror', None) or type(exc).__name__}"
        hint = None
        if any(word.startswith("~") for word in argv):
            hint = "~ is not expanded here; write the whole path"
        elif any(word.startswith(_FOR_SHELLS) for word in argv):
            hint = f"it is run without a shell: {_SHELL}"
        if failed:
            raise self._failed(failed, hint=hint)
        with process:
            out, failed = self._printed(process)
        if failed:
            raise self._failed(failed)
        if process.returncode:
            raise self._failed(f"ended with exit code {process.returncode}", hint=hint)
        return _pin(_line(out, name=self.name), source=self.name)

    def _printed(self, process: subprocess.Popen[bytes]) -> tuple[bytes, str | None]:
        """The output of *process*, and the reason if it was killed or printed too much."""
        out, failed, until = b"", None, time.monotonic() + self.timeout
        try:
            out = _whole(cast("FileIO", process.stdout), self.timeout)
            if len(out) == _MOST_READ:
                failed = f"prints more than {_LONGEST} bytes"
            else:
                process.wait(max(until - time.monotonic(), 0))
        except (TimeoutError, subprocess.TimeoutExpired):
            failed = f"did not answer within {self.timeout:g} s"
        finally:
            if failed or process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return out, failed

    def _failed(self, what: str, *, hint: str | None = None) -> ConfigurationError:
        return ConfigurationError(
            f"the PIN command ({self.name}) {what}", hint=hint, code="pin-source"
        )

    def __repr__(self) -> str:
        return f"PinCommand({self.name})"


def _check_files(argv: list[str], what: str) -> None:
    """ConfigurationError if other accounts can change what the command runs: it has our rights."""
    for path in _paths_in(argv):
        check_trusted(path, what)


def _paths_in(argv: list[str]) -> Iterator[Path]:
    """
    The files that *argv* names, also within ``sh -c '…'``: paths, absolute or relative to the
    working directory, and programs of the PATH.
    """
    for word in argv:
        for each in dict.fromkeys((word, *re.split(r"[\s=:;,&|<>()'\"`]+", word))):
            program = shutil.which(each) if each else None
            if program is not None:
                yield Path(program)
            # The permissions of a device file do not protect its content: skip it.
            if each and os.path.lexists(each) and not _is_device(each):
                yield Path(each)


def _is_device(path: str) -> bool:
    with contextlib.suppress(OSError):
        mode = Path(path).stat().st_mode
        return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return False


@dataclass(frozen=True, slots=True)
class PinTerminal:
    """A prompt on ``/dev/tty``, regardless of stdin and stdout, for a single attempt."""

    name: str = "HSMTOLL_HSM__PIN_PROMPT=terminal"
    what: str = "PIN"

    def read(self, *, device: str) -> Pin:
        """The line that the user enters, without echo."""
        try:
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            raise ConfigurationError(
                f"the PIN cannot be typed ({self.name}): this process has no terminal",
                hint="Give it in a file: HSMTOLL_HSM__PIN_FILE.",
                code="pin-source",
            ) from None
        try:
            line = _typed(terminal, f"{self.what} of {sanitized(device)}: ")
        except (OSError, termios.error):
            raise ConfigurationError(
                f"the PIN could not be typed ({self.name}): the terminal does not answer",
                code="pin-source",
            ) from None
        finally:
            os.close(terminal)
        if line is None:
            raise ConfigurationError(
                f"the PIN was not typed ({self.name}): the program ends", code="pin-source"
            )
        if not line:
            raise EOFError
        encoding = locale.getpreferredencoding(do_setlocale=False)
        return _pin(_line(line, name=self.name, encoding=encoding), source=self.name, typed=True)


class _Typing:
    """The open prompt: its terminal and the previous attributes; *over*: cancelled for good."""

    at: tuple[int, list[Any]] | None = None
    over = False


def cancel_prompt() -> None:
    """
    Cancel the prompt for a PIN, whichever thread waits for it, and restore the terminal's echo. For
    the end of the process: later prompts end at once.
    """
    _Typing.over = True
    if _Typing.at is not None:
        terminal, before = _Typing.at
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _typed(terminal: int, prompt: str) -> bytes | None:
    # Not getpass: only the user can end its read. In a thread other than the main one, Ctrl-C would
    # wait for it, and the process would leave a terminal without echo.
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    ready = select.poll()
    ready.register(terminal, select.POLLIN)
    _Typing.at = terminal, before
    try:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)
        os.write(terminal, prompt.encode(errors="replace"))
        while not ready.poll(100):
            if _Typing.over:
                return None
        return os.read(terminal, 4096)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        _Typing.at = None
        os.write(terminal, b"\n")


@dataclass(frozen=True, slots=True)
class PinPad:
    """The user enters the PIN at the device."""

    name: str = "HSMTOLL_HSM__PIN_PROMPT=pinpad"

    def read(self, *, device: str) -> Pin:
        """A PIN without a value."""
        del device
        return Pin(None, source=self.name)


def _line(data: bytes, *, name: str, encoding: str = "utf-8") -> str:
    text = None
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode(encoding)
    if text is None:
        raise ConfigurationError(f"the PIN from {name} is not UTF-8", code="pin-source")
    return text.removesuffix("\n").removesuffix("\r")


def _pin(value: str, *, source: str, version: str = "", typed: bool = False) -> Pin:
    wrong = (
        "is empty" if not value
        else "has a line break or a NUL in it" if set(value) & set("\0\n\r")
        # Surrogates are bytes of the environment that are not UTF-8, which C_Login requires.
        else "is not UTF-8" if any("\ud800" <= one <= "\udfff" for one in value)
        # Some editors add it invisibly; the device would count it as a wrong PIN.
        else "begins with a byte order mark: save it without one" if value[0] == "\ufeff"
        else f"is longer than {_LONGEST} characters" if len(value) > _LONGEST
        else None
    )  # fmt: skip
    if wrong:
        raise ConfigurationError(f"the PIN from {source} {wrong}", code="pin-source")
    unlikely = None if typed else _unlikely(value)
    if unlikely:
        which = "SIGNING_" if "SIGNING" in source else ""
        raise ConfigurationError(
            f"the PIN from {source} {unlikely}: it was not tried",
            hint="write only the PIN, on one line; if the PIN has these characters, type it: "
            f"HSMTOLL_HSM__{which}PIN_PROMPT=terminal accepts it as typed",
            code="pin-form",
        )
    return Pin(value, source=source, version=version, typed=typed)


#: The line of an environment file or a letter, but not a PIN in base64, which may end in "=".
_ASSIGNMENT: Final = re.compile(r"(?:export\s+)?\w*PIN\w*(?:\s*=\s*[^=\s]|:\s)", re.IGNORECASE)
_COMMENT: Final = re.compile(r"\s#\s")
_QUOTES: Final = ('""', "''", "``", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb")


def _unlikely(value: str) -> str | None:
    """Why *value* is probably not the PIN, so that it must not use up an attempt; else None."""
    if any(end.isspace() or not end.isprintable() for end in (value[0], value[-1])):
        return "begins or ends with a blank or an invisible character"
    if len(value) > 1 and value[0] + value[-1] in _QUOTES:
        return "is in quotation marks"
    if _ASSIGNMENT.match(value):
        return "has a name before it, as in PIN=…"
    if _COMMENT.search(value):
        return "has a comment behind it, as in … # text"
    return None


def source_of(hsm: Hsm, kind: str, uri: KeyUri | None) -> PinSource | None:
    """
    The source of a PIN by the settings: *kind* is ``pin`` or ``signing_pin``. *uri* may name a file
    (pin-source). None if there is no source.
    """
    name = f"HSMTOLL_HSM__{kind.upper()}"
    value, file, command, prompt = (
        getattr(hsm, f"{kind}{part}") for part in ("", "_file", "_command", "_prompt")
    )
    if value is not None:
        return PinValue.of(value.get_secret_value(), name=name)
    if command is not None:
        return PinCommand(command.get_secret_value(), name=f"{name}_COMMAND")
    if prompt == "terminal":
        return PinTerminal(what="Signing PIN" if kind == "signing_pin" else "PIN")
    if prompt == "pinpad":
        return PinPad()
    if file is not None:
        return PinFile(file, name=f"{name}_FILE")
    if uri is not None and uri.pin_source:
        return PinFile(Path(uri.pin_source), name="pin-source of HSMTOLL_HSM__KEY")
    return None
