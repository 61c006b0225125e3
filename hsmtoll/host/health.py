"""Readiness of a signing host, with reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import sanitized

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.host.audit import Audit
    from hsmtoll.host.authorize import Authorizer
    from hsmtoll.host.profiles import Profiles

__all__ = ["HostHealth"]

#: The reason in /ready and in the log for the custodian.
_CLOCK: Final = (
    "the clock is not synchronised: run NTP, or set HSMTOLL_HOST__CLOCK=unchecked if it is kept by "
    "something that the kernel does not know of"
)


@dataclass(frozen=True, slots=True)
class HostHealth:
    """Readiness of one host. Used on its event loop."""

    authorizer: Authorizer
    profiles: Profiles
    audit: Audit
    synchronised: Callable[[], bool]

    def not_ready(self) -> list[str]:
        """The reasons why no grants can be signed now, one line each; empty if ready."""
        why = []
        stopped = self.authorizer.stopped()
        if stopped is not None:
            why.append(f"stopped: {stopped}")
        if self.audit.broken is not None:
            why.append(f"audit: {self.audit.broken}")
        if self.authorizer.ending:
            why.append("ending")
        for profile in self.profiles:
            if not self.profiles.clock_is_right(profile):
                why.append(f"profile {sanitized(profile.name)}: {_CLOCK}")
            elif profile.health.failure is not None:
                why.append(
                    f"profile {sanitized(profile.name)}: {sanitized(profile.health.failure)}"
                )
        return why

    @property
    def ready(self) -> bool:
        """Whether grants can be signed for all profiles."""
        return not self.not_ready()

    @property
    def stopped(self) -> bool:
        """Whether signing is stopped."""
        return self.authorizer.stopped() is not None
