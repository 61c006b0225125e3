"""
State of the sandbox: clients, trust list, submissions, and the requests received.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa

__all__ = [
    "CUSTOMS_SCOPES",
    "SELF_TEST",
    "Anchor",
    "Client",
    "Document",
    "Received",
    "State",
    "Submission",
]

#: Norwegian scopes; each has an eSeal scope below ``toll:eu/`` unless in `_NORWEGIAN_ONLY`.
_NORWEGIAN: Final = (
    "toll:movement/road/v2",
    "toll:movement/air",
    "toll:movement/rail",
    "toll:movement/maritime",
    "toll:movement/entry",
    "toll:goodsdeclaration/document.write",
    "toll:declaration.feed",
    "toll:movement/maritimessnn",
)
_NORWEGIAN_ONLY: Final = frozenset({"toll:declaration.feed", "toll:movement/maritimessnn"})
_FOREIGN: Final = tuple(
    scope.replace("toll:", "toll:eu/", 1) for scope in _NORWEGIAN if scope not in _NORWEGIAN_ONLY
)
SELF_TEST: Final = "digdir:verksemd.eu"
CUSTOMS_SCOPES: Final = frozenset((*_NORWEGIAN, *_FOREIGN))
NORWEGIAN_SCOPES: Final = frozenset(_NORWEGIAN)
FOREIGN_SCOPES: Final = frozenset(_FOREIGN)


@dataclass(frozen=True, slots=True)
class Client:
    """
    A Norwegian client, as registered in Maskinporten's self-service (Samarbeidsportalen).

    *keys* maps kid to (public key, posted at, in epoch seconds); with any key registered, the
    client must use ``kid`` (M40). *scopes* is what stands on the client (M63), *granted* what
    the API owner has granted (M65; None: all of it).
    """

    client_id: str
    org_no: str
    scopes: frozenset[str] = NORWEGIAN_SCOPES
    keys: Mapping[str, tuple[rsa.RSAPublicKey, float]] = field(default_factory=dict)
    granted: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Anchor:
    """A trusted certificate; *environment* if it is accepted in only one of them (M31)."""

    certificate: x509.Certificate
    environment: Literal["test", "prod"] | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A message with an MRN: its organisation, its key, and the members that PUT may not change."""

    org: str
    level: str
    key: tuple[str, ...]
    fixed: tuple[str, ...]
    message: Mapping[str, Any]


@dataclass(slots=True)
class Submission:
    """
    One submission to a movement API; *ready_at* is in epoch seconds, *incomplete* codes of
    IncompleteDocumentationReason.
    """

    request_id: str
    org: str
    mode: str
    level: str
    method: str
    ready_at: float
    at: str
    mrn: str | None
    errors: list[dict[str, Any]]
    incomplete: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Received:
    """
    One received request, and its answer.

    *kind*: ``grant``, ``exchange`` or ``call``. For grants, *header* and *claims* are those of
    the assertion; for the others *claims* are those of the token. *refused_by* is a rule's id.
    """

    kind: str
    method: str
    path: str
    status: int
    header: Mapping[str, Any] | None = None
    claims: Mapping[str, Any] | None = None
    refused_by: str | None = None
    fault: str | None = None
    correlation_id: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(slots=True)
class State:
    """The mutable state of the sandbox. *lock* guards members that several threads use."""

    anchors: list[Anchor] = field(default_factory=list)
    pinned: list[x509.Certificate] = field(default_factory=list)
    clients: dict[str, Client] = field(default_factory=dict)
    revoked: set[int] = field(default_factory=set)
    allowed: dict[str, set[str]] = field(default_factory=dict)
    eseal_scopes: set[str] = field(default_factory=lambda: {*FOREIGN_SCOPES, SELF_TEST})
    delegations: set[tuple[str, str, str]] = field(default_factory=set)
    customs_denied: set[tuple[str, str]] = field(default_factory=set)
    used: dict[str, float] = field(default_factory=dict)
    exchanged: set[str] = field(default_factory=set)
    dead_tokens: set[str] = field(default_factory=set)
    submissions: dict[str, Submission] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    arrivals: dict[str, tuple[str, str]] = field(default_factory=dict)
    presentations: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    signals: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    uploads: list[tuple[str, str, str, int]] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def forget_used(self, now: float) -> None:
        """Drop the replay keys of expired grants (M58)."""
        self.used = {key: until for key, until in self.used.items() if until >= now}

    def delegate(self, consumer_org: str, supplier: str, scopes: Iterable[str]) -> None:
        """Delegate *scopes* of *consumer_org* to *supplier*."""
        with self.lock:
            self.delegations |= {(consumer_org, supplier, scope) for scope in scopes}
