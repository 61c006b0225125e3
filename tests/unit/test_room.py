"""The room itself: what it keeps its tests from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def _connect_unix() -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.connect("/nowhere")


def _connect() -> None:
    with socket.socket() as one:
        one.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("event", "attempt"),
    [
        ("subprocess.Popen", lambda: subprocess.run([sys.executable, "--version"], check=False)),
        ("os.fork", os.fork),
        ("os.posix_spawn", lambda: os.posix_spawn("/bin/true", ["true"], {})),
        ("os.system", lambda: os.system("true")),  # noqa: S605 - refused before it runs
        ("socket.connect", _connect),
        ("socket.getaddrinfo", lambda: socket.getaddrinfo("localhost", 9)),
    ],
)
def test_a_process_or_a_connection_is_refused_and_noted(
    event: str, attempt: Callable[[], object], no_process_and_no_network: list[str]
) -> None:
    with pytest.raises(PermissionError, match=event):
        attempt()
    (noted,) = no_process_and_no_network
    assert noted.startswith(event)
    no_process_and_no_network.clear()


def test_a_file_and_a_unix_socket_are_not(no_process_and_no_network: list[str]) -> None:
    assert Path(__file__).exists()
    with pytest.raises(FileNotFoundError):
        _connect_unix()
    assert no_process_and_no_network == []
