"""
The parent's side of one worker process: starts it on first use, sends the PIN on request, and kills
it if it hangs or sends an invalid message.
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

from hsmtoll.errors import ConfigurationError, DeviceError, HsmTollError, sanitized
from hsmtoll.hsm.codec import decode, encode
from hsmtoll.hsm.pipe import Pipe, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.hsm.pin import Pin
    from hsmtoll.hsm.pipe import Opening

__all__ = ["WorkerProcess"]

#: Seconds for the user to enter a PIN at a pinpad, in addition to the deadline.
_PINPAD_TIMEOUT: Final = 120.0
#: Seconds for a child to log out and end.
_LOGOUT_TIMEOUT: Final = 1.0
#: Seconds for Python to start on a busy machine.
_START_TIMEOUT: Final = 30.0
#: Variables of the service manager for this process, which do not concern the worker. All others
#: are inherited, because vendors' modules read various variables.
_NOT_INHERITED: Final = frozenset(
    {
        *("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES"),
        *("MAINPID", "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "FDSTORE"),
    }
)


class WorkerProcess:
    """
    One worker process, started on first use and again after it was killed. *program* is the module
    that it runs; each answer may take *deadline* seconds.
    """

    def __init__(self, opening: Opening, *, program: str, deadline: float) -> None:
        self._opening = encode(opening)
        self._program = program
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        # Whether the process has sent a message, and Python's stderr until then.
        self._responded = False
        self._startup_output: IO[bytes] | None = None
        #: `Device.generation` of its last answer.
        self.generation = 0
        weakref.finalize(self, _kill, self.__dict__)

    @property
    def running(self) -> bool:
        """Whether the process is started."""
        return self._process is not None

    def ask(
        self,
        call: dict[str, Any],
        result_type: Any,
        *,
        doing: str,
        pins: Callable[[str, str], Pin],
        more: float = 0.0,
    ) -> tuple[Reply, Any]:
        """
        Send *call*. Returns the reply and, unless that has an error, the result as *result_type*.
        *more*: seconds in addition to the deadline.

        Raises DeviceError (``device-hung``, ``module-crashed``) without a reply, ConfigurationError
        (``worker-start``) if the process could not be started, and the errors of *pins*.
        """
        deadline = self._deadline + more
        try:
            pipe = self._started()
            # The start of Python does not count against the deadline.
            until = time.monotonic() + deadline + (0.0 if self._responded else _START_TIMEOUT)
            pipe.socket.settimeout(self._deadline)
            pipe.send(call)
            while True:
                message = pipe.receive(until=until)
                if not self._responded:
                    self._responded = True
                    self._discard_startup_output()
                    until = time.monotonic() + deadline
                if "hello" in message:
                    continue
                if "pin" not in message:
                    return _answer(message, result_type)
                typing = self._send_pin(pipe, message, pins)
                until = time.monotonic() + deadline + typing
        except TimeoutError:
            if not self._responded:
                raise self._not_started(doing) from None
            raise DeviceError(
                f"{doing}: the module did not answer within {deadline:g} s, and its process"
                " was killed",
                hint="The next call starts a new one. Is the device reachable?",
                code="device-hung",
            ) from None
        except (EOFError, OSError, ValueError, TypeError, KeyError):
            if not self._responded:
                raise self._not_started(doing) from None
            raise DeviceError(
                f"{doing}: the module's process {self._exit_status()}",
                hint="The next call starts a new one. Ask the module's maker, with its log.",
                code="module-crashed",
            ) from None

    def _not_started(self, doing: str) -> HsmTollError:
        """The error for a process that ended, or did not respond, before a module was loaded."""
        fate = self._exit_status()
        message = ""
        if self._startup_output is not None:
            self._startup_output.seek(0)
            lines = self._startup_output.read(64 * 1024).decode("utf-8", "replace").split("\n")
            message = next((line for line in reversed(lines) if line.strip()), "")
            self._discard_startup_output()
        return ConfigurationError(
            f"{doing}: the isolating process could not be started: "
            + (sanitized(message.strip()) if message else f"it {fate}"),
            hint=f"it is run by {sanitized(_interpreter())}; no module was loaded. "
            "HSMTOLL_HSM__ISOLATION=none runs the module in this process",
            code="worker-start",
        )

    def _discard_startup_output(self) -> None:
        if self._startup_output is not None:
            self._startup_output.close()
            self._startup_output = None

    def _send_pin(
        self, pipe: Pipe, message: dict[str, Any], pins: Callable[[str, str], Pin]
    ) -> float:
        """Send the requested PIN. Returns the seconds that the user may take (pinpad)."""
        try:
            pin = pins(str(message["pin"]), str(message["device"]))
        except HsmTollError as exc:
            pipe.socket.settimeout(self._deadline)
            pipe.send({"error": encode(exc)})
            return 0.0
        pipe.socket.settimeout(self._deadline)
        version = pin.origin.removeprefix(pin.source).strip()
        value = {"value": pin.reveal(), "source": pin.source, "version": version}
        pipe.send(value | {"typed": pin.typed})
        return _PINPAD_TIMEOUT if pin.on_pinpad else 0.0

    def _started(self) -> Pipe:
        if self._pipe is not None:
            return self._pipe
        python, path = _interpreter(), _import_path()
        own_end, child_end = socket.socketpair()
        # gevent's sockets are non-blocking, which socket.gettimeout() does not show.
        os.set_blocking(child_end.fileno(), True)
        # Startup errors of Python are collected for the error; later output goes to our stderr.
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed after the worker's first message
        stderr = _stderr()
        try:
            with child_end:
                self._process = subprocess.Popen(
                    [
                        *(python, "-P", "-c", _BOOT, self._program),
                        *(str(stderr), *path, str(child_end.fileno())),
                    ],
                    pass_fds=[child_end.fileno(), stderr],
                    stdin=subprocess.DEVNULL,
                    # PKCS#11 modules may write to stdout, which is for results.
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                    env=_environment(),
                    # Ctrl-C at the terminal must reach the parent only, which ends the worker.
                    start_new_session=True,
                )
        except OSError as exc:
            output.write(str(exc.strerror).encode())
            raise
        finally:
            os.close(stderr)
            # Assigned only now: gevent forks in Python, and `abandon` in the child would close it.
            self._startup_output = output
        self._responded = False
        self._pipe = pipe = Pipe(own_end)
        self.generation = 0
        pipe.send(self._opening)
        return pipe

    def _exit_status(self) -> str:
        if self._process is None:
            return "could not be started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_LOGOUT_TIMEOUT)
            if code < 0:
                return f"was ended by {signal.Signals(-code).name}"
            return f"ended with {code}"
        return "sent no valid answer"

    def kill(self) -> None:
        """Kill the process."""
        _kill(self.__dict__)

    def abandon(self) -> None:
        """In a forked process: drop the parent's worker without ending it."""
        if self._pipe is not None:
            self._pipe.socket.close()
        self._pipe = self._process = None
        self._discard_startup_output()

    def end(self) -> None:
        """Request logout and exit, then kill the process if necessary."""
        if self._pipe is not None and self._process is not None:
            with contextlib.suppress(OSError, EOFError, ValueError, subprocess.TimeoutExpired):
                self._pipe.socket.settimeout(_LOGOUT_TIMEOUT)
                self._pipe.send({"do": "close"})
                self._pipe.receive(until=time.monotonic() + _LOGOUT_TIMEOUT)
                self._process.wait(_LOGOUT_TIMEOUT)
        self.kill()


def _answer(message: dict[str, Any], result_type: Any) -> tuple[Reply, Any]:
    """Decode *message*. TypeError, ValueError or KeyError if it is not a valid answer."""
    reply = decode(Reply, {name: each for name, each in message.items() if name != "answer"})
    return reply, decode(result_type, message["answer"]) if reply.error is None else None


def _kill(parts: dict[str, Any]) -> None:
    process, parts["_process"] = parts.get("_process"), None
    pipe, parts["_pipe"] = parts.get("_pipe"), None
    output, parts["_startup_output"] = parts.get("_startup_output"), None
    if output is not None:
        output.close()
    if pipe is not None:
        pipe.socket.close()
    # poll() is None only in the process that started it: a forked child must not kill it.
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()


#: The worker's code. Arguments: its module, descriptor of stderr, import path, socket.
_BOOT: Final = (
    "import importlib, sys; sys.path[:] = dict.fromkeys([*sys.argv[3:-1], *sys.path]); "
    "importlib.import_module(sys.argv[1]).main(int(sys.argv[-1]), int(sys.argv[2]))"
)


def _interpreter() -> str:
    """A Python executable for the worker; sys.executable may be another program (uWSGI)."""
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
    The import path of this program, including that of hsmtoll, as absolute paths; never the
    working directory as such.
    """
    # A relative path of an archive refers to the initial working directory.
    own = _INITIAL_DIRECTORY / Path(__file__).parents[2]
    return [str(own), *(_absolute(each) for each in sys.path if each)]


def _absolute(path: str) -> str:
    return str(_INITIAL_DIRECTORY / path)


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


#: The working directory at import; relative import paths refer to it.
_INITIAL_DIRECTORY: Final = _working_directory()


def _stderr() -> int:
    """A duplicate of descriptor 2, or /dev/null if that is closed."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("HSMTOLL_") and name not in _NOT_INHERITED
    }
