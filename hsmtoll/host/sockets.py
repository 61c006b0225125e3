"""Listening sockets of the signing host, Unix and TCP, and the TLS context of the latter."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, HsmTollError, sanitized
from hsmtoll.host import system
from hsmtoll.host.required import check_complete, needed

if TYPE_CHECKING:
    from hsmtoll.settings import Host

__all__ = ["ListeningSockets", "listen_tcp", "listen_unix", "server_context", "tcp_address"]

_log = logging.getLogger("hsmtoll.host")

#: Length of the kernel's queue of connections (listen(2)).
_BACKLOG: Final = 4096


class ListeningSockets:
    """The listening sockets: those passed by the service manager, else those of the settings."""

    def __init__(self, host: Host) -> None:
        self.signing: list[socket.socket] = []
        self.tls: list[socket.socket] = []
        self.metrics: list[socket.socket] = []
        self._host = host
        # Socket → path and inode. Another host may create a socket at the same path later.
        self._created: dict[socket.socket, tuple[Path, int]] = {}
        self.context: ssl.SSLContext | None = None
        try:
            self._open()
        except HsmTollError:
            self.close()
            raise

    @property
    def metrics_public(self) -> bool:
        """Whether the metrics may be asked for from elsewhere, by any name of this host."""
        return self._host.metrics_public

    def _open(self) -> None:
        host = self._host
        for given in system.given_sockets():
            if given.name == "metrics":
                self.metrics.append(given.socket)
            elif given.socket.family == socket.AF_UNIX:
                self.signing.append(given.socket)
            else:
                self.tls.append(given.socket)
        if host.socket is not None and not self.signing:
            self.signing.append(self._unix(host.socket, "HSMTOLL_HOST__SOCKET"))
        if host.listen is not None and not self.tls:
            self.tls.append(listen_tcp(host.listen, "HSMTOLL_HOST__LISTEN"))
        if self.tls:
            self.context = self._context()
        if host.metrics is not None and not self.metrics:
            self.metrics.append(self._metrics(host.metrics))
        if not self.signing and not self.tls:
            check_complete(host, sockets=False)

    def _metrics(self, where: str) -> socket.socket:
        if where.startswith("unix://"):
            return self._unix(Path(where.removeprefix("unix://")), "HSMTOLL_HOST__METRICS")
        return listen_tcp(where, "HSMTOLL_HOST__METRICS", local=not self._host.metrics_public)

    def _unix(self, path: Path, name: str) -> socket.socket:
        one = listen_unix(path, name)
        self._created[one] = (path, path.lstat().st_ino)
        return one

    def _context(self) -> ssl.SSLContext:
        host = self._host
        return server_context(
            needed(host.cert, "cert"),
            needed(host.key, "key"),
            needed(host.client_ca, "client_ca"),
            host.client_crl,
        )

    def reload(self) -> None:
        """Reload certificates and revocation lists; keep those in use if that fails."""
        if self.context is None:
            return
        try:
            self.context = self._context()
        except HsmTollError as exc:
            _log.error(
                "certificates not reloaded, the old ones stay in use: %s", exc,
                extra={"event": "certificates-kept"},
            )  # fmt: skip
        else:
            _log.info("certificates reloaded", extra={"event": "certificates-reloaded"})

    def tls_context(self) -> ssl.SSLContext:
        """The TLS context for new connections."""
        if self.context is None:
            raise ConfigurationError("no TLS is set up")
        return self.context

    def remove_created(self, listening: list[socket.socket]) -> None:
        """
        Remove the files of those sockets of *listening* that were created here. Call it before
        they are closed: until then no other host can take over a path or an inode.
        """
        for one in listening:
            path, inode = self._created.pop(one, (None, 0))
            with contextlib.suppress(OSError):
                if path is not None and path.lstat().st_ino == inode:
                    path.unlink()

    def close(self) -> None:
        """Close all sockets, and remove the files of those that were created here."""
        for one in (*self.signing, *self.tls, *self.metrics):
            self.remove_created([one])
            one.close()


def listen_unix(path: Path, name: str) -> socket.socket:
    """
    Listen on a Unix socket, created with mode 0660 and the directory's group. A missing directory
    is created with 0750; one that others may write raises ConfigurationError. *name* is the
    setting, for messages.
    """
    directory = path.parent
    try:
        if not directory.exists():
            directory.mkdir(mode=0o750)
            _log.warning(
                "%s: %s was missing and was created for group %d; callers must be members of it",
                name, sanitized(directory), directory.stat().st_gid,
            )  # fmt: skip
        seen = directory.stat()
    except OSError as exc:
        raise ConfigurationError(
            f"{name} {sanitized(path)}: no directory for it ({exc.strerror})",
            hint="make it for the host's account and the group of its callers, as root: install -d "
            f"-o ACCOUNT -g GROUP -m 2750 {sanitized(directory)}",
        ) from exc
    files.check_trusted(directory, f"directory of {name}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o117)
    try:
        _remove_stale_socket(path)
        listening.bind(str(path))
        with contextlib.suppress(PermissionError):
            os.chown(path, -1, seen.st_gid)
        listening.listen(_BACKLOG)
    except OSError as exc:
        listening.close()
        raise ConfigurationError(
            f"{name} {sanitized(path)}: cannot be listened on ({exc.strerror or exc})"
        ) from exc
    finally:
        os.umask(before)
    return listening


def _remove_stale_socket(path: Path) -> None:
    """Remove the socket file that an ended host has left. OSError if anything else is there."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "something else is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, "another host listens there")
    path.unlink()


def tcp_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; ConfigurationError, with the setting *name*, otherwise."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not (colon and host and re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
        raise ConfigurationError(f"{name}: HOST:PORT is expected")
    return host, int(port)


def listen_tcp(address: str, name: str, *, local: bool = False) -> socket.socket:
    """Listen on TCP ``HOST:PORT``; with *local*, ConfigurationError unless it is loopback."""
    host, port = tcp_address(address, name)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, proto, _, where = found[0]
        if local and not _is_loopback(str(where[0])):
            raise ConfigurationError(
                f"{name}: {sanitized(address)} is not on the loopback",
                hint="127.0.0.1:PORT, [::1]:PORT or unix:///PATH",
            )
        listening = socket.socket(family, kind | socket.SOCK_CLOEXEC, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(_BACKLOG)
    except (OSError, UnicodeError) as exc:
        # UnicodeError: a host name with an empty label, or one of more than 63 characters.
        why = getattr(exc, "strerror", None) or "no such address"
        raise ConfigurationError(
            f"{name}: {sanitized(address)} cannot be listened on ({why})"
        ) from exc
    return listening


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def server_context(cert: Path, key: Path, client_ca: Path, crl: Path | None) -> ssl.SSLContext:
    """
    TLS 1.3 with required client certificates from *client_ca*. If there are revocation lists (in
    *crl* or in the file of the CA), every CA of a client's path needs a current one; otherwise
    the client is rejected. Raises ConfigurationError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session would skip the check of the revocation list.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    doing = "CERT and HSMTOLL_HOST__KEY"
    files.read(cert, "HSMTOLL_HOST__CERT")
    files.read(key, "HSMTOLL_HOST__KEY", secret=True)
    files.read(client_ca, "HSMTOLL_HOST__CLIENT_CA")
    if crl is not None:
        files.read(crl, "HSMTOLL_HOST__CLIENT_CRL")
    try:
        # Without a password callback OpenSSL prompts on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
        doing = "CLIENT_CA"
        context.load_verify_locations(cafile=client_ca)
        doing = "CLIENT_CRL"
        if crl is not None:
            context.load_verify_locations(cafile=crl)
    except (OSError, ValueError) as exc:
        raise ConfigurationError(
            f"HSMTOLL_HOST__{doing}: cannot be used ({sanitized(exc)})",
            hint="PEM files, and a key without passphrase that fits the certificate",
        ) from exc
    if context.cert_store_stats()["crl"]:
        # The whole path: a revoked CA could issue client certificates that are on no list.
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    elif crl is not None:
        raise ConfigurationError(f"HSMTOLL_HOST__CLIENT_CRL {sanitized(crl)}: no revocation list")
    else:
        # An intermediate CA in CLIENT_CA is a trust anchor, too. Not with revocation lists:
        # OpenSSL would end the path there and not check whether its issuer has revoked it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
