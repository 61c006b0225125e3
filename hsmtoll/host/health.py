"""Readiness of a signing host, with reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import sanitized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.host.audit import Audit
    from hsmtoll.host.authorize import Authorizer
    from hsmtoll.host.profiles import Profiles

__all__ = ["HostHealth", "Reason"]

#: The reason in /ready and in the log for the custodian.
_CLOCK: Final = (
    "the clock is not synchronised: run NTP, or set HSMTOLL_HOST__CLOCK=unchecked if it is kept by "
    "something that the kernel does not know of"
)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why no grants can be signed: *text* of one line, and the *profile* that it is about."""

    text: str
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class HostHealth:
    """Readiness of one host. Used on its event loop."""

    authorizer: Authorizer
    profiles: Profiles
    audit: Audit
    synchronised: Callable[[], bool]

    def reasons(self) -> Iterator[Reason]:
        """Why no grants can be signed now; none if ready."""
        stopped = self.authorizer.stopped()
        if stopped is not None:
            yield Reason(f"stopped: {stopped}")
        if self.audit.broken is not None:
            yield Reason(f"audit: {self.audit.broken}")
        if self.authorizer.ending:
            yield Reason("ending")
        for profile in self.profiles:
            name = sanitized(profile.name)
            if not self.profiles.clock_is_right(profile):
                yield Reason(f"profile {name}: {_CLOCK}", profile.name)
            elif profile.health.failure is not None:
                yield Reason(f"profile {name}: {sanitized(profile.health.failure)}", profile.name)

    def not_ready(self) -> list[str]:
        """The texts of the reasons; empty if ready."""
        return [each.text for each in self.reasons()]

    @property
    def ready(self) -> bool:
        """Whether grants can be signed for all profiles."""
        return not self.not_ready()

    @property
    def stopped(self) -> bool:
        """Whether signing is stopped."""
        return self.authorizer.stopped() is not None
