"""What the host says to the service manager that started it."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from hsmtoll.host.system import notify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


def test_a_manager_is_told(manager: socket.socket) -> None:
    notify("READY=1", "STATUS=signing")
    assert manager.recv(100) == b"READY=1\nSTATUS=signing"


@pytest.mark.timeout(60)
def test_a_manager_that_does_not_read_stops_nobody(manager: socket.socket, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"WATCHDOG=1", str(tmp_path / "notify"))
    notify("STOPPING=1")
    assert b"STOPPING=1" not in list(read(manager))
    # The control: once it reads, it is told again.
    notify("READY=1")
    assert list(read(manager)) == [b"READY=1"]


def read(manager: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield manager.recv(100)
        except BlockingIOError:
            return
