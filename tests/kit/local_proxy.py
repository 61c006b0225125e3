"""A running `hsmtoll proxy`, as a process with the settings of the test's environment."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tests.kit.commands import ForkedCommand, fork
from tests.kit.own_device import free_port

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping


#: Seconds. Generous: it ends, or the test is wrong.
PATIENCE: Final = 60.0

TEST_AUTH: Final = "/api/movement/road/v2/test-auth"


@dataclass
class LocalProxy:
    """*where*: value of --listen; *process*; *stderr*, its lines so far."""

    where: str
    process: ForkedCommand | subprocess.Popen[str]
    stderr: list[str] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def started(cls, where: str | None = None) -> Iterator[Self]:
        """One that listens; it is ended with the block."""
        where = where or f"127.0.0.1:{free_port()}"
        reads, writes = os.pipe()
        with Path(os.devnull).open("r+b") as nothing, os.fdopen(writes, "wb") as stderr:
            process = fork(
                "proxy", "--listen", where,
                stdin=nothing, stdout=nothing, stderr=stderr, env=os.environ,
            )  # fmt: skip
        proxy = cls(where, process)
        listening = threading.Event()
        reader = threading.Thread(target=proxy._read, args=[reads, listening], daemon=True)
        reader.start()
        try:
            assert listening.wait(PATIENCE), proxy.stderr
            assert process.poll() is None, proxy.stderr
            yield proxy
        finally:
            process.kill()
            reader.join(PATIENCE)

    def _read(self, stderr: int, listening: threading.Event) -> None:
        with os.fdopen(stderr, encoding="utf-8") as lines:
            for line in lines:
                self.stderr.append(line)
                if "proxy: listening on" in line:
                    listening.set()
        listening.set()

    def log_with(self, text: str, times: int = 1) -> str:
        """What stderr has so far, as soon as *times* of its lines have *text*."""
        for _ in range(round(PATIENCE * 10)):
            if sum(text in line for line in self.stderr) >= times:
                break
            threading.Event().wait(0.1)
        return "".join(self.stderr)

    def connection(self) -> http.client.HTTPConnection:
        """A connection of the standard library's client."""
        if self.where.startswith("unix:"):
            return _UnixConnection(self.where.removeprefix("unix:"))
        host, _, port = self.where.rpartition(":")
        return http.client.HTTPConnection(host, int(port), timeout=PATIENCE)

    def ask(
        self,
        method: str = "GET",
        path: str = TEST_AUTH,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One request on a connection of its own: the response, and its body."""
        connection = self.connection()
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response, response.read()

    def raw(self, request: bytes) -> bytes:
        """What comes back until the proxy closes the connection, as *request* asks it to."""
        connection = self.connection()
        connection.connect()
        with contextlib.closing(connection):
            assert connection.sock is not None
            connection.sock.sendall(request)
            parts = []
            while part := connection.sock.recv(65536):
                parts.append(part)
            return b"".join(parts)

    def end(self) -> int:
        """Send SIGTERM and wait; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


def socket_below(folder: Path) -> str:
    """A value of --listen in a directory that only its owner may change."""
    folder.mkdir(mode=0o750)
    return f"unix:{folder}/proxy.sock"
