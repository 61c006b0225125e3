"""The account of the peer of a Unix socket, by SO_PEERCRED (unix(7))."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Final

__all__ = ["OVERFLOW", "credentials"]


def _overflow() -> frozenset[int]:
    found = {65534, 0xFFFFFFFF}
    for kind in ("uid", "gid"):
        try:
            found.add(int(Path(f"/proc/sys/kernel/overflow{kind}").read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return frozenset(found)


#: Ids that the kernel shows for all users and groups without a mapping in this user namespace;
#: they name nobody (user_namespaces(7)).
OVERFLOW: Final = _overflow()


def credentials(connection: socket.socket) -> tuple[int, int] | None:
    """User and group id of the peer; ``None`` where the system has no SO_PEERCRED."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("iII"))
    _, uid, gid = struct.unpack("iII", raw)
    return uid, gid
