"""
What operators see: how a client stands, as a value and as metrics for Prometheus.

Read from what the process has seen anyway: neither the device nor the network is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError, install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.registry import CollectorRegistry

    from hsmtoll.tokens.engine import Engine

__all__ = ["Status", "register", "status_of"]


@dataclass(frozen=True, slots=True)
class Status:
    """
    One look at a client.

    *waiting*: callers who wait for a renewal. *signatures* spent. *legs*: by name and outcome.
    *hits*: tokens given, by where they came from. *dark_in*: seconds until the last living
    token dies, if nothing can be renewed. *certificate_days* left, and *pin*, the state of the
    PIN as last seen: ``None`` where the device was not needed. *skew*: seconds.
    """

    waiting: int
    signatures: int
    legs: Mapping[tuple[str, str], int]
    hits: Mapping[str, int]
    dark_in: float | None
    certificate_days: float | None
    skew: float
    pin: str | None


def status_of(engine: Engine) -> Status:
    """How it stands now."""
    ends = engine.counts.not_after
    now = engine.clock.now().wall
    return Status(
        waiting=engine.cache.waiting(),
        signatures=engine.counts.signatures,
        legs=dict(engine.counts.legs),
        hits=dict(engine.cache.hits),
        dark_in=engine.cache.left(),
        certificate_days=(ends.timestamp() - now) / 86_400 if ends is not None else None,
        skew=engine.skew.seconds,
        pin=engine.pin_state(),
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
                ("dark_in_seconds", "Until the last living token dies.", seen.dark_in),
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
