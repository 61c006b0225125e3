"""
The command `hsmtoll` as a process of its own, without the start of Python and its imports.

One process for each process of tests has imported what commands import, and has done nothing else
with it; it forks for each command. So what a test sees is real: descriptors, variables, signals,
the exit code; and each command starts with nothing of another one. What a test says about the start
itself it says of ``python -m hsmtoll``.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping


def hsmtoll(
    *argv: str,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 100,
) -> subprocess.CompletedProcess[str]:
    """
    What ``python -m hsmtoll`` printed and how it ended. It is killed after *timeout* seconds; what
    it reads has to fit into a pipe, 64 KiB.
    """
    given = dict(os.environ if env is None else env)
    if _of_the_interpreter(given) != _of_the_interpreter(os.environ):
        return subprocess.run(
            [sys.executable, "-m", "hsmtoll", *argv], input=stdin, env=given, cwd=cwd,
            capture_output=True, text=True, check=False, timeout=timeout,
        )  # fmt: skip
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        _pipe_with(stdin) as read,
    ):
        command = fork(*argv, stdin=read, stdout=out, stderr=err, env=given, cwd=cwd)
        try:
            code = command.wait(timeout)
        except TimeoutError:
            command.kill()
            raise subprocess.TimeoutExpired(["hsmtoll", *argv], timeout) from None
        return subprocess.CompletedProcess(["hsmtoll", *argv], code, _text(out), _text(err))


def fork(
    *argv: str,
    stdin: IO[Any],
    stdout: IO[Any],
    stderr: IO[Any],
    env: Mapping[str, str],
    cwd: Path | None = None,
) -> ForkedCommand:
    """Start the command; variables of the interpreter have no effect."""
    here, there = socket.socketpair()
    with there:
        streams = [each.fileno() for each in (stdin, stdout, stderr)]
        socket.send_fds(_forker(), [b"."], [there.fileno(), *streams])
    return ForkedCommand(here, {"argv": argv, "env": dict(env), "cwd": str(cwd or Path.cwd())})


class ForkedCommand:
    """As much of `subprocess.Popen` as tests need."""

    def __init__(self, talk: socket.socket, order: dict[str, Any]) -> None:
        self._talk = talk
        talk.sendall(json.dumps(order).encode() + b"\n")
        self._received = b""
        self.pid = self._number(None)
        self.returncode: int | None = None

    def _number(self, timeout: float | None) -> int:
        """The next line of the process that waits for the command."""
        self._talk.settimeout(timeout)
        while b"\n" not in self._received:
            more = self._talk.recv(64)
            if not more:
                raise ChildProcessError("nobody waits for the command any more")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """How it ended; TimeoutError."""
        if self.returncode is None:
            self.returncode = self._number(timeout)
            self._talk.close()
        return self.returncode

    def poll(self) -> int | None:
        """The same, or nothing while it runs."""
        try:
            return self.wait(0)
        except BlockingIOError:
            return None

    def send_signal(self, number: int) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, and see it ended."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def _of_the_interpreter(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that Python reads at its start, and never again."""
    prefixes = ("PYTHON", "LC_", "LANG")
    return {name: value for name, value in variables.items() if name.startswith(prefixes)}


def _pipe_with(text: str) -> IO[bytes]:
    """The end of a pipe from which *text* is read, and then its end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(writer, "wb") as file:
        file.write(text.encode())
    return os.fdopen(reader, "rb")


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@functools.cache
def _forker() -> socket.socket:
    """The process that forks: it ends when this one closes its end."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(there.fileno())],
            pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def end() -> None:
        here.close()
        process.wait()

    atexit.register(end)
    return here


def _fork_for_each(control: socket.socket) -> None:
    import hsmtoll

    for module in pkgutil.walk_packages(hsmtoll.__path__, "hsmtoll."):
        if not module.name.startswith("hsmtoll.testing."):
            importlib.import_module(module.name)
    # Nobody waits for those that wait for a command.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        _, fds, _, _ = socket.recv_fds(control, 1, 4)
        if not fds:
            return
        if not os.fork():
            control.close()
            _wait_for_one(*fds)
        for each in fds:
            os.close(each)


def _wait_for_one(talk: int, *streams: int) -> NoReturn:
    with os.fdopen(talk, "r", encoding="ascii", closefd=False) as asked:
        order = json.loads(asked.readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if not process:
        os.close(talk)
        _be_the_command(order, streams)
    for each in streams:
        os.close(each)
    os.write(talk, f"{process}\n".encode())
    _, status = os.waitpid(process, 0)
    os.write(talk, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _be_the_command(order: dict[str, Any], streams: tuple[int, ...]) -> NoReturn:
    try:
        for number, each in enumerate(streams):
            os.dup2(each, number)
            os.close(each)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        time.tzset()
        sys.argv = ["hsmtoll", *order["argv"]]
        from hsmtoll.__main__ import main

        main()
    except SystemExit:
        # Click ends a completion so. Nothing between here and the interpreter catches it.
        raise
    except BaseException:  # noqa: BLE001 - nothing of the process that forks may go on here
        traceback.print_exc()
    os._exit(70)


if __name__ == "__main__":
    _fork_for_each(socket.socket(fileno=int(sys.argv[1])))
