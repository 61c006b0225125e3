"""
A Device whose module runs in processes of its own: one that hangs is ended, one that crashes
takes nobody with it.

    caller ── free child? ── question ──► worker: Device ── module
                 │              │  ◄── PIN, when it is asked for
                 │              └─ deadline over, or silence: killed, DeviceError
                 └─ none in time: device-busy
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from hsmtoll.errors import (
    ConfigurationError,
    DeviceError,
    HsmTollError,
    PinIncorrect,
    PinNotTried,
    foreign,
    from_data,
    to_data,
)
from hsmtoll.hsm import pipe
from hsmtoll.hsm.device import Device
from hsmtoll.hsm.module import GATE
from hsmtoll.hsm.recovery import Breaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.hsm.device import KeyFacts, StoredCertificate
    from hsmtoll.hsm.inspect import ModuleFacts
    from hsmtoll.hsm.ledger import Ledger
    from hsmtoll.hsm.pin import Pin, PinSource
    from hsmtoll.jws import RsaPublicKey, SigningInput

__all__ = ["IsolatedDevice"]

_log = logging.getLogger(__name__)

#: Seconds that a person may take at a pinpad, on top of the deadline.
_AT_THE_PINPAD: Final = 120.0
#: Seconds that a child may take to log out.
_GOODBYE: Final = 1.0
#: Seconds that a child waits for another one's start, before it starts all the same.
_START: Final = 5.0
#: Seconds that Python may take to start on a machine that is busy.
_STARTING: Final = 30.0
#: Of the service that this process is, set by its service manager: the worker is no service.
#: Everything else is handed down, because makers' modules read variables of many names.
_NOT_HANDED_DOWN: Final = frozenset(
    {
        *("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "MAINPID"),
        *("WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "FDSTORE"),
    }
)


class IsolatedDevice(Device):
    """
    The same questions as Device, answered by *workers* child processes, each call within
    *deadline* seconds; reading a PIN is not counted.

    Raises, on top of Device's errors, DeviceError: ``device-hung`` where the deadline was over,
    ``module-crashed`` where the child died; the next call gets a new child. PINs are read here
    and handed over when the device wants one; what was accepted is handed over again. What is
    written is written in this process, where a person watches it.
    """

    def __init__(
        self,
        module_path: Path,
        uri: Any,
        *,
        pin: PinSource | None,
        signing_pin: PinSource | None = None,
        ledger: Ledger,
        public_key: RsaPublicKey | None = None,
        use_final_try: bool = False,
        allow_exportable_key: bool = False,
        user_type: int | None = None,
        deadline: float = 60.0,
        workers: int = 1,
        program: str = "hsmtoll.hsm.worker",
        rules: dict[str, Any] | None = None,
        boot: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            module_path,
            uri,
            pin=pin,
            signing_pin=signing_pin,
            ledger=ledger,
            public_key=public_key,
            use_final_try=use_final_try,
            allow_exportable_key=allow_exportable_key,
            user_type=user_type,
            lock_timeout=deadline,
            boot=boot,
        )
        #: Seconds that an answer may take.
        self.deadline = deadline
        self._workers = workers
        #: The module that a child runs, and what it is told about what it may sign.
        self.program = program
        self._rules = rules
        self._sources = {"user": self._pin, "signing": self._signing_pin}
        self._pins: dict[str, Pin] = {}
        # A single failure is the next caller's new child; a second one means more.
        self._outside = Breaker(uri, boot=boot, threshold=2)
        self._closings = 0
        self._children: list[Child] = []
        self._start_afresh()
        _every.add(self)

    def _start_afresh(self) -> None:
        # A forked process has no part in the conversations before, nor in what is waited for there.
        for child in self._children:
            child.forget()
        self._reading = threading.Lock()
        self._starting = threading.Lock()
        # Around what is free, and who waits for it.
        self._turn = threading.Condition()
        self._children = [Child(self) for _ in range(self._workers)]
        self._free = list(self._children)
        #: Callers that wait for a child at this moment.
        self.wanted = 0
        # What was said to that question; ``None`` if nobody knows whether it still holds.
        self._logged_in: bool | None = None

    def __repr__(self) -> str:
        return f"IsolatedDevice({self._name})"

    def certificates(self, *, near: bool = False) -> tuple[StoredCertificate, ...]:
        """As Device.certificates."""
        answer = self._ask("reading certificates", do="certificates", near=near)
        return pipe.certificates_from(answer)

    def elsewhere(self) -> tuple[StoredCertificate, ...]:
        """As Device.elsewhere."""
        return pipe.certificates_from(
            self._ask("reading certificates of other devices", do="elsewhere")
        )

    def login(self, *, whatever: bool = False) -> bool:
        """As Device.login, for the child that answers, which is asked once while all goes well."""
        known = self._logged_in
        if known is None or whatever:
            known = bool(self._ask("logging in", do="login", whatever=whatever))
            self._logged_in = known
        return known

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """As Device.key."""
        offered = pipe.keys_to(tuple(candidates))
        return pipe.facts_from(self._ask("looking for the key", do="key", candidates=offered))

    def inspect(self) -> ModuleFacts:
        """As `hsmtoll.hsm.inspect.inspect`, with this device's URI and PIN."""
        return pipe.module_from(self._ask("looking behind the module", do="inspect"))

    def signed(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> tuple[bytes, RsaPublicKey | None]:
        """As Device.signed; what a child says is checked here."""
        offered = tuple(candidates)
        signature = self.unproven(alg, unsigned, candidates=offered)
        try:
            return self._verified(offered, alg, unsigned, signature)
        except DeviceError:
            # None of those offered: the device's own word, if it shows the public half.
            public = self.key(candidates=offered).public
            if public is None:
                raise
            return self._verified((public,), alg, unsigned, signature)

    def unproven(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> bytes:
        """As Device.unproven."""
        offered = pipe.keys_to(tuple(candidates))
        return bytes(self._ask("signing", do="sign", alg=alg, candidates=offered, data=unsigned))

    def self_test(self, alg: str, *, candidates: Iterable[RsaPublicKey] = ()) -> bytes:
        """As Device.self_test."""
        offered = pipe.keys_to(tuple(candidates))
        made = self._ask("signing", do="self-test", alg=alg, candidates=offered)
        return bytes.fromhex(made)

    def close(self) -> None:
        """Log out and end the children; one that is asked something, when it has answered."""
        super().close()
        self._closings += 1
        self._logged_in = None
        with self._turn:
            idle, self._free = self._free, []
        for child in idle:
            child.end()
            # For those who ask all the same: they would wait for it in vain.
            self._put(child)
        self._pins.clear()

    # ------------------------------------------------------------------ children

    def _ask(self, doing: str, **question: Any) -> Any:
        doing, at = f"{doing} ({self._name})", doing
        self._outside.admit()
        closings = self._closings
        try:
            child = self._take(doing)
        except HsmTollError as exc:
            self._outside.judge(exc, at)
            raise
        # Tokens in files are rewritten at login: two that start at once may each miss it.
        starting = not child.running and self._starting.acquire(timeout=_START)
        try:
            answer = child.ask(question, doing=doing, pins=self._read)
        except _Silent as exc:
            self._logged_in = None
            child.kill()
            error = DeviceError(str(exc), hint=exc.hint, code=exc.code)
            self._outside.failed(error, at)
            raise error from None
        except BaseException as exc:
            # Half a conversation cannot be gone on with.
            self._logged_in = None
            child.kill()
            self._outside.judge(exc, at)
            raise
        finally:
            if starting:
                self._starting.release()
            if closings != self._closings:
                child.end()
            self._put(child)
        # That a new child logs in says nothing about what the one before it died of.
        self._outside.worked(at)
        return self._understood(child, answer)

    def _understood(self, child: Child, answer: dict[str, Any]) -> Any:
        for name, level, message in answer["log"]:
            logging.getLogger(name).log(level, "%s", message)
        if answer["generation"] != child.generation:
            child.generation = answer["generation"]
            self.generation += 1
            self._logged_in = None
        if "error" in answer:
            self._logged_in = None
            error = from_data(answer["error"], unknown=DeviceError)
            if isinstance(error, PinIncorrect | PinNotTried):
                self._pins.clear()
            raise error
        return answer["data"] if "data" in answer else answer["answer"]

    def _take(self, doing: str) -> Child:
        with self._turn:
            self.wanted += 1
            try:
                if self._turn.wait_for(lambda: self._free, self.deadline):
                    return self._free.pop()
            finally:
                self.wanted -= 1
        raise DeviceError(
            f"{doing}: no process of the device was free within {self.deadline:g} s",
            hint="More of them sign in parallel: HSMTOLL_HOST__WORKERS.",
            code="device-busy",
            signed=False,
            scope="attempt",
        )

    def _put(self, child: Child) -> None:
        with self._turn:
            self._free.append(child)
            self._turn.notify()

    def _read(self, user: str, device: str) -> Pin:
        # One prompt, however many children want to log in.
        with self._reading:
            pin, source = self._pins.get(user), self._sources.get(user)
            if pin is None and source is not None:
                pin = self._pins[user] = source.read(device=device)
        if pin is None:
            raise DeviceError("the device's process asked for a PIN that is not its", code="worker")
        return pin

    def _told(self) -> dict[str, Any]:
        """All that a child is told, but the PIN."""
        directory = self._ledger.directory
        return {
            "module": str(self.module_path),
            "uri": str(self.uri),
            "user": self._pin is not None,
            "signing": self._signing_pin is not None,
            "ledger": directory and str(directory.absolute()),
            "optional": self._ledger.optional,
            "public_key": pipe.keys_to([self._public_key])[0],
            "use_final_try": self._use_final_try,
            "allow_exportable_key": self._allow_exportable_key,
            "user_type": self.user_type,
            "lock_timeout": self.deadline,
            "rules": self._rules,
        }


_every: weakref.WeakSet[IsolatedDevice] = weakref.WeakSet()


def _after_fork() -> None:
    for device in _every:
        device._start_afresh()  # noqa: SLF001 - of this room


GATE.after_fork.append(_after_fork)


class _Silent(Exception):
    """No answer: *code* and *hint* of the error that the caller gets."""

    def __init__(self, message: str, *, code: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class Child:
    """One worker process, started when it is first asked and after it was killed."""

    def __init__(self, device: IsolatedDevice) -> None:
        # Not the device itself: it must be free to be forgotten, and its children end then.
        self._told = device._told()  # noqa: SLF001 - two halves of one thing
        self._program = device.program
        self._deadline = device.deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._there: pipe.Pipe | None = None
        # Whether the process has said anything, and what Python wrote before it did.
        self._met = False
        self._words: IO[bytes] | None = None
        self.generation = 0
        weakref.finalize(self, _ended, self.__dict__)

    @property
    def running(self) -> bool:
        """Whether there is a process that has been asked before."""
        return self._process is not None

    def ask(
        self, question: dict[str, Any], *, doing: str, pins: Callable[[str, str], Pin]
    ) -> dict[str, Any]:
        """The answer. Raises _Silent where there is none, and what *pins* raises."""
        try:
            there = self._started()
            # The time that Python takes to start is not the module's.
            patience = self._deadline if self._met else self._deadline + _STARTING
            until = time.monotonic() + patience
            there.socket.settimeout(self._deadline)
            there.send(question)
            while True:
                said = there.receive(until=until)
                if not self._met:
                    self._met = True
                    self._forget_words()
                    until = time.monotonic() + self._deadline
                if "hello" in said:
                    continue
                if "pin" not in said:
                    return _answer(said, of_bytes="data" in question)
                more = self._hand_over(there, said, pins)
                until = time.monotonic() + self._deadline + more
        except TimeoutError:
            if not self._met:
                raise self._not_started(doing) from None
            raise _Silent(
                f"{doing}: the module did not answer within {self._deadline:g} s, and its process"
                " was ended",
                code="device-hung",
                hint="The next call starts a new one. Is the device reachable?",
            ) from None
        except (EOFError, OSError, ValueError, TypeError, KeyError):
            if not self._met:
                raise self._not_started(doing) from None
            raise _Silent(
                f"{doing}: the module's process {self._fate(_GOODBYE)}",
                code="module-crashed",
                hint="The next call starts a new one. Ask the module's maker, with its log.",
            ) from None

    def _not_started(self, doing: str) -> HsmTollError:
        """The error for a process that ended, or was silent, before a module was loaded."""
        fate = self._fate(_GOODBYE)
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
        self, there: pipe.Pipe, said: dict[str, Any], pins: Callable[[str, str], Pin]
    ) -> float:
        try:
            pin = pins(str(said["pin"]), str(said["device"]))
        except HsmTollError as exc:
            there.socket.settimeout(self._deadline)
            there.send({"error": to_data(exc)})
            return 0.0
        there.socket.settimeout(self._deadline)
        version = pin.origin.removeprefix(pin.source).strip()
        value = {"value": pin.reveal(), "source": pin.source, "version": version}
        there.send(value | {"typed": pin.typed})
        return _AT_THE_PINPAD if pin.on_pinpad else 0.0

    def _started(self) -> pipe.Pipe:
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
        self._there = there = pipe.Pipe(ours)
        self.generation = 0
        there.send(self._told)
        return there

    def _fate(self, patience: float) -> str:
        if self._process is None:
            return "could not be started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(patience)
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


def _answer(said: dict[str, Any], *, of_bytes: bool) -> dict[str, Any]:
    """*said*, if it is an answer at all: TypeError for what a module gone wrong may say."""
    told = ("data" if of_bytes else "answer") in said or isinstance(said.get("error"), dict)
    if not (told and isinstance(said.get("generation"), int)):
        raise TypeError("no answer")
    said["log"] = [(str(name), int(level), str(message)) for name, level, message in said["log"]]
    return said


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
