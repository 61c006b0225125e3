"""
One worker process as the device that uses it sees it: started when it is first asked, given the
PIN when it asks for it, and ended where it hangs or says what cannot be understood.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from hsmtoll.errors import ConfigurationError, DeviceError, HsmTollError, foreign
from hsmtoll.hsm.codec import decode, encode
from hsmtoll.hsm.pipe import Pipe, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.hsm.pin import Pin
    from hsmtoll.hsm.pipe import Opening

__all__ = ["WorkerProcess"]

#: Seconds that a person may take at a pinpad, on top of the deadline.
_AT_THE_PINPAD: Final = 120.0
#: Seconds that a child may take to log out.
_GOODBYE: Final = 1.0
#: Seconds that Python may take to start on a machine that is busy.
_STARTING: Final = 30.0
#: Of the service that this process is, set by its service manager: the worker is no service.
#: Everything else is handed down, because makers' modules read variables of many names.
_NOT_HANDED_DOWN: Final = frozenset(
    {
        *("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES"),
        *("MAINPID", "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "FDSTORE"),
    }
)


class WorkerProcess:
    """
    One worker process, started when it is first asked and after it was killed. *program* is the
    module that it runs; an answer may take *deadline* seconds.
    """

    def __init__(self, opening: Opening, *, program: str, deadline: float) -> None:
        self._opening = encode(opening)
        self._program = program
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._there: Pipe | None = None
        # Whether the process has said anything, and what Python wrote before it did.
        self._met = False
        self._words: IO[bytes] | None = None
        #: As of its last answer.
        self.generation = 0
        weakref.finalize(self, _ended, self.__dict__)

    @property
    def running(self) -> bool:
        """Whether there is a process that has been asked before."""
        return self._process is not None

    def ask(
        self,
        question: dict[str, Any],
        wanted: Any,
        *,
        doing: str,
        pins: Callable[[str, str], Pin],
        more: float = 0.0,
    ) -> tuple[Reply, Any]:
        """
        The reply, and the answer to *question* as a value of the type *wanted*, unless the reply is
        an error. *more*: seconds on top of the deadline.

        Raises DeviceError (``device-hung``, ``module-crashed``) where there is none,
        ConfigurationError (``worker-start``) where no module was reached, and what *pins* raises.
        """
        deadline = self._deadline + more
        try:
            there = self._started()
            # The time that Python takes to start is not the module's.
            until = time.monotonic() + deadline + (0.0 if self._met else _STARTING)
            there.socket.settimeout(self._deadline)
            there.send(question)
            while True:
                said = there.receive(until=until)
                if not self._met:
                    self._met = True
                    self._forget_words()
                    until = time.monotonic() + deadline
                if "hello" in said:
                    continue
                if "pin" not in said:
                    return _answer(said, wanted)
                typing = self._hand_over(there, said, pins)
                until = time.monotonic() + deadline + typing
        except TimeoutError:
            if not self._met:
                raise self._not_started(doing) from None
            raise DeviceError(
                f"{doing}: the module did not answer within {deadline:g} s, and its process"
                " was ended",
                hint="The next call starts a new one. Is the device reachable?",
                code="device-hung",
            ) from None
        except (EOFError, OSError, ValueError, TypeError, KeyError):
            if not self._met:
                raise self._not_started(doing) from None
            raise DeviceError(
                f"{doing}: the module's process {self._fate()}",
                hint="The next call starts a new one. Ask the module's maker, with its log.",
                code="module-crashed",
            ) from None

    def _not_started(self, doing: str) -> HsmTollError:
        """The error for a process that ended, or was silent, before a module was loaded."""
        fate = self._fate()
        said = ""
        if self._words is not None:
            self._words.seek(0)
            lines = self._words.read(64 * 1024).decode("utf-8", "replace").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "")
            self._forget_words()
        return ConfigurationError(
            f"{doing}: the isolating process could not be started: "
            + (foreign(said.strip()) if said else f"it {fate}"),
            hint=f"{foreign(_interpreter())} was to run it; no module was loaded. "
            "HSMTOLL_HSM__ISOLATION=none runs the module in this process",
            code="worker-start",
        )

    def _forget_words(self) -> None:
        if self._words is not None:
            self._words.close()
            self._words = None

    def _hand_over(
        self, there: Pipe, said: dict[str, Any], pins: Callable[[str, str], Pin]
    ) -> float:
        """Answer the question for a PIN; the seconds that a person may take for it."""
        try:
            pin = pins(str(said["pin"]), str(said["device"]))
        except HsmTollError as exc:
            there.socket.settimeout(self._deadline)
            there.send({"error": encode(exc)})
            return 0.0
        there.socket.settimeout(self._deadline)
        version = pin.origin.removeprefix(pin.source).strip()
        value = {"value": pin.reveal(), "source": pin.source, "version": version}
        there.send(value | {"typed": pin.typed})
        return _AT_THE_PINPAD if pin.on_pinpad else 0.0

    def _started(self) -> Pipe:
        if self._there is not None:
            return self._there
        python, path = _interpreter(), _import_path()
        ours, theirs = socket.socketpair()
        # gevent's sockets are not blocking, and say so to nobody.
        os.set_blocking(theirs.fileno(), True)
        # What Python says before there is a worker is for the error; later it is the module's own.
        words = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the worker has spoken
        stderr = _stderr()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        *(python, "-P", "-c", _BOOT, self._program),
                        *(str(stderr), *path, str(theirs.fileno())),
                    ],
                    pass_fds=[theirs.fileno(), stderr],
                    stdin=subprocess.DEVNULL,
                    # Modules write where they like; results are ours to write.
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    env=_environment(),
                    # Ctrl-C at the terminal is for the caller, who says what becomes of the call.
                    start_new_session=True,
                )
        except OSError as exc:
            words.write(str(exc.strerror).encode())
            raise
        finally:
            os.close(stderr)
            # Not before: gevent forks in Python, and what is ours is let go of in a fork.
            self._words = words
        self._met = False
        self._there = there = Pipe(ours)
        self.generation = 0
        there.send(self._opening)
        return there

    def _fate(self) -> str:
        if self._process is None:
            return "could not be started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_GOODBYE)
            if code < 0:
                return f"was ended by {signal.Signals(-code).name}"
            return f"ended with {code}"
        return "said nothing that can be understood"

    def kill(self) -> None:
        """End it, whatever it does."""
        _ended(self.__dict__)

    def forget(self) -> None:
        """It is another process's: let go of it, and leave it in peace."""
        if self._there is not None:
            self._there.socket.close()
        self._there = self._process = None
        self._forget_words()

    def end(self) -> None:
        """Let it log out and end, or end it."""
        if self._there is not None and self._process is not None:
            with contextlib.suppress(OSError, EOFError, ValueError, subprocess.TimeoutExpired):
                self._there.socket.settimeout(_GOODBYE)
                self._there.send({"do": "close"})
                self._there.receive(until=time.monotonic() + _GOODBYE)
                self._process.wait(_GOODBYE)
        self.kill()


def _answer(said: dict[str, Any], wanted: Any) -> tuple[Reply, Any]:
    """*said*, if it is an answer at all: TypeError for what a module gone wrong may say."""
    reply = decode(Reply, {name: each for name, each in said.items() if name != "answer"})
    return reply, decode(wanted, said["answer"]) if reply.error is None else None


def _ended(parts: dict[str, Any]) -> None:
    process, parts["_process"] = parts.get("_process"), None
    there, parts["_there"] = parts.get("_there"), None
    words, parts["_words"] = parts.get("_words"), None
    if words is not None:
        words.close()
    if there is not None:
        there.socket.close()
    # Only who started a process may end it: a forked child knows its number too.
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()


#: What a worker runs: its module, the path of imports, and the two descriptors, are its arguments.
_BOOT: Final = (
    "import importlib, sys; sys.path[:] = dict.fromkeys([*sys.argv[3:-1], *sys.path]); "
    "importlib.import_module(sys.argv[1]).main(int(sys.argv[-1]), int(sys.argv[2]))"
)


def _interpreter() -> str:
    """A Python for the worker: not every program that has one in it is one (uWSGI)."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if re.match(r"python|pypy", Path(sys.executable or "").name):
        return sys.executable
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    for prefix in dict.fromkeys(prefixes):
        for each in (name, "python3", "python"):
            found = Path(prefix) / "bin" / each
            if os.access(found, os.X_OK):
                return str(found)
    return shutil.which(name) or sys.executable


def _import_path() -> list[str]:
    """
    Where this program imports from, and hsmtoll itself was, as absolute paths; never the working
    directory as such.
    """
    # An archive that was named by a relative path is where it was when the program started.
    own = _AT_THE_START / Path(__file__).parents[2]
    return [str(own), *(_absolute(each) for each in sys.path if each)]


def _absolute(path: str) -> str:
    return str(_AT_THE_START / path)


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


#: The working directory when this was imported: relative places are meant from there.
_AT_THE_START: Final = _working_directory()


def _stderr() -> int:
    """A copy of the program's own, or of nothing where it was closed."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("HSMTOLL_") and name not in _NOT_HANDED_DOWN
    }
