"""
Authenticates a signing host at a Unix socket, before anything is sent: by the permissions of the
path, and by the account that listens (SO_PEERCRED).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from hsmtoll.errors import NetworkError, PolicyDenied, sanitized
from hsmtoll.peer_credentials import OVERFLOW, credentials

if TYPE_CHECKING:
    import socket

__all__ = ["no_access", "trusted_at", "verify_peer"]


def no_access(name: str) -> NetworkError:
    """The error if this account may not connect to the socket of the host *name*."""
    return NetworkError(
        f"{name}: this account may not open its socket",
        hint="the custodian puts callers into the group of the socket and its directory",
        code="socket-access",
        signed=False,
    )


def trusted_at(path: Path, uid: int | None, name: str) -> frozenset[int]:
    """
    The accounts (uids) that may listen at the socket *path*: *uid*, or else the owner of its
    directory.

    PolicyDenied (``socket-unsafe``) if another account could replace the socket: if it owns, or can
    write to, a directory of the path. The directories above the socket's own must belong to root
    or to this account. NetworkError (``unreachable``, ``socket-access``) if there is no socket.
    """
    own = {0, os.geteuid()} | ({uid} if uid is not None else set())
    try:
        directory = path.parent.stat().st_uid
        owner = path.lstat().st_uid
        _check_path_permissions(path, own, directory, name)
        # Check the path as written, where a link could be replaced, and the resolved path, where
        # the socket could be replaced.
        _check_path_permissions(Path(os.path.realpath(path, strict=True)), own, directory, name)
    except PermissionError as exc:
        raise no_access(name) from exc
    except OSError as exc:
        raise NetworkError(
            f"{name}: {(exc.strerror or 'cannot be found').lower()}",
            hint="see that the host runs, and that this is the path of its socket",
            code="unreachable",
            signed=False,
            retryable=True,
        ) from exc
    if uid is not None:
        return frozenset({uid})
    # In root's own directory only root could let another account listen.
    return frozenset({0, directory, *({owner} if directory == 0 else ())})


def _check_path_permissions(path: Path, own: set[int], directory: int, name: str) -> None:
    below: int | None = None
    for place in path.parents:
        seen = place.stat()
        owners = own | {directory} if below is None else own
        # In a sticky directory such as /tmp, others cannot rename or remove our directory.
        sticky = seen.st_mode & stat.S_ISVTX and below in own
        below = seen.st_uid
        if seen.st_uid not in owners or (seen.st_mode & 0o022 and not sticky):
            raise PolicyDenied(
                f"{name}: others may put another socket there, in {sanitized(place)}",
                hint="the socket's directory belongs to the host's account (or root), those above "
                "to root, and nobody else may write them; HSMTOLL_SIGNER__UID names the account",
                code="socket-unsafe",
                signed=False,
            )


def verify_peer(connection: socket.socket, *, trusted: frozenset[int], name: str) -> None:
    """PolicyDenied (``host-peer``) unless one of *trusted* listens, by SO_PEERCRED (unix(7))."""
    peer = credentials(connection)
    if peer is None:
        raise PolicyDenied(
            f"{name}: this system does not tell who listens at a socket",
            hint="use https",
            code="host-peer",
            signed=False,
        )
    uid, _ = peer
    if uid in OVERFLOW:
        raise PolicyDenied(
            f"{name}: who listens there is not known here (another user namespace)",
            hint="through the border of such a container use https and client certificates",
            code="host-peer",
            signed=False,
        )
    if uid not in trusted:
        raise PolicyDenied(
            f"{name}: uid {uid} listens there, not uid {' or '.join(map(str, sorted(trusted)))}",
            hint="if that is the account of the signing host, set HSMTOLL_SIGNER__UID to it",
            code="host-peer",
            signed=False,
        )
