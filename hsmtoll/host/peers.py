"""
Peer identity: SO_PEERCRED on a Unix socket, the verified client certificate over TLS.

The process id is not used: it may have been reused by the time it is looked up.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import PolicyDenied
from hsmtoll.peer_credentials import OVERFLOW, credentials

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Peer", "of_certificate", "of_socket"]

#: asm-generic/socket.h; Python 3.11 has no name for it.
_SO_PEERGROUPS: Final = 59


@dataclass(frozen=True, slots=True)
class Peer:
    """The *names* that a policy may use for it; over TLS the certificate's SHA-256 (hex)."""

    names: frozenset[str]
    certificate_sha256: str | None = None

    @property
    def account(self) -> str:
        """The name for limits and refusals: the uid, or the certificate's hash."""
        uids = sorted(name for name in self.names if name.startswith("uid:"))
        return (uids or [f"sha256:{self.certificate_sha256}"])[0]

    @classmethod
    def local(cls, uid: int, *gids: int) -> Peer:
        """A local account. PolicyDenied for an overflow id (another user namespace)."""
        if {uid, *gids} & OVERFLOW:
            raise PolicyDenied(
                "caller: its account is not known here (another user namespace)",
                hint="callers in containers use TLS with a client certificate",
                code="caller-unknown",
            )
        return cls(frozenset({f"uid:{uid}", *(f"gid:{gid}" for gid in gids)}))


def of_socket(connection: socket.socket) -> Peer:
    """The peer of a connected Unix socket: SO_PEERCRED and SO_PEERGROUPS (unix(7), socket(7))."""
    known = credentials(connection)
    if known is None:
        raise PolicyDenied("caller: the kernel does not report its account", code="caller-unknown")
    uid, gid = known
    # At most 256 groups (Python's limit of 1024 bytes); with more, getsockopt raises OSError.
    groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    more = struct.unpack(f"{len(groups) // 4}I", groups)
    return Peer.local(uid, gid, *more)


def of_certificate(shown: Mapping[str, Any], der: bytes) -> Peer:
    """The peer of a verified client certificate, as `ssl.SSLSocket.getpeercert` shows it."""
    kinds = {"DNS": "dns", "URI": "uri"}
    names = {
        f"san:{kinds[kind]}:{value}"
        for kind, value in shown.get("subjectAltName", ())
        if kind in kinds
    }
    return Peer(frozenset(names), hashlib.sha256(der).hexdigest())
