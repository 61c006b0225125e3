"""
The status of a client, as a value and as Prometheus metrics.

Uses only what the process knows already: no access to the device or the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError, install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.registry import CollectorRegistry

    from hsmtoll.tokens.token_service import TokenService

__all__ = ["Status", "register", "status_of"]


@dataclass(frozen=True, slots=True)
class Status:
    """
    One look at a client.

    *waiting*: callers that wait for a renewal. *signatures*: number spent. *legs*: requests to the
    token endpoints, by name and outcome. *hits*: tokens given out, by source.
    *seconds_until_expiry*: until the last valid token expires, if nothing can be renewed.
    *certificate_days*: days left. *pin*: state of the PIN as last seen, ``None`` if the device was
    not needed. *skew*: clock correction in seconds.
    """

    waiting: int
    signatures: int
    legs: Mapping[tuple[str, str], int]
    hits: Mapping[str, int]
    seconds_until_expiry: float | None
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
        legs=dict(token_service.counts.legs),
        hits=dict(token_service.cache.hits),
        seconds_until_expiry=token_service.cache.left(),
        certificate_days=(ends.timestamp() - now) / 86_400 if ends is not None else None,
        skew=token_service.skew.seconds,
        pin=token_service.pin_state(),
    )


def register(registry: CollectorRegistry, status: Callable[[], Status]) -> None:
    """
    Put the metrics of a client on *registry*: ``register(REGISTRY, client.status)``.

    ConfigurationError without the extra ``metrics``.
    """
    try:
        from prometheus_client import core  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigurationError(
            "metrics: prometheus-client is not installed",
            hint=install_extra("metrics"),
            code="extra-missing",
        ) from exc

    class Collector:
        def collect(self) -> Iterable[core.Metric]:
            seen = status()
            yield core.CounterMetricFamily(
                "hsmtoll_signatures", "Signatures asked of the device.", value=seen.signatures
            )
            legs = core.CounterMetricFamily(
                "hsmtoll_legs", "Requests to the token endpoints.", labels=["leg", "outcome"]
            )
            for (leg, outcome), count in sorted(seen.legs.items()):
                legs.add_metric([leg, outcome], count)
            yield legs
            hits = core.CounterMetricFamily(
                "hsmtoll_tokens", "Tokens given, by where they came from.", labels=["state"]
            )
            for state, count in sorted(seen.hits.items()):
                hits.add_metric([state], count)
            yield hits
            for name, about, value in (
                ("waiting_callers", "Callers who wait for a renewal.", seen.waiting),
                (
                    "time_to_expiry_seconds",
                    "Until the last living token dies.",
                    seen.seconds_until_expiry,
                ),
                ("certificate_days", "Days until the certificate expires.", seen.certificate_days),
                ("clock_skew_seconds", "Added to this machine's clock for iat.", seen.skew),
            ):
                if value is not None:
                    yield core.GaugeMetricFamily(f"hsmtoll_{name}", about, value=value)
            if seen.pin is not None:
                yield core.InfoMetricFamily(
                    "hsmtoll_pin", "State of the PIN as last seen.", value={"state": seen.pin}
                )

    registry.register(Collector())
