"""The proxy's metrics, beside those of the client whose tokens it uses; for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from hsmtoll.metrics import register
from hsmtoll.proxy.admission import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.metrics import Status

__all__ = ["Measures"]


class Measures:
    """Counts requests. *status*: of the client, as in `hsmtoll.metrics.register`."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        register(self._registry, status)
        self._requests = Counter(
            "hsmtoll_proxy_requests",
            "Requests answered, by API and status.",
            ["api", "method", "status"],
            registry=self._registry,
        )
        self._duration = Histogram(
            "hsmtoll_proxy_request_duration_seconds",
            "From a request's headers to the end of the answer.",
            ["api"],
            registry=self._registry,
        )

    def count(self, api: str, method: str, status: int, seconds: float) -> None:
        """Count one answer. *api*: ``none`` for a request of no API."""
        known = method if method in METHODS else "other"
        self._requests.labels(api, known, str(status)).inc()
        self._duration.labels(api).observe(seconds)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type, in the format that *accept* asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
