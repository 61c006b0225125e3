"""What clients report to Prometheus. Needs prometheus-client (extra ``metrics``)."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from prometheus_client import core

from hsmtoll.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client.registry import CollectorRegistry

    from hsmtoll.metrics import Status

    Labels = tuple[tuple[str, str], ...]

__all__ = ["add_client", "build_info"]

#: Labels of the metrics themselves.
_TAKEN = frozenset({"server", "outcome", "state", "version"})


def build_info() -> core.Metric:
    """The running version, in the label of ``hsmtoll_build_info``."""
    return core.InfoMetricFamily(
        "hsmtoll_build", "The running version of hsmtoll.", value={"version": version("hsmtoll")}
    )


def add_client(
    registry: CollectorRegistry, status: Callable[[], Status], labels: Mapping[str, str]
) -> Callable[[], None]:
    """As `hsmtoll.metrics.register`, which checks that the library is there."""
    for name in labels:
        if name in _TAKEN or name.startswith("__") or not name.isascii():
            raise UsageError(
                f"metrics: {name} cannot be a label of a client",
                hint="choose another name, such as client",
            )
    collector = _collectors.get(registry)
    if collector is None:
        collector = _Clients()
        registry.register(collector)
        _collectors[registry] = collector
    key = tuple(sorted((name, str(value)) for name, value in labels.items() if value))
    if key in collector.clients:
        raise UsageError(
            f"metrics: a client with the labels {dict(key)} is registered already",
            hint='give each client of a registry its own, such as register(…, client="road")',
        )
    collector.clients[key] = status

    def remove() -> None:
        if collector.clients.get(key) is not status:
            return
        del collector.clients[key]
        if not collector.clients:
            del _collectors[registry]
            registry.unregister(collector)

    return remove


class _Clients:
    """All clients of one registry: it accepts each name once."""

    def __init__(self) -> None:
        self.clients: dict[Labels, Callable[[], Status]] = {}

    def describe(self) -> Iterable[core.Metric]:
        """The names, without asking a client."""
        return _families([])

    def collect(self) -> Iterable[core.Metric]:
        """The metrics of all clients now."""
        return _families([(dict(key), status()) for key, status in tuple(self.clients.items())])


_collectors: WeakKeyDictionary[CollectorRegistry, _Clients] = WeakKeyDictionary()


def _families(clients: Sequence[tuple[Mapping[str, str], Status]]) -> Iterable[core.Metric]:
    # To Prometheus an empty label is none.
    names = sorted({name for labels, _ in clients for name in labels})
    seen = [([labels.get(name, "") for name in names], status) for labels, status in clients]

    signatures = core.CounterMetricFamily(
        "hsmtoll_signatures", "Signatures asked of the device.", labels=names
    )
    requests = core.CounterMetricFamily(
        "hsmtoll_token_requests",
        "Requests to the token endpoints, by server and outcome.",
        labels=[*names, "server", "outcome"],
    )
    tokens = core.CounterMetricFamily(
        "hsmtoll_tokens", "Tokens given, by where they came from.", labels=[*names, "state"]
    )
    pin = core.InfoMetricFamily("hsmtoll_pin", "State of the PIN as last seen.", labels=names)
    for own, status in seen:
        signatures.add_metric(own, status.signatures)
        for (server, outcome), count in sorted(status.requests.items()):
            requests.add_metric([*own, server, outcome], count)
        for state, count in sorted(status.hits.items()):
            tokens.add_metric([*own, state], count)
        if status.pin is not None:
            pin.add_metric(own, {"state": status.pin})
    yield from (build_info(), signatures, requests, tokens, pin)

    gauges: Sequence[tuple[str, str, Callable[[Status], float | None]]] = (
        ("waiting_callers", "Callers who wait for a renewal.", lambda s: s.waiting),
        (
            "time_to_expiry_seconds",
            "Until the last unexpired token expires.",
            lambda s: s.seconds_until_expiry,
        ),
        (
            "certificate_not_after_timestamp_seconds",
            "When the certificate that signed last expires.",
            _not_after,
        ),
        ("clock_skew_seconds", "Added to this machine's clock for iat.", lambda s: s.skew),
    )
    for name, about, value_of in gauges:
        gauge = core.GaugeMetricFamily(f"hsmtoll_{name}", about, labels=names)
        for own, status in seen:
            value = value_of(status)
            if value is not None:
                gauge.add_metric(own, value)
        yield gauge


def _not_after(status: Status) -> float | None:
    ends = status.certificate_not_after
    return None if ends is None else ends.timestamp()
