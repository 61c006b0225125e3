"""Whom the kernel names at the other end of a socket, and which names are nobody's."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from hsmtoll.peer_credentials import OVERFLOW, credentials

if TYPE_CHECKING:
    import pytest


def test_the_peer_of_a_socket_is_this_account() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert credentials(here) == (os.geteuid(), os.getegid())


def test_a_system_that_names_nobody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        monkeypatch.delattr(socket, "SO_PEERCRED")
        assert credentials(here) is None


def test_the_kernels_own_stand_ins_are_nobodys() -> None:
    for kind in ("uid", "gid"):
        assert int(Path(f"/proc/sys/kernel/overflow{kind}").read_text(encoding="ascii")) in OVERFLOW
    # The control: no account of a machine is one of them.
    assert not OVERFLOW & {0, 1, 1000}
