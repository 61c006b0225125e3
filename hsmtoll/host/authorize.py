"""
Authorization of one request: stop file, policy, quota, end of the host, clock, caller still there.

Everything here runs on the event loop and awaits nothing, so that a decision and the record that
is appended after it are one step: no other request is decided between the two. A refusal is
recorded, but only so many of one account in a minute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from hsmtoll.errors import ClockError, PolicyDenied, TryAgainLater, foreign
from hsmtoll.host.emergency_stop import stopped_by
from hsmtoll.host.policy import decide

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll.clock import Clock
    from hsmtoll.errors import HsmTollError, Scope
    from hsmtoll.host.audit import Audit
    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import Ask, Mode, Policy, Verdict
    from hsmtoll.host.profiles import Profiles

__all__ = ["Authorization", "Authorizer", "RequestContext", "busy"]

#: Refusals of one account that are recorded in a minute; more are counted, so that nobody who may
#: have nothing can fill the disk that signing depends on.
_REFUSALS: Final = 60
_MINUTE: Final = 60.0

#: Seconds after which it is worth asking a host again whose clock is not synchronised.
_SOON: Final = 5.0


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Who asks, and for what; *gone* says whether the caller has left."""

    peer: Peer
    ask: Ask
    mode: Mode
    gone: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Authorization:
    """A request that may be served: the *scope* in full, and what its records have in common."""

    scope: str
    record: dict[str, Any]


class Authorizer:
    """The decision on each request of one host. Once it is *ending*, nothing new is signed."""

    def __init__(self, profiles: Profiles, audit: Audit, stop_file: Path, clock: Clock) -> None:
        self._profiles = profiles
        self._audit = audit
        self._stop_file = stop_file
        self._refusals = _RefusalLimit(clock)
        self.ending = False

    def authorize(
        self, context: RequestContext, *, of: Literal["signed", "given", "either"]
    ) -> Authorization:
        """
        Whether *context* may be served now, by what the caller had so far (*of*: signatures,
        replies, or whichever is more). Otherwise the refusal is recorded and raised.
        """
        policy, profile = self._profiles.policy, context.ask.profile
        names = context.peer.names & policy.callers.keys()
        counts = {name: self._audit.counts(name, profile, of=of) for name in names}
        verdict = decide(policy, context.peer, context.ask, context.mode, counts)
        record = _record(context, verdict, policy)
        refusal = self._refusal(context, verdict, policy)
        if refusal is not None:
            self._record_refusal(context.peer.account, record, refusal)
            raise refusal
        return Authorization(verdict.scope, record)

    def refuse(self, refusal: HsmTollError, account: str) -> None:
        """Record that somebody was refused before it could be asked who may have what."""
        record = {"caller": account, "policy_sha256": self._profiles.policy.sha256}
        self._record_refusal(account, record, refusal)

    def check_still_wanted(self, context: RequestContext) -> None:
        """Raise if a stop came, or the caller left. Safe to call from any thread."""
        self.check_not_stopped()
        if context.gone():
            raise _gone()

    def stopped(self) -> str | None:
        """Why nothing may be signed or given out: the stop file, or that nobody can look."""
        return stopped_by(self._stop_file)

    def check_not_stopped(self) -> None:
        """PolicyDenied (``stopped``) if nothing may be signed or given out."""
        why = self.stopped()
        if why is not None:
            raise _stopped(why)

    def unavailable(self, seconds: float) -> TryAgainLater:
        """For a request that has waited *seconds* for the device, or as long as the host lived."""
        return _ending() if self.ending else busy(f"no device was free within {seconds:g} s")

    def _refusal(
        self, context: RequestContext, verdict: Verdict, policy: Policy
    ) -> HsmTollError | None:
        why = self.stopped()
        if why is not None:
            return _stopped(why)
        if verdict.quota:
            return self._over_quota(context, verdict, policy)
        if not verdict.allowed:
            return PolicyDenied(
                verdict.why,
                hint="ask who keeps the signing host's policy; `hsmtoll policy test` explains it",
                code="policy",
                signed=False,
                scope="caller",
            )
        if self.ending:
            return _ending()
        if not self._profiles.clock_is_right(self._profiles.get(context.ask.profile)):
            return ClockError(
                "clock: the signing host's clock is not synchronised",
                hint="on the host: let NTP keep it; nothing is signed before",
                code="clock-unsynchronised",
                retry_after=_SOON,
                signed=False,
                scope="caller",
            )
        return _gone() if context.gone() else None

    def _over_quota(
        self, context: RequestContext, verdict: Verdict, policy: Policy
    ) -> TryAgainLater:
        profile = context.ask.profile
        entry = policy.callers[verdict.caller].profiles[profile]
        wait = self._audit.free_in(
            verdict.caller, profile, minute=entry.per_minute, day=entry.per_day
        )
        return TryAgainLater(
            f"{verdict.caller}: {verdict.why}",
            hint=f"the next is free in {wait:.0f} s",
            code="quota",
            retry_after=wait,
            signed=False,
            scope="caller",
        )

    def _record_refusal(self, account: str, record: dict[str, Any], refusal: HsmTollError) -> None:
        left_out = self._refusals.count(account)
        if left_out is None:
            return
        more = f" ({left_out} more before were not written down)" if left_out else ""
        # Nothing follows from it, so nobody waits until it is on disk.
        self._audit.append("refused", **record, outcome=f"{refusal.code}: {refusal}{more}")


@dataclass(slots=True)
class _RefusalLimit:
    """Counts refusals by account: the start of its minute (boot clock), and how many since."""

    clock: Clock
    seen: dict[str, tuple[float, int]] = field(default_factory=dict)

    def count(self, account: str) -> int | None:
        """``None`` for one too many; otherwise how many were left out just before this one."""
        now = self.clock.now().boot
        if len(self.seen) > 10 * _REFUSALS:
            self.seen = {who: each for who, each in self.seen.items() if now < each[0] + _MINUTE}
        since, count = self.seen.get(account, (now, 0))
        left_out = 0
        if now >= since + _MINUTE:
            left_out, since, count = max(0, count - _REFUSALS), now, 0
        self.seen[account] = (since, count + 1)
        return left_out if count < _REFUSALS else None


def _record(context: RequestContext, verdict: Verdict, policy: Policy) -> dict[str, Any]:
    ask = context.ask
    options: dict[str, Any] = {
        "mode": context.mode,
        "consumer_org": ask.consumer_org,
        "resource": ask.resource,
    }
    if ask.authorization_details:
        options["authorization_details"] = ask.authorization_details
    return {
        "caller": verdict.caller or context.peer.account,
        "profile": foreign(ask.profile),
        "scope": verdict.scope or foreign(ask.scope),
        "options": options,
        "policy_sha256": policy.sha256,
    }


def busy(why: str, scope: Scope = "attempt") -> TryAgainLater:
    """The error of a request that was not served, for a reason that will pass."""
    return TryAgainLater(
        f"busy: {why}", hint="try again", code="busy", retry_after=1.0, signed=False, scope=scope
    )


def _gone() -> TryAgainLater:
    return busy("the caller left", "caller")


def _ending() -> TryAgainLater:
    return busy("the host is ending", "caller")


def _stopped(why: str) -> PolicyDenied:
    # Of the caller's scope as every refusal here: each request is refused, and recorded, by itself.
    return PolicyDenied(
        f"signing is stopped: {why}",
        hint="its custodian has to resume it: `hsmtoll resume`",
        code="stopped",
        signed=False,
        scope="caller",
    )
