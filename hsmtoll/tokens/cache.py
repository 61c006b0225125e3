"""
Token cache: memory → single flight → store lock → second look-up → renewal → write to the store.

However many callers ask at once, in threads, tasks, processes or machines, one signature is spent.
How a token is obtained is in renewal, how it is stored in stores and records.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from typing import TYPE_CHECKING, Final, Protocol

from hsmtoll import errors
from hsmtoll.backoff import Backoff, jitter
from hsmtoll.errors import HsmTollError, UsageError
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.token import NO_REQUIREMENTS, AccessToken, Freshness
from hsmtoll.tokens import records
from hsmtoll.tokens.single_flight import (
    THREAD,
    PendingRenewal,
    deadline_exceeded_error,
    expired_on_arrival_error,
    min_life_unattainable_error,
)
from hsmtoll.tokens.stores import name_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from hsmtoll.clock import Clock
    from hsmtoll.remembered import PersistedText
    from hsmtoll.token import TokenRequest, TokenRequirements
    from hsmtoll.tokens.stores import Store

__all__ = ["Cache", "Renewer"]

_log = logging.getLogger("hsmtoll.tokens.cache")

#: Seconds of negative caching: a new attempt would spend a signature and be refused again.
REFUSED_FOR: Final = 30.0

#: Seconds. Upper limit for a server's Retry-After, as far as it is cached for other processes.
_LONGEST_WAIT: Final = 300.0

#: Seconds. First and longest back-off after a failed renewal.
_MIN_BACKOFF: Final = 1.0
_MAX_BACKOFF: Final = 60.0

#: Seconds. The longest for a device: its circuit breaker makes repeated calls cheap.
_MAX_DEVICE_BACKOFF: Final = 10.0

#: Seconds between two look-ups in the store while another process renews.
_POLL_INTERVAL: Final = 0.25


class Renewer(Protocol):
    """Obtains a new token when neither memory nor the store has one."""

    def known_identity(self) -> str | None:
        """Identity of the signer of the next token, if it is known without I/O."""

    def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
        """
        Obtain a new token. Sets ``pending.phase``, and ``pending.identity`` as soon as the signer
        is known. May take long; only one thread at a time calls it for a request.
        """


class Cache:
    """
    Tokens by request; one renewal serves all callers that wait for it.

    *deadline*: longest wait for a renewal, in seconds. If another process holds the store's lock
    for more than half of it, one other process may renew as well. With *background*, callers get a
    stale token while a thread renews it; without, they wait, and get it if the renewal fails.

    *selector*: hash of all settings that select key, identity and endpoints. The store's key is
    made of it, the signer's identity and the request. *remembered*: the signer's identity as last
    seen on this machine; the store is not read while it is unknown.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        selector: str,
        remembered: PersistedText,
        deadline: float,
        background: bool = True,
    ) -> None:
        self._store = store
        self._clock = clock
        self._selector = selector
        self._remembered = remembered
        self._deadline = deadline
        self._background = background
        self._tokens: dict[TokenRequest, AccessToken] = {}
        # Seconds left on the last new token, if less than required: the next will not have more.
        self._max_remaining: dict[TokenRequest, float] = {}
        #: Number of tokens returned, by source: memory (fresh or stale), store, renewal.
        self.hits = {"fresh": 0, "stale": 0, "stored": 0, "fetched": 0}
        self._start_afresh()
        after_fork(self._start_afresh)

    def _start_afresh(self) -> None:
        # After a fork the threads of the renewals in progress are the parent's.
        self._guard = threading.Lock()
        self._pending: dict[TokenRequest, PendingRenewal] = {}
        # The back-off after failed renewals, and the last error.
        self._backoffs: dict[TokenRequest, tuple[Backoff, Exception]] = {}

    def fresh_in_memory(self, request: TokenRequest) -> AccessToken | None:
        """The token in memory if it is fresh: no lock, no I/O."""
        token = self._tokens.get(request)
        if token is None or token.remaining(self._clock.now()) <= token.margin:
            return None
        self.hits["fresh"] += 1
        return token

    def unexpired_in_memory(
        self, request: TokenRequest, requirements: TokenRequirements = NO_REQUIREMENTS
    ) -> AccessToken | None:
        """The token in memory, if it is unexpired and meets *requirements*."""
        token = self._tokens.get(request)
        return (
            token
            if token is not None and requirements.satisfied_by(token, self._clock.now())
            else None
        )

    def waiting(self) -> int:
        """Number of callers that wait for a renewal now."""
        return sum(pending.waiting for pending in list(self._pending.values()))

    def left(self) -> float | None:
        """Seconds until the last token expires, 0 after that; ``None`` if there was no token."""
        now = self._clock.now()
        return max((max(0.0, t.remaining(now)) for t in list(self._tokens.values())), default=None)

    def get(
        self,
        request: TokenRequest,
        renewer: Callable[[], Renewer],
        requirements: TokenRequirements = NO_REQUIREMENTS,
    ) -> AccessToken:
        """
        An unexpired token: from memory, from the store, or from one renewal for all callers.
        *renewer* is called when neither memory nor store has one.

        Raises what the renewal raised, unless an older token still meets *requirements*. An error
        with scope ``caller`` is raised only for the caller that started the renewal. UsageError if
        no token can meet *requirements*.
        """
        token = self.fresh_in_memory(request) if requirements is NO_REQUIREMENTS else None
        while token is None:
            pending, token, led = self._join(request, renewer, requirements)
            if pending is not None:
                try:
                    pending.done.wait(self._seconds_left(pending))
                finally:
                    self._leave(pending)
                token = self._result_for_waiter(request, pending, requirements, led=led)
        return token

    async def aget(
        self,
        request: TokenRequest,
        renewer: Callable[[], Renewer],
        requirements: TokenRequirements = NO_REQUIREMENTS,
    ) -> AccessToken:
        """As get, for tasks: waiting blocks no thread, and cancelling one task affects no other."""
        from hsmtoll import event_loop  # noqa: PLC0415 - threads do not need asyncio

        token = self.fresh_in_memory(request) if requirements is NO_REQUIREMENTS else None
        while token is None:
            pending, token, led = self._join(request, renewer, requirements)
            if pending is not None:
                try:
                    await event_loop.shielded(self._future(pending, event_loop.running_loop()))
                finally:
                    self._leave(pending)
                token = self._result_for_waiter(request, pending, requirements, led=led)
        return token

    def _join(
        self, request: TokenRequest, renewer: Callable[[], Renewer], requirements: TokenRequirements
    ) -> tuple[PendingRenewal | None, AccessToken | None, bool]:
        """A token at once, or the renewal to wait for and whether this caller started it."""
        notice_fork()
        with self._guard:
            now = self._clock.now()
            token = self.unexpired_in_memory(request, requirements)
            if token is not None and token.freshness(now) is Freshness.FRESH:
                self.hits["fresh"] += 1
                return None, token, False
            if token is None and self.unexpired_in_memory(request) is not None:
                most = self._max_remaining.get(request, requirements.min_life)
                if most < requirements.min_life:
                    raise min_life_unattainable_error(requirements, most)
            pending = self._pending.get(request)
            led = pending is None
            if pending is None:
                pending = self._start(request, renewer, requirements, token)
            if pending is None or (token is not None and self._background):
                self.hits["stale"] += 1
                return None, token, False
            pending.waiting += 1
            return pending, None, led

    def _start(
        self,
        request: TokenRequest,
        renewer: Callable[[], Renewer],
        requirements: TokenRequirements,
        token: AccessToken | None,
    ) -> PendingRenewal | None:
        """
        Start a renewal in a thread. During the back-off after a failure, or if no thread can be
        started: ``None`` if there is a *token* to use instead, else raises the error.
        """
        now = self._clock.now()
        backoff, error = self._backoffs.get(request, (None, None))
        if backoff is not None and error is not None and now.boot < backoff.until:
            if token is None:
                raise records.copy_exception(error)
            return None
        pending = PendingRenewal(now.boot, requirements)
        # A daemon thread, so that a hanging device does not prevent the process from exiting. In
        # the caller's context, so that tracing shows the renewal below the caller's span.
        thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._run_renewal, request, renewer, pending),
            name=THREAD,
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:
            # The thread limit is reached, or the interpreter is shutting down.
            if token is None:
                raise
            return None
        self._pending[request] = pending
        return pending

    def _leave(self, pending: PendingRenewal) -> None:
        with self._guard:
            pending.waiting -= 1

    def _result_for_waiter(
        self,
        request: TokenRequest,
        pending: PendingRenewal,
        requirements: TokenRequirements,
        *,
        led: bool,
    ) -> AccessToken | None:
        """The result for a waiting caller; ``None`` if the token does not meet its requirements."""
        outcome = pending.outcome
        if isinstance(outcome, AccessToken):
            now = self._clock.now()
            if requirements.satisfied_by(outcome, now):
                return outcome
            # The renewal was started with these requirements.
            served = led or pending.requirements == requirements
            if served and outcome.remaining(now) < requirements.min_life:
                raise min_life_unattainable_error(requirements, outcome.remaining(now))
            # The newest token, even if it has the value of the rejected one.
            return outcome if served else None
        if isinstance(outcome, HsmTollError) and outcome.scope == "caller":
            if led:
                raise records.copy_exception(outcome)
            # The other callers start a renewal of their own.
            return None
        token = self.unexpired_in_memory(request, requirements)
        if token is not None:
            self.hits["stale"] += 1
            return token
        if outcome is None:
            raise deadline_exceeded_error(pending, self._deadline)
        raise records.copy_exception(outcome)

    def _run_renewal(
        self, request: TokenRequest, renewer: Callable[[], Renewer], pending: PendingRenewal
    ) -> None:
        outcome: AccessToken | BaseException
        try:
            outcome = self._renewed(request, renewer, pending)
            if outcome.remaining(self._clock.now()) <= 0:
                outcome = expired_on_arrival_error(outcome)
        except BaseException as exc:  # noqa: BLE001 - waiting callers need every exception
            outcome = exc
        with self._guard:
            self._pending.pop(request, None)
            if isinstance(outcome, AccessToken):
                self._tokens[request] = outcome
                self._backoffs.pop(request, None)
            elif isinstance(outcome, Exception):
                self._back_off(request, outcome)
            pending.outcome = outcome
            futures = dict(pending.futures)
        pending.done.set()
        for loop, future in futures.items():
            # A closed event loop has no waiting tasks.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_complete, future)
        # Waiting callers without a token get the exception; log only when a valid token masks it.
        if (
            isinstance(outcome, HsmTollError)
            and self.unexpired_in_memory(request, pending.requirements) is not None
        ):
            _log.warning("renewal failed, the cached token is still valid: %s", outcome)

    def key(self, request: TokenRequest, identity: str) -> str:
        """The store's key for a token that *identity* (`SignedGrant.identity`) signed for."""
        consumer, details = f"for {request.consumer_org}", request.authorization_details
        return name_of(
            self._selector,
            identity,
            request.scope,
            *request.resource,
            consumer,
            f"details {details}",
        )

    def _known_key(self, request: TokenRequest, renewer: Callable[[], Renewer]) -> str | None:
        """The store's key, or ``None`` while the signer is unknown; the device is not used."""
        identity = self._remembered.read() or renewer().known_identity()
        return None if identity is None else self.key(request, identity)

    def _renewed(
        self, request: TokenRequest, renewer: Callable[[], Renewer], pending: PendingRenewal
    ) -> AccessToken:
        """A token from the store, or a new one, obtained while holding the store's lock."""
        began = self._clock.now().boot
        while True:
            key = self._known_key(request, renewer)
            token = self._stored(key, request, pending.requirements)
            if token is not None:
                return token
            waited = self._clock.now().boot - began
            if waited >= self._deadline:
                raise deadline_exceeded_error(pending, self._deadline)
            name = key or self.key(request, "not known yet")
            # If the lock's holder is too slow, one of the waiting processes renews too: the one
            # that gets a second lock.
            slow = waited >= self._deadline / 2
            if slow:
                name = name_of("instead", name)
            with self._store.lock(name, timeout=_POLL_INTERVAL) as free:
                # The signer may have become known while another process held the lock.
                if not free or self._known_key(request, renewer) != key:
                    continue
                if slow:
                    _log.warning("cache: another process is too slow; renewing as well")
                token = self._stored(key, request, pending.requirements)
                if token is None:
                    token = self._fetched(request, renewer(), pending)
                    left, life = token.remaining(self._clock.now()), pending.requirements.min_life
                    # A slow renewal with other requirements predicts nothing about the next one.
                    self._max_remaining[request] = left if 0 < left < life else float("inf")
                return token

    def _fetched(
        self, request: TokenRequest, renewer: Renewer, pending: PendingRenewal
    ) -> AccessToken:
        """A new token. The token, or a refusal, is written to the store for other processes."""
        try:
            token = renewer.renew(request, pending)
        except HsmTollError as exc:
            seconds = _negative_cache_ttl(exc)
            if seconds > 0:
                until = self._clock.now().wall + seconds
                self._write_to_store(request, pending, refusal=records.Refusal(exc, until))
            raise
        self.hits["fetched"] += 1
        try:
            self._write_to_store(request, pending, token=token)
        except errors.ConfigurationError as exc:
            # The store failed after the signature was spent: the caller still gets the token.
            _log.warning("%s; the token is only in memory", exc)
        return token

    def _write_to_store(
        self,
        request: TokenRequest,
        pending: PendingRenewal,
        *,
        token: AccessToken | None = None,
        refusal: records.Refusal | None = None,
    ) -> None:
        identity = pending.identity
        if identity is None:
            return
        key, now = self.key(request, identity), self._clock.now()
        if refusal is not None:
            # Keep a valid token that another process has stored.
            token = records.read(key, self._store.get(key), now=now, longest=_LONGEST_WAIT).token
        value, ttl = records.written(key, token, refusal, now=now)
        self._store.put(key, value, ttl=ttl)
        # After the token: a process that reads the identity then finds the token as well.
        self._remembered.write(identity)

    def _stored(
        self, key: str | None, request: TokenRequest, requirements: TokenRequirements
    ) -> AccessToken | None:
        """A stored token that meets *requirements*; raises a stored refusal that is still valid."""
        if key is None:
            return None
        now = self._clock.now()
        kept = records.read(key, self._store.get(key), now=now, longest=_LONGEST_WAIT)
        token = kept.token
        if token is not None and token.remaining(now) > 0:
            if token.freshness(now) is Freshness.FRESH and requirements.satisfied_by(token, now):
                self.hits["stored"] += 1
                return token
            if token.lifetime <= requirements.min_life:
                raise min_life_unattainable_error(requirements, token.lifetime)
            # Not good enough to skip the renewal, but it can be returned if that fails.
            known = self._tokens.get(request)
            if known is None or known.remaining(now) < token.remaining(now):
                self._tokens[request] = token
        if kept.refusal is not None:
            raise kept.refusal.error
        return None

    def _back_off(self, request: TokenRequest, exc: Exception) -> None:
        if isinstance(exc, UsageError) or (isinstance(exc, HsmTollError) and exc.scope == "caller"):
            return
        backoff, _ = self._backoffs.get(request) or (Backoff(_MIN_BACKOFF, _MAX_BACKOFF), None)
        of_device = isinstance(exc, errors.DeviceError)
        backoff.longest = _MAX_DEVICE_BACKOFF if of_device else _MAX_BACKOFF
        at_least = 0.0
        if isinstance(exc, HsmTollError):
            at_least = min(exc.retry_after or _negative_cache_ttl(exc), _LONGEST_WAIT)
        backoff.failed(self._clock.now().boot, factor=jitter(0.8, 1.2), at_least=at_least)
        self._backoffs[request] = backoff, exc

    def _seconds_left(self, pending: PendingRenewal) -> float:
        # All waiting callers share the deadline of the first one.
        return max(0.05, pending.started + self._deadline - self._clock.now().boot)

    def _future(
        self, pending: PendingRenewal, loop: asyncio.AbstractEventLoop
    ) -> asyncio.Future[None]:
        """
        The future for all tasks of *loop*: done when the renewal ends or exceeds its deadline.
        """
        with self._guard:
            future = pending.futures.get(loop)
            if future is None:
                future = pending.futures[loop] = loop.create_future()
                seconds = self._seconds_left(pending) if pending.outcome is None else 0
                loop.call_later(seconds, _complete, future)
        return future


def _complete(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _negative_cache_ttl(exc: HsmTollError) -> float:
    """Seconds for which a refusal is cached: a new attempt would only spend a signature."""
    if exc.scope == "caller":
        return 0.0
    if isinstance(exc, errors.TryAgainLater) and exc.scope == "service":
        return min(exc.retry_after or REFUSED_FOR, _LONGEST_WAIT)
    final = errors.GrantRefused | errors.ExchangeRefused | errors.ClockError
    return REFUSED_FOR if isinstance(exc, final) and not exc.retryable else 0.0
