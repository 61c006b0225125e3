"""
The profiles of the policy: their devices, self-tests, and the switch to a reloaded policy.

All of it runs on the event loop, except reading files and calling devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.app import App
from hsmtoll.clock import Skew
from hsmtoll.errors import AuditBroken, ConfigurationError, DeviceError, HsmTollError, sanitized
from hsmtoll.host.authorize import busy
from hsmtoll.host.emergency_stop import check_stop_directory, stopped_by
from hsmtoll.host.policy import Policy
from hsmtoll.host.self_test import Health, sign_self_test
from hsmtoll.tokens.token_service import Counts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from hsmtoll.clock import Clock
    from hsmtoll.host.audit import Audit
    from hsmtoll.host.group_commit import GroupCommit
    from hsmtoll.host.measures import Measures
    from hsmtoll.settings import Settings
    from hsmtoll.tokens.cache import Cache

__all__ = ["Profile", "Profiles", "profile_settings"]

_log = logging.getLogger("hsmtoll.host")

#: Concurrent signing requests for each worker of the device: one is at the device while the
#: audit records of the others are written.
_SLOTS: Final = 4

#: Seconds that a reload waits for the self-tests of new profiles. Until then the old policy is
#: in force, with the permissions that the new one may have withdrawn.
_TAKEOVER_TIMEOUT: Final = 10.0

#: Seconds, for the Retry-After of a profile that is not ready.
_RETRY_AFTER: Final = 5.0


class _NoClockCorrection(Skew):
    """Notes the services' Date headers and no more: a host's clock is kept by NTP alone."""

    def learn(self, offset: float) -> bool:
        """Note *offset*; never correct."""
        self.observed = offset
        return False


@dataclass(slots=True, eq=False)
class Profile:
    """
    One profile at runtime; *table* is its table in the policy. *executor* has one thread for each
    of the device's *workers*. *leaf* is the SHA-256 of the certificate that signed last, and
    *not_after* its end; without one, of that which the self-test found. Once *retired*, it signs no
    further request, and is closed after the last one has ended.
    """

    name: str
    table: Mapping[str, Any]
    app: App
    cache: Cache
    workers: int
    executor: ThreadPoolExecutor
    health: Health = field(default_factory=Health)
    leaf: str | None = None
    not_after: datetime | None = None
    self_test: asyncio.Task[None] | None = None
    retired: bool = False
    _slots: asyncio.Semaphore = field(init=False)
    _waiting: int = 0
    _inside: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(_SLOTS * self.workers)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return self._waiting

    @property
    def pin_state(self) -> str | None:
        """As `Device.pin_state`."""
        return self.app.token_service.pin_state()

    def check_ready(self) -> None:
        """DeviceError (``not-ready``) until the first self-test has passed."""
        if not self.health.proven:
            raise DeviceError(
                f"profile {sanitized(self.name)}: not ready, {self.health.failure}",
                hint="the host repeats the self-test by itself",
                code="not-ready",
                retry_after=_RETRY_AFTER,
                signed=False,
            )

    @contextlib.asynccontextmanager
    async def signing_slot(self, seconds: float) -> AsyncIterator[None]:
        """
        Hold one of the slots for concurrent requests, first come, first served. TryAgainLater if
        none is free within *seconds*.
        """
        self._waiting += 1
        try:
            async with asyncio.timeout(seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise busy(f"no device was free within {seconds:g} s") from None
        finally:
            self._waiting -= 1
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._slots.release()
            self._close_if_idle()

    def kids(self) -> frozenset[str]:
        """The registered keys that sign, as far as they are known: the setting, and those used."""
        kid = self.app.settings.kid
        named = {kid} - {None, "thumbprint"}
        return frozenset(each for each in named if each) | self.app.key_uses.kids

    def wake_waiters(self) -> None:
        """Give all waiters a slot at once; the authorization after it refuses each of them."""
        for _ in range(self._waiting):
            self._slots.release()

    def retire(self) -> None:
        """Stop signing: the policy has removed or replaced this profile."""
        self.retired = True
        self.wake_waiters()
        self._close_if_idle()

    def close(self) -> None:
        """Close the device, without waiting for a signature that is under way."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.app.close()

    def _close_if_idle(self) -> None:
        if self.retired and not self._closed and not self._inside and not self._waiting:
            self._closed = True
            self.executor.submit(self.app.close)
            self.executor.shutdown(wait=False)


class Profiles:
    """
    The policy in use and its profiles. *load* returns the host's settings, overridden by those of
    a profile. Raises ConfigurationError for an invalid policy.
    """

    def __init__(
        self,
        path: Path,
        *,
        stop_file: Path,
        load: Callable[..., Settings],
        clock: Clock,
        synchronised: Callable[[], bool],
        deadline: float,
        measures: Measures,
    ) -> None:
        self._path = path
        self._stop_file = stop_file
        self._load = load
        self._clock = clock
        self._synchronised = synchronised
        self._deadline = deadline
        self._measures = measures
        self.policy, self._profiles = self._read({})
        #: Whether the last reload succeeded, and when (epoch seconds) the policy was loaded.
        self.reloaded, self.loaded_at = True, clock.now().wall
        measures.expect(self.policy)

    def get(self, name: str) -> Profile | None:
        """The profile *name* of the policy in use."""
        return self._profiles.get(name)

    def __iter__(self) -> Iterator[Profile]:
        return iter(tuple(self._profiles.values()))

    def clock_is_right(self, profile: Profile | None) -> bool:
        """Whether the clock is synchronised; for a sandbox profile always true."""
        sandbox = profile is not None and profile.app.settings.environment == "sandbox"
        return sandbox or self._synchronised()

    # ------------------------------------------------------------------ reading

    def _read(self, known: Mapping[str, Profile]) -> tuple[Policy, dict[str, Profile]]:
        """Read the policy. Profiles of *known* with an unchanged table are kept as they are."""
        policy = Policy.load(self._path)
        if os.geteuid() != 0 and os.access(self._path, os.W_OK):
            _log.warning(
                "policy %s: this daemon's own account can change it; another account should own it",
                sanitized(self._path),
            )
        check_stop_directory(self._stop_file)
        profiles = {}
        for name, table in policy.profiles.items():
            profile = known.get(name)
            if profile is not None and profile.table == table:
                if profile.app.signers.certificate_file is not None:
                    profile.app.signers.certificate_file(afresh=True)
                profiles[name] = profile
            else:
                profiles[name] = self._new_profile(name, table)
        return policy, profiles

    def _new_profile(self, name: str, table: Mapping[str, Any]) -> Profile:
        try:
            app = self._app(name, profile_settings(table, self._load))
            workers = app.settings.host.workers
            executor = ThreadPoolExecutor(workers, "hsmtoll-device")
            return Profile(name, table, app, app.token_service.cache, workers, executor)
        except HsmTollError as exc:
            raise ConfigurationError(
                f"policy {self._path}: profile {sanitized(name)}: {exc}",
                hint=exc.hint,
                code=exc.code,
            ) from exc

    def _app(self, name: str, settings: Settings) -> App:
        worker = {
            "program": "hsmtoll.host.worker",
            "rules": {
                "policy": str(self._path.absolute()),
                "profile": name,
                "issuer": settings.iss,
                "kid": settings.kid,
                "certificate_sha256": settings.hsm.certificate_sha256,
            },
        }
        counts = Counts(ended=partial(self._measures.token_request, name))
        app = App(settings, clock=self._clock, worker=worker, counts=counts)
        app.skew = _NoClockCorrection()
        app.hsm.module(app.hsm.uris()[0])
        return app

    async def reload(self, audit: Audit, commit: GroupCommit) -> str | None:
        """
        Reload the policy. Returns the reason if the old one stays in force: the new one is
        invalid, or the audit cannot be written. The replacement of a working profile is tested
        before the switch.
        """
        before = self._profiles
        try:
            policy, profiles = await asyncio.to_thread(self._read, before)
        except HsmTollError as exc:
            return await self._keep_policy(exc, commit)
        new = [profile for profile in profiles.values() if profile not in before.values()]
        await self._test_before_takeover(new)
        try:
            audit.append("policy", policy_sha256=policy.sha256, outcome="loaded")
            self.policy, self._profiles = policy, profiles
            self.reloaded, self.loaded_at = True, self._clock.now().wall
            self._measures.expect(policy)
            await commit.synced()
        except AuditBroken as exc:
            # Without an audit nothing is signed, with either policy.
            return await self._keep_policy(exc, commit)
        finally:
            for profile in (*before.values(), *new):
                if self._profiles.get(profile.name) is not profile:
                    profile.retire()
        _log.info("policy reloaded: %s", policy.sha256, extra={"event": "policy-reloaded"})
        return None

    async def _keep_policy(self, exc: HsmTollError, commit: GroupCommit) -> str:
        self.reloaded = False
        _log.error(
            "policy not reloaded, the old one stays in force: %s", exc,
            extra={"event": "policy-kept"},
        )  # fmt: skip
        with contextlib.suppress(HsmTollError):
            sha256 = self.policy.sha256
            await commit.write("policy", policy_sha256=sha256, outcome=f"kept: {exc}")
        return str(exc)

    # ------------------------------------------------------------------ self-test

    async def self_test(self, seconds: float) -> None:
        """
        Run the self-tests that are due: of profiles that have not passed yet, or whose device has
        failed since. One usable key of a profile is enough. The result is the profile's `Health`.
        After a failure that may have cost a signature the interval doubles until a grant is signed.

        Returns when all have ended, or after *seconds*; unfinished ones continue in the background.
        """
        if stopped_by(self._stop_file) is None:
            tests = [self._test_of(profile) for profile in self]
            await _wait([test for test in tests if test is not None], seconds)

    async def _test_before_takeover(self, new: list[Profile]) -> None:
        """
        Test *new* profiles that replace a working one. Requests that arrive meanwhile are served
        with the old profiles.
        """
        if stopped_by(self._stop_file) is not None:
            return
        tests = []
        for profile in new:
            old = self._profiles.get(profile.name)
            if old is not None and old.health.failure is None:
                tests.append(self._test_of(profile))
        await _wait(
            [test for test in tests if test is not None], min(self._deadline, _TAKEOVER_TIMEOUT)
        )

    def _test_of(self, profile: Profile) -> asyncio.Task[None] | None:
        """The running self-test of *profile*, or a new one if it is due, else ``None``."""
        if profile.self_test is None or profile.self_test.done():
            health = profile.health
            due = health.failure is not None and self._clock.now().boot >= health.backoff.until
            if not due or not self.clock_is_right(profile):
                return None
            profile.self_test = asyncio.create_task(self._test(profile))
        return profile.self_test

    async def _test(self, profile: Profile) -> None:
        if profile.health.proven:
            profile.health.back_off(self._clock.now().boot)
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(profile.executor, sign_self_test, profile.app)
        self._measures.signatures.labels(profile.name).inc(result.signatures)
        profile.not_after = result.not_after or profile.not_after
        profile.health.tested(result, self._clock.now().boot)


def profile_settings(table: Mapping[str, Any], load: Callable[..., Settings]) -> Settings:
    """
    The settings of a profile of the policy: those of the host, by *load*, overridden by its
    *table*. ConfigurationError if a setting is wrong, or is not a profile's.
    """
    for each in ("scope", "consumer_org", "resource"):
        if each in table:
            raise ConfigurationError(
                f"{each} is not a profile's: a caller names it, and its entry allows it"
            )
    settings = load(**table)
    if settings.signer.url:
        raise ConfigurationError("HSMTOLL_SIGNER__URL is for callers: this is the host")
    if settings.identity == "norwegian" and settings.iss is None:
        raise ConfigurationError("iss is required with identity = norwegian")
    if "isolation" not in settings.hsm.model_fields_set:
        hsm = settings.hsm.model_copy(update={"isolation": "process"})
        settings = settings.model_copy(update={"hsm": hsm})
    return settings


async def _wait(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
