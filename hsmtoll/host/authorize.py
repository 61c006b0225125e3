"""
Authorization of one request: stop file, policy, quota, shutdown, clock, and a connected caller.

Runs on the event loop without awaiting, so that a decision and the audit record appended after it
are atomic: no other request is decided between the two. Refusals are recorded, up to a limit per
account and minute.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from hsmtoll.errors import ClockError, PolicyDenied, TryAgainLater, sanitized
from hsmtoll.host.emergency_stop import stopped_by
from hsmtoll.host.policy import decide

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll.clock import Clock
    from hsmtoll.errors import HsmTollError, Scope
    from hsmtoll.host.audit import Audit
    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import GrantRequest, Mode, Policy, Verdict
    from hsmtoll.host.profiles import Profiles

__all__ = ["Authorization", "Authorizer", "RequestContext", "busy"]

_log = logging.getLogger("hsmtoll.host")

#: Refusals recorded and logged per account and minute; further ones are only counted, so that a
#: caller without any permission cannot fill the disk that signing depends on.
_MAX_RECORDED_REFUSALS: Final = 60
_MINUTE: Final = 60.0

#: Seconds, for the Retry-After of a host whose clock is not synchronised.
_RETRY_AFTER: Final = 5.0


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One request and its *peer*; *disconnected* returns whether the client has disconnected."""

    peer: Peer
    request: GrantRequest
    mode: Mode
    disconnected: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Authorization:
    """A permitted request: the full *scope*, and the members common to its audit records."""

    scope: str
    record: dict[str, Any]


class Authorizer:
    """Authorizes each request of one host. While *ending* (shutdown), all are refused."""

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
        Authorize *context* now. *of* names the counter that the quota applies to: signatures,
        replies, or the higher of both. A refusal is recorded and raised.
        """
        policy, profile = self._profiles.policy, context.request.profile
        names = context.peer.names & policy.callers.keys()
        counts = {name: self._audit.counts(name, profile, of=of) for name in names}
        verdict = decide(policy, context.peer, context.request, context.mode, counts)
        record = _record(context, verdict, policy)
        refusal = self._refusal(context, verdict, policy)
        if refusal is not None:
            self._record_refusal(context.peer.account, record, refusal)
            raise refusal
        return Authorization(verdict.scope, record)

    def refuse(self, refusal: HsmTollError, account: str) -> None:
        """Record a *refusal* of *account* that was made before authorization."""
        record = {"caller": account, "policy_sha256": self._profiles.policy.sha256}
        self._record_refusal(account, record, refusal)

    def check_still_wanted(self, context: RequestContext) -> None:
        """Raise if signing was stopped or the client has disconnected. Thread-safe."""
        self.check_not_stopped()
        if context.disconnected():
            raise _disconnected()

    def stopped(self) -> str | None:
        """Why signing is stopped: the stop file exists or cannot be checked; else ``None``."""
        return stopped_by(self._stop_file)

    def check_not_stopped(self) -> None:
        """PolicyDenied (``stopped``) while signing is stopped."""
        why = self.stopped()
        if why is not None:
            raise _stopped(why)

    def unavailable(self, seconds: float) -> TryAgainLater:
        """The error of a request that waited *seconds* for the device, or until shutdown."""
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
                hint="ask the signing host's custodian; `hsmtoll policy test` explains the policy",
                code="policy",
                signed=False,
                scope="caller",
            )
        if self.ending:
            return _ending()
        if not self._profiles.clock_is_right(self._profiles.get(context.request.profile)):
            return ClockError(
                "clock: the signing host's clock is not synchronised",
                hint="on the host: synchronise it with NTP; nothing is signed until then",
                code="clock-unsynchronised",
                retry_after=_RETRY_AFTER,
                signed=False,
                scope="caller",
            )
        return _disconnected() if context.disconnected() else None

    def _over_quota(
        self, context: RequestContext, verdict: Verdict, policy: Policy
    ) -> TryAgainLater:
        profile = context.request.profile
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
        unrecorded = self._refusals.count(account)
        if unrecorded is None:
            return
        names = [
            f"{name} {record[name]}" for name in ("caller", "profile", "scope") if name in record
        ]
        _log.warning(
            "refused: %s: %s: %s", ", ".join(names), refusal.code, refusal,
            extra={
                "event": "refused", "caller": record["caller"], "profile": record.get("profile"),
            },
        )  # fmt: skip
        more = f" ({unrecorded} earlier ones were not recorded)" if unrecorded else ""
        # Not synced: nothing depends on this record.
        self._audit.append("refused", **record, outcome=f"{refusal.code}: {refusal}{more}")

    def log_left_out(self) -> None:
        """Log how many refusals of an account were left out in the minute that has ended."""
        for account, number in self._refusals.left_out():
            _log.warning(
                "refused: caller %s: %d more within a minute, left out here", account, number,
                extra={"event": "refused", "caller": account},
            )  # fmt: skip


@dataclass(slots=True)
class _Minute:
    """
    The refusals of one account: when their minute began (boot clock), how many, and whether those
    above the limit are in `_RefusalLimit.ended`.
    """

    since: float
    count: int = 0
    noted: bool = False

    def unrecorded(self) -> int:
        return max(0, self.count - _MAX_RECORDED_REFUSALS)

    def ended(self, now: float) -> bool:
        return now >= self.since + _MINUTE


@dataclass(slots=True)
class _RefusalLimit:
    """Counts refusals by account. *ended*: what `left_out` returns next."""

    clock: Clock
    minutes: dict[str, _Minute] = field(default_factory=dict)
    ended: list[tuple[str, int]] = field(default_factory=list)

    def count(self, account: str) -> int | None:
        """``None`` above the limit; otherwise the number not recorded just before this one."""
        now = self.clock.now().boot
        if len(self.minutes) > 10 * _MAX_RECORDED_REFUSALS:
            self._note_ended(now)
            self.minutes = {who: each for who, each in self.minutes.items() if not each.ended(now)}
        minute, unrecorded = self.minutes.get(account), 0
        if minute is None or minute.ended(now):
            if minute is not None:
                self._note(account, minute)
                unrecorded = minute.unrecorded()
            minute = self.minutes[account] = _Minute(now)
        minute.count += 1
        return unrecorded if minute.count <= _MAX_RECORDED_REFUSALS else None

    def left_out(self) -> list[tuple[str, int]]:
        """Account and number of the refusals above the limit in minutes that have ended, once."""
        self._note_ended(self.clock.now().boot)
        ended, self.ended = self.ended, []
        return ended

    def _note_ended(self, now: float) -> None:
        for account, minute in self.minutes.items():
            if minute.ended(now):
                self._note(account, minute)

    def _note(self, account: str, minute: _Minute) -> None:
        if minute.unrecorded() and not minute.noted:
            minute.noted = True
            self.ended.append((account, minute.unrecorded()))


def _record(context: RequestContext, verdict: Verdict, policy: Policy) -> dict[str, Any]:
    request = context.request
    options: dict[str, Any] = {
        "mode": context.mode,
        "consumer_org": request.consumer_org,
        "resource": request.resource,
    }
    if request.authorization_details:
        options["authorization_details"] = request.authorization_details
    return {
        "caller": verdict.caller or context.peer.account,
        "profile": sanitized(request.profile),
        "scope": verdict.scope or sanitized(request.scope),
        "options": options,
        "policy_sha256": policy.sha256,
    }


def busy(why: str, scope: Scope = "attempt") -> TryAgainLater:
    """The error of a request that failed for a temporary reason."""
    return TryAgainLater(
        f"busy: {why}", hint="try again", code="busy", retry_after=1.0, signed=False, scope=scope
    )


def _disconnected() -> TryAgainLater:
    return busy("the caller has disconnected", "caller")


def _ending() -> TryAgainLater:
    return busy("the host is shutting down", "caller")


def _stopped(why: str) -> PolicyDenied:
    # Scope `caller`, as of every refusal here: each request is refused and recorded on its own.
    return PolicyDenied(
        f"signing is stopped: {why}",
        hint="its custodian has to resume it: `hsmtoll resume`",
        code="stopped",
        signed=False,
        scope="caller",
    )
