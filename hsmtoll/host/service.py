"""Assembles the parts of one signing host; its housekeeping and shutdown."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from hsmtoll.clock import SystemClock
from hsmtoll.errors import HsmTollError
from hsmtoll.host.audit import Audit, noted_checkpoint
from hsmtoll.host.authorize import Authorizer
from hsmtoll.host.emergency_stop import stop_file
from hsmtoll.host.expiry_log import ExpiryLog
from hsmtoll.host.group_commit import GroupCommit
from hsmtoll.host.health import HostHealth
from hsmtoll.host.measures import Measures, States
from hsmtoll.host.profiles import Profiles
from hsmtoll.host.requests import Requests
from hsmtoll.host.required import needed
from hsmtoll.host.status_page import status_page
from hsmtoll.host.system import clock_is_synchronised
from hsmtoll.settings import load

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hsmtoll.clock import Clock
    from hsmtoll.settings import Settings

__all__ = ["Service"]


class Service:
    """
    One signing host, without its sockets. *profile* and *config* are those that the settings came
    from; the policy's profiles override them. *synchronised* returns whether the clock is kept
    (NTP). *clock* is for tests. *progress* is called repeatedly while the audit is read.

    Created and closed outside of the event loop, used on it. Raises ConfigurationError for an
    invalid policy, AuditBroken for an audit that cannot be continued.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        config: str | os.PathLike[str] | None = None,
        profile: str | None = None,
        clock: Clock | None = None,
        synchronised: Callable[[], bool] = clock_is_synchronised,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        host, clock, stopping = settings.host, clock or SystemClock(), stop_file(settings)
        if host.clock != "synchronised":
            synchronised = _always
        self._stopped: str | None = None
        self._clock = clock
        self.measures = Measures()
        self.profiles = Profiles(
            needed(host.policy, "policy"),
            stop_file=stopping,
            load=partial(load, config=config, profile=profile),
            clock=clock,
            synchronised=synchronised,
            deadline=settings.deadline,
            measures=self.measures,
        )
        self.audit = Audit(
            needed(host.audit_dir, "audit_dir"),
            needed(host.audit_key, "audit_key"),
            now=lambda: clock.now().wall,
            noted=noted_checkpoint(settings),
            progress=progress,
        )
        self.audit.write("start", policy_sha256=self.profiles.policy.sha256, outcome="started")
        # Without a checkpoint, a log is accepted only if it has nothing but its start.
        self.audit.seal()
        self.commit = GroupCommit(self.audit)
        self.authorizer = Authorizer(self.profiles, self.audit, stopping, clock)
        self.requests = Requests(
            self.profiles,
            self.authorizer,
            self.audit,
            self.commit,
            clock,
            settings.deadline,
            self.measures,
        )
        self.expiry_log = ExpiryLog(host, self.profiles, clock)
        self.health = HostHealth(self.authorizer, self.profiles, self.audit, synchronised)
        self.measures.registry.register(States(self.health, self.profiles, self.audit))

    def status_page(self) -> str:
        """The page for the custodian."""
        now = self._clock.now().wall
        return status_page(self.health, self.profiles, self.audit, now=now)

    async def reload(self) -> str | None:
        """Reload the policy. Returns the reason if the old one stays in force."""
        return await self.profiles.reload(self.audit, self.commit)

    async def housekeeping(self) -> None:
        """Called by a timer: seal the audit, and record each stop and resume."""
        self.authorizer.log_left_out()
        self.expiry_log.log_due()
        await self.commit.in_thread(self.audit.seal_if_due)
        now = self.authorizer.stopped()
        if now != self._stopped:
            self._stopped = now
            outcome = "resumed" if now is None else f"stopped: {now}"
            sha256 = self.profiles.policy.sha256
            await self.commit.write("stop", policy_sha256=sha256, outcome=outcome)

    async def alive(self) -> None:
        """Return once the event loop and the audit's thread have responded."""
        await self.commit.in_thread(lambda: None)

    def close(self) -> None:
        """Close the devices and seal the audit. Call it after the requests have finished."""
        self.authorizer.ending = True
        self.commit.close()
        for profile in self.profiles:
            profile.close()
        with contextlib.suppress(HsmTollError):
            self.audit.write("stop", policy_sha256=self.profiles.policy.sha256, outcome="ended")
        self.audit.close()


def _always() -> bool:
    return True
