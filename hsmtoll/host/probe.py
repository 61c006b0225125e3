"""Asks a daemon on this machine, signing host or local proxy, whether it lives or is ready."""

from __future__ import annotations

import http.client
import ipaddress
import socket
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import ConfigurationError, HsmTollError, sanitized
from hsmtoll.host.sockets import tcp_address
from hsmtoll.jsonio import read_lenient

if TYPE_CHECKING:
    from typing import Literal

__all__ = ["probe"]

#: Seconds for each step. Below the time-outs that container runtimes are usually given for a probe.
_TIMEOUT: Final = 4.0
#: Bytes of an answer: the reasons of many profiles are long.
_MAX_ANSWER: Final = 1 << 20


class _Connection(http.client.HTTPConnection):
    def __init__(self, connected: socket.socket) -> None:
        super().__init__("localhost")
        self.sock = connected


def probe(where: str, name: str, page: Literal["live", "ready"]) -> None:
    """
    Ask ``/live`` or ``/ready`` of the daemon that listens at *where*, the value of the setting
    *name*: HOST:PORT, or ``unix:`` and a path.

    Raises ConfigurationError if *where* is no address, and HsmTollError (``not-live`` or
    ``not-ready``) with the reasons if the daemon does not answer with 200.
    """
    shown, code = sanitized(where), f"not-{page}"
    try:
        connected = _connect(where, name)
    except OSError as exc:
        raise HsmTollError(
            f"{shown}: nobody answers ({exc.strerror or 'no such address'})",
            hint=f"is the daemon running, and does it listen at {name}? Its log says why not",
            code=code,
        ) from exc
    try:
        with connected:
            connection = _Connection(connected)
            # Servers that check the header compare it with the address that they listen on.
            host = "localhost" if connected.family == socket.AF_UNIX else _authority(connected)
            connection.request("GET", f"/{page}", headers={"Host": host, "Connection": "close"})
            response = connection.getresponse()
            status, body = response.status, response.read(_MAX_ANSWER)
    except (OSError, http.client.HTTPException) as exc:
        raise HsmTollError(
            f"{shown}: no answer to /{page} ({sanitized(exc) or type(exc).__name__})",
            hint="the daemon hangs, or another program listens there: see its log, then restart it",
            code=code,
        ) from exc
    if status == 200:
        return
    answer = read_lenient(body)
    reasons = answer.get("why") if isinstance(answer, dict) else None
    why = [sanitized(each) for each in reasons] if isinstance(reasons, list) else []
    if page == "ready" and why:
        raise HsmTollError(
            f"{shown}: {'; '.join(why)}", hint="`hsmtoll doctor` says what to do", code=code
        )
    raise HsmTollError(
        f"{shown}: /{page} answers {status}",
        hint=f"another program listens there, or {name} is not the address of the daemon",
        code=code,
    )


def _connect(where: str, name: str) -> socket.socket:
    if where.startswith("unix:"):
        path = where.removeprefix("unix:").removeprefix("//")
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        one.settimeout(_TIMEOUT)
        try:
            one.connect(path)
        except OSError:
            one.close()
            raise
        return one
    host, port = tcp_address(where, name)
    try:
        return socket.create_connection((_reachable(host), port), _TIMEOUT)
    except UnicodeError as exc:
        # A host name with an empty label, or one of more than 63 characters.
        raise ConfigurationError(f"{name}: {sanitized(where)}: no such address") from exc


def _reachable(host: str) -> str:
    """The address to connect to: the loopback one for a daemon that listens on all addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _authority(connected: socket.socket) -> str:
    address, port = connected.getpeername()[:2]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
