"""
Places of connections: which are served now, which wait for their turn, and which are rejected.

Decisions only: `connections` reads from sockets, sets timers and closes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    import ssl

    from hsmtoll.errors import PolicyDenied
    from hsmtoll.host.peers import Peer

__all__ = ["Connection", "Limits", "Places"]

#: Connections that wait for a place: in all, and of one caller. Above that they are rejected.
_MAX_WAITING: Final = 256
_MAX_WAITING_PER_CALLER: Final = 64
#: Connections that are rejected at once. Above that they are closed without a reply.
_MAX_REJECTED: Final = 64

#: The account of connections that close after their reply; they count against no caller's limit.
_CLOSING: Final = "closing"


@dataclass(frozen=True, slots=True)
class Limits:
    """
    Connections that are served at once, in all and of one caller. Further ones wait up to
    *max_wait* seconds.
    """

    connections: int
    per_caller: int
    max_wait: float


@dataclass(slots=True, eq=False)
class Connection:
    """
    One connection. *account*: whose limit it counts against. *peer*: a PolicyDenied if the peer
    cannot be identified. *since*: when it was accepted, in the loop's time. *context*: what its
    TLS handshake was checked by.
    """

    account: str
    peer: Peer | PolicyDenied | None
    since: float
    context: ssl.SSLContext | None = None
    transport: asyncio.Transport | None = None
    timer: asyncio.TimerHandle | None = None
    #: A whole request is there that has no reply yet: the connection is not closed before that.
    request_complete: bool = False
    #: The last request has its reply, and nothing was received since.
    idle: bool = False


class Places:
    """The connections of one listener: each is in one of `served`, `waiting` and `rejected`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # They are dicts for their order.
        #: The least recently used first.
        self.served: dict[Connection, None] = {}
        #: The oldest first.
        self.waiting: dict[Connection, None] = {}
        self.rejected: dict[Connection, None] = {}
        self._per_account: Counter[str] = Counter()

    def add(self, connection: Connection) -> bool:
        """Give *connection* a place, let it wait, or reject it; False if it can only be closed."""
        account = connection.account
        waiting = sum(each.account == account for each in self.waiting)
        if self._has_room(account):
            self._serve(connection)
        elif len(self.waiting) < _MAX_WAITING and waiting < _MAX_WAITING_PER_CALLER:
            self.waiting[connection] = None
        elif len(self.rejected) < _MAX_REJECTED:
            self.rejected[connection] = None
        else:
            return False
        return True

    def to_close_for(self, account: str) -> Connection | None:
        """
        The connection to close so that *account* has room: at the limit of one account an idle
        one of its own, at the total limit the oldest that has no complete request.
        """
        if self._per_account[account] >= self._limits.per_caller:
            own = (each for each in self.served if each.idle and each.account == account)
            return next(own, None)
        if len(self.served) >= self._limits.connections:
            return next((each for each in self.served if not each.request_complete), None)
        return None

    def serve_waiting(self) -> list[Connection]:
        """Give free places to those that wait, first come, first served; returns them."""
        admitted = []
        for connection in tuple(self.waiting):
            if self._has_room(connection.account):
                del self.waiting[connection]
                self._serve(connection)
                admitted.append(connection)
        return admitted

    def reject(self, connection: Connection) -> None:
        """Move *connection* from the waiting to the rejected: its time is up."""
        del self.waiting[connection]
        self.rejected[connection] = None

    def used(self, connection: Connection) -> None:
        """Note that *connection* has got its reply."""
        connection.request_complete, connection.idle = False, True
        self.served[connection] = self.served.pop(connection)

    def is_wanted(self, connection: Connection) -> bool:
        """Whether another connection waits for this place, or all places are in use."""
        full = len(self.served) >= self._limits.connections
        return full or any(each.account == connection.account for each in self.waiting)

    def closing(self, connection: Connection) -> None:
        """Count *connection*, which is closing, no longer against its caller's limit."""
        self._release(connection.account)
        connection.account = _CLOSING
        self._per_account[_CLOSING] += 1

    def remove(self, connection: Connection) -> bool:
        """Forget *connection*; whether it had a place."""
        self.waiting.pop(connection, None)
        self.rejected.pop(connection, None)
        if connection not in self.served:
            return False
        del self.served[connection]
        self._release(connection.account)
        return True

    def _has_room(self, account: str) -> bool:
        return (
            len(self.served) < self._limits.connections
            and self._per_account[account] < self._limits.per_caller
        )

    def _serve(self, connection: Connection) -> None:
        self.served[connection] = None
        self._per_account[connection.account] += 1

    def _release(self, account: str) -> None:
        self._per_account[account] -= 1
        # Free the memory of accounts without connections.
        if not self._per_account[account]:
            del self._per_account[account]
