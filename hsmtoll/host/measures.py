"""
The metrics of a signing host, for Prometheus.

`Measures` counts what happens, where it happens; `States` is asked when metrics are collected.
Labels have names of the policy, words of this program and statuses of the services: no text of a
caller.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from hsmtoll.collectors import build_info
from hsmtoll.host import messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client import Metric

    from hsmtoll.host.audit import Audit
    from hsmtoll.host.health import HostHealth
    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import Entry, Policy
    from hsmtoll.host.profiles import Profile, Profiles

__all__ = ["PIN_STATES", "Measures", "States", "quotas"]

#: The label for a caller, profile or mode that the policy does not know.
_OTHER: Final = "other"

#: As `hsmtoll.hsm.device.Device.pin_state`.
PIN_STATES: Final = (
    "ok", "count-low", "to-be-changed", "final-try", "locked", "unset", "refused", "unresolved",
    "not-tried",
)  # fmt: skip

#: Seconds. A request waits 60 s at most for a device.
_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_MODES: Final = ("grant", "token")

#: Outcomes that are counted from zero: `increase` does not see the first of a new series.
_EXPECTED: Final = ("ok", "policy_denied", "quota_exceeded")


@dataclass(slots=True)
class Asked:
    """The labels of one request, as far as they are known."""

    profile: str = _OTHER
    caller: str = _OTHER
    mode: str = _OTHER

    def authenticated(self, policy: Policy, peer: Peer, profile: str) -> None:
        """Note who asks for which *profile*, if the policy knows them."""
        names = peer.names & policy.callers.keys()
        if len(names) == 1:
            (self.caller,) = names
        if profile in policy.profiles:
            self.profile = profile


class Measures:
    """Counts and times what happens at one host. Thread-safe."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "hsmtoll_host_requests",
            "Requests answered: ok, or the error of the reply.",
            ["profile", "caller", "mode", "outcome"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "hsmtoll_host_request_duration_seconds",
            "From the header of a request to its reply.",
            ["mode"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.signatures = Counter(
            "hsmtoll_host_signatures",
            "Signatures asked of the device, those of self-tests included.",
            ["profile"],
            registry=registry,
        )
        self.signing_seconds = Histogram(
            "hsmtoll_host_signing_duration_seconds",
            "A grant at the device, reading its certificates included.",
            ["profile"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._token_request_seconds = Histogram(
            "hsmtoll_host_token_request_duration_seconds",
            "Requests to Maskinporten and Customs, by status or error code.",
            ["profile", "server", "outcome"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.connections_refused = Counter(
            "hsmtoll_host_connections_refused",
            "Connections closed without service: crowded (made room for another), busy (too many),"
            " handshake (TLS).",
            ["reason"],
            registry=registry,
        )
        for reason in ("crowded", "busy", "handshake"):
            self.connections_refused.labels(reason)

    def expect(self, policy: Policy) -> None:
        """Begin at zero what the callers of *policy* may cause."""
        for profile in policy.profiles:
            self.signatures.labels(profile)
        for caller, table in policy.callers.items():
            for profile in table.profiles:
                for mode, outcome in product(_MODES, _EXPECTED):
                    self._requests.labels(profile, caller, mode, outcome)
        for profile in (*policy.profiles, _OTHER):
            for mode in _MODES:
                self._requests.labels(profile, _OTHER, mode, "policy_denied")

    @contextlib.contextmanager
    def request(self) -> Iterator[Asked]:
        """Count and time one request."""
        asked, outcome = Asked(), "cancelled"
        with self._request_seconds.time() as timer:
            try:
                yield asked
                outcome = "ok"
            except Exception as exc:
                outcome = messages.error_word(exc)
                raise
            finally:
                timer.labels(asked.mode)
                self._requests.labels(asked.profile, asked.caller, asked.mode, outcome).inc()

    def token_request(self, profile: str, server: str, outcome: str, seconds: float) -> None:
        """Count and time one request to a token endpoint."""
        self._token_request_seconds.labels(profile, server, outcome).observe(seconds)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type, in the format that *accept* asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


@dataclass(frozen=True, slots=True)
class Quota:
    """The usage of one quota of a caller: *used* of *limit* in a *period* (minute or day)."""

    caller: str
    profile: str
    period: str
    used: int
    limit: int

    @property
    def share(self) -> float:
        """0 to 1; a quota of nothing is used up."""
        return min(1.0, self.used / self.limit) if self.limit else 1.0


def quotas(policy: Policy, audit: Audit) -> Iterator[Quota]:
    """The quotas that *policy* sets."""
    for caller, table in policy.callers.items():
        for profile, entry in table.profiles.items():
            yield from _quotas_of(caller, profile, entry, audit)


def _quotas_of(caller: str, profile: str, entry: Entry, audit: Audit) -> Iterator[Quota]:
    used = audit.counts(caller, profile)
    if entry.per_minute is not None:
        yield Quota(caller, profile, "minute", used.minute, entry.per_minute)
    if entry.per_day is not None:
        yield Quota(caller, profile, "day", used.day, entry.per_day)


@dataclass(frozen=True, slots=True)
class States:
    """How a host is now. A collector of prometheus-client; collected on the host's event loop."""

    health: HostHealth
    profiles: Profiles
    audit: Audit

    def collect(self) -> Iterable[Metric]:
        """The metrics now."""
        yield build_info()
        health, audit, profiles = self.health, self.audit, self.profiles
        yield _gauge("ready", "Whether grants can be signed for all profiles.", health.ready)
        yield _gauge("stopped", "Whether signing is stopped.", health.stopped)
        yield _gauge(
            "clock_synchronised",
            "Whether the clock is synchronised, or need not be.",
            health.synchronised(),
        )
        yield _gauge("audit_writable", "Whether the audit log can be written.", not audit.broken)
        yield _gauge("audit_seq", "Number of the last record of the audit log.", audit.seq)
        yield _gauge(
            "audit_unsealed_records", "Records that no checkpoint covers yet.", audit.unsealed
        )
        yield _gauge(
            "audit_last_seal_timestamp_seconds", "Time of the last checkpoint.", audit.sealed_at
        )
        yield _gauge("audit_free_bytes", "Room on the disk of the audit log.", audit.free_bytes())
        yield _gauge(
            "policy_last_reload_successful",
            "Whether the last reload put the policy file in force.",
            profiles.reloaded,
        )
        yield _gauge(
            "policy_last_reload_success_timestamp_seconds",
            "When the policy in force was loaded.",
            profiles.loaded_at,
        )
        yield self._quotas()
        yield from _of_profiles(tuple(profiles))

    def _quotas(self) -> Metric:
        family = _family(
            "quota_used_ratio", "Share of a quota that is used.", "profile", "caller", "period"
        )
        for each in quotas(self.profiles.policy, self.audit):
            family.add_metric([each.profile, each.caller, each.period], each.share)
        return family


def _of_profiles(profiles: Sequence[Profile]) -> Iterator[Metric]:
    up = _family("device_up", "Whether the device signs.", "profile")
    waiting = _family("waiting_requests", "Requests that wait for the device.", "profile")
    pin = _family("pin_state", "1 for the state of the PIN as last seen.", "profile", "state")
    ends = _family(
        "certificate_not_after_timestamp_seconds",
        "When the certificate in use expires.",
        "profile",
    )
    left = _family(
        "token_remaining_seconds",
        "Until the last token that is held expires; 0 after that.",
        "profile",
    )
    skew = _family(
        "clock_skew_seconds",
        "Maskinporten's clock minus this one, at its last reply.",
        "profile",
    )
    for profile in profiles:
        name = profile.name
        up.add_metric([name], profile.health.failure is None)
        waiting.add_metric([name], profile.waiting)
        state = profile.pin_state
        if state is not None:
            for each in PIN_STATES:
                pin.add_metric([name, each], each == state)
        for family, value in (
            (ends, None if profile.not_after is None else profile.not_after.timestamp()),
            (left, profile.cache.left()),
            (skew, profile.app.skew.observed),
        ):
            if value is not None:
                family.add_metric([name], value)
    yield from (up, waiting, pin, ends, left, skew)


def _family(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hsmtoll_host_{name}", about, labels=labels)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"hsmtoll_host_{name}", about, value=value)
