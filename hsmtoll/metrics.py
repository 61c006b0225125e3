"""
The status of a client, as a value and as Prometheus metrics.

Uses only what the process knows already: no access to the device or the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError, import_optional, install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from prometheus_client.registry import CollectorRegistry

    from hsmtoll.tokens.token_service import TokenService

__all__ = ["Status", "register", "status_of"]


@dataclass(frozen=True, slots=True)
class Status:
    """
    One look at a client.

    *waiting*: callers that wait for a renewal. *signatures*: number spent. *requests*: number of
    requests to the token endpoints, by server and outcome. *hits*: tokens given out, by source.
    *seconds_until_expiry*: until the last valid token expires, if nothing can be renewed.
    *certificate_not_after*: end of the certificate that signed last; *certificate_days*: days left.
    *pin*: state of the PIN as last seen, ``None`` if the device was not needed. *skew*: clock
    correction in seconds.
    """

    waiting: int
    signatures: int
    requests: Mapping[tuple[str, str], int]
    hits: Mapping[str, int]
    seconds_until_expiry: float | None
    certificate_not_after: datetime | None
    certificate_days: float | None
    skew: float
    pin: str | None


def status_of(token_service: TokenService) -> Status:
    """How it stands now."""
    ends = token_service.counts.not_after
    now = token_service.clock.now().wall
    return Status(
        waiting=token_service.cache.waiting(),
        signatures=token_service.counts.signatures,
        requests=dict(token_service.counts.requests),
        hits=dict(token_service.cache.hits),
        seconds_until_expiry=token_service.cache.left(),
        certificate_not_after=ends,
        certificate_days=(ends.timestamp() - now) / 86_400 if ends is not None else None,
        skew=token_service.skew.seconds,
        pin=token_service.pin_state(),
    )


def register(
    registry: CollectorRegistry, status: Callable[[], Status], **labels: str
) -> Callable[[], None]:
    """
    Put the metrics of a client on *registry*: ``register(REGISTRY, client.status)``.

    Several clients of one registry need *labels* that tell them apart: ``client="road"``. Returns
    the function that takes this client off the registry again, to be called when it is closed;
    further calls do nothing.

    ConfigurationError without the extra ``metrics``; UsageError for labels that another client of
    the registry has, and for a label that cannot be used.
    """
    missing = ConfigurationError(
        "metrics: prometheus-client is not installed",
        hint=install_extra("metrics"),
        code="extra-missing",
    )
    collectors = import_optional("hsmtoll.collectors", missing)
    remove: Callable[[], None] = collectors.add_client(registry, status, labels)
    return remove
