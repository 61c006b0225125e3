"""
One algorithm for every store: memory → flight → store lock → re-check → fetch → put.

However many ask at once, in threads, tasks, processes or machines, one signature is spent.
What a token costs and how it is fetched never enters; what lies in a store and how, neither.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import errors
from hsmtoll.errors import HsmTollError, TryAgainLater, UsageError
from hsmtoll.stores import name_of
from hsmtoll.tokens import AccessToken, Freshness, Moment

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.clock import Clock
    from hsmtoll.stores import Store

__all__ = ["Budget", "Cache", "Flight"]

_log = logging.getLogger("hsmtoll.cache")

#: The form of a stored value. A reader that does not know it treats it as a miss.
_VERSION: Final = 1

#: Seconds that a refusal is remembered: asking again sooner would only spend signatures.
REFUSED_FOR: Final = 30.0

#: Seconds. The longest rest between two renewals that failed.
_LONGEST_REST: Final = 60.0


@dataclass(slots=True, eq=False)
class Flight:
    """One renewal under way and everybody who waits for it."""

    started: float
    avoid: str | None = None
    doing: str = "waiting for another process"
    waiting: int = 0
    landed: Future[AccessToken] = field(default_factory=Future)
    loops: dict[asyncio.AbstractEventLoop, asyncio.Future[AccessToken]] = field(
        default_factory=dict
    )


@dataclass(slots=True)
class _Rest:
    until: float
    failures: int
    error: HsmTollError


class Cache:
    """
    Tokens by key, renewed once for everybody.

    *patience* is the longest wait in seconds: for a flight, and for the lock of another
    process, after which the renewal carries on alone. With *background*, a stale token is
    handed out while one renews; without, the caller waits and falls back to it.
    """

    def __init__(
        self, store: Store, clock: Clock, *, patience: float, background: bool = True
    ) -> None:
        self._store = store
        self._clock = clock
        self._patience = patience
        self._background = background
        self._tokens: dict[str, AccessToken] = {}
        self._start_afresh()

    def _start_afresh(self) -> None:
        # A lock that another thread held and a flight whose thread is gone do not survive fork.
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._rests: dict[str, _Rest] = {}

    def held(self, key: str, *, min_life: float = 0.0) -> AccessToken | None:
        """The token in memory if it is fresh and lives *min_life* seconds: no lock, no I/O."""
        token = self._tokens.get(key)
        if token is None:
            return None
        now = self._clock.now()
        if token.freshness(now) is not Freshness.FRESH or token.remaining(now) < min_life:
            return None
        return token

    def living(self, key: str) -> AccessToken | None:
        """The token in memory if it lives at all."""
        token = self._tokens.get(key)
        if token is None or token.freshness(self._clock.now()) is Freshness.EXPIRED:
            return None
        return token

    def waiting(self) -> int:
        """How many callers wait for a renewal at this moment."""
        with self._guard:
            return sum(flight.waiting for flight in self._flights.values())

    def get(
        self,
        key: str,
        fetch: Callable[[Flight], AccessToken],
        *,
        min_life: float = 0.0,
        avoid: str | None = None,
    ) -> AccessToken:
        """
        A token that is not expired: held, stored, or fetched by one caller for all.

        *avoid* is a token's value that must not be given again: the caller knows better than
        the clocks (a 401, a forced renewal). Raises what *fetch* raised, unless a token that
        still lives can be given instead.
        """
        flight, fallback = self._join(key, fetch, min_life, avoid)
        if flight is None:
            return self._enough(fallback, min_life)
        flight.waiting += 1
        try:
            return self._enough(flight.landed.result(self._patience_left(flight)), min_life)
        except FutureTimeout:
            return self._instead(fallback, _late(flight, self._patience))
        except HsmTollError as exc:
            return self._instead(fallback, exc)
        finally:
            flight.waiting -= 1

    async def aget(
        self,
        key: str,
        fetch: Callable[[Flight], AccessToken],
        *,
        min_life: float = 0.0,
        avoid: str | None = None,
    ) -> AccessToken:
        """As get; a task that waits holds no thread, and cancelling it cancels nobody else."""
        flight, fallback = self._join(key, fetch, min_life, avoid)
        if flight is None:
            return self._enough(fallback, min_life)
        flight.waiting += 1
        try:
            async with asyncio.timeout(self._patience_left(flight)):
                token = await asyncio.shield(self._in_loop(flight))
            return self._enough(token, min_life)
        except TimeoutError:
            return self._instead(fallback, _late(flight, self._patience))
        except HsmTollError as exc:
            return self._instead(fallback, exc)
        finally:
            flight.waiting -= 1

    def _join(
        self, key: str, fetch: Callable[[Flight], AccessToken], min_life: float, avoid: str | None
    ) -> tuple[Flight | None, AccessToken | None]:
        """The flight to wait for, and the living token that could be given instead of it."""
        if self._pid != os.getpid():
            self._start_afresh()
        with self._guard:
            now = self._clock.now()
            token = self._tokens.get(key)
            if token is not None and (token.value == avoid or token.remaining(now) <= 0):
                token = None
            good = token is not None and token.remaining(now) >= min_life
            if token is not None and good and token.freshness(now) is Freshness.FRESH:
                return None, token
            rest = self._rests.get(key)
            resting = rest is not None and now.boot < rest.until
            flight = self._flights.get(key)
            if flight is None:
                if resting and token is not None and good:
                    return None, token
                if resting and rest is not None:
                    raise _again(rest.error)
                flight = self._take_off(key, fetch, min_life, avoid, now)
            if token is not None and good and self._background:
                return None, token
            return flight, token

    def _take_off(
        self,
        key: str,
        fetch: Callable[[Flight], AccessToken],
        min_life: float,
        avoid: str | None,
        now: Moment,
    ) -> Flight:
        flight = Flight(now.boot, avoid)
        # Running from the start, so that no waiter can cancel it for the others.
        flight.landed.set_running_or_notify_cancel()
        self._flights[key] = flight
        # A thread of its own, and a daemon: a device that hangs must not keep the process.
        threading.Thread(
            target=self._fly, args=(key, fetch, flight, min_life), name="hsmtoll-renew", daemon=True
        ).start()
        return flight

    def _fly(
        self, key: str, fetch: Callable[[Flight], AccessToken], flight: Flight, min_life: float
    ) -> None:
        try:
            token = self._renewed(key, fetch, flight, min_life)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            with self._guard:
                del self._flights[key]
                if isinstance(exc, HsmTollError):
                    self._rest(key, exc)
            flight.landed.set_exception(exc)
        else:
            with self._guard:
                del self._flights[key]
                self._rests.pop(key, None)
                self._tokens[key] = token
            flight.landed.set_result(token)

    def _renewed(
        self, key: str, fetch: Callable[[Flight], AccessToken], flight: Flight, min_life: float
    ) -> AccessToken:
        def stored() -> AccessToken | None:
            token = self._stored(key)
            if token is None or token.value == flight.avoid:
                return None
            now = self._clock.now()
            fresh = token.freshness(now) is Freshness.FRESH and token.remaining(now) >= min_life
            if not fresh and token.freshness(now) is not Freshness.EXPIRED:
                # Not good enough to end the flight, good enough to fall back to.
                self._tokens.setdefault(key, token)
            return token if fresh else None

        token = stored()
        if token is not None:
            return token
        with self._store.lock(key, patience=self._patience) as held:
            if not held:
                _log.warning("the lock of the cache was not had in time; renewing alone")
            token = stored()
            if token is not None:
                return token
            try:
                token = fetch(flight)
            except HsmTollError as exc:
                if _is_final(exc):
                    self._store.put(key, _refusal(key, exc, self._clock.now()), ttl=REFUSED_FOR)
                raise
            self._store.put(key, _encoded(key, token), ttl=token.lifetime)
            return token

    def _stored(self, key: str) -> AccessToken | None:
        raw = self._store.get(key)
        value = _decoded(key, raw) if raw is not None else None
        if value is None:
            return None
        if "refused" in value:
            left = value["until"] - self._clock.now().wall
            if 0 < left <= REFUSED_FOR:
                raise _again(_remembered(value["refused"]))
            return None
        return AccessToken(
            value["access_token"],
            value["scope"],
            Moment(value["wall"], value["boot"], value["boot_id"]),
            value["lifetime"],
        )

    def _rest(self, key: str, exc: HsmTollError) -> None:
        before = self._rests.get(key)
        failures = before.failures + 1 if before else 1
        seconds = min(_LONGEST_REST, 2.0 ** (failures - 1)) * random.uniform(0.8, 1.2)  # noqa: S311
        seconds = REFUSED_FOR if _is_final(exc) else max(seconds, exc.retry_after or 0.0)
        self._rests[key] = _Rest(self._clock.now().boot + seconds, failures, exc)

    def _patience_left(self, flight: Flight) -> float:
        # Who joins late waits no longer than who came first: a flight that hangs is told at once.
        return max(0.05, flight.started + self._patience - self._clock.now().boot)

    def _in_loop(self, flight: Flight) -> asyncio.Future[AccessToken]:
        # One wake-up a loop, however many tasks wait in it.
        loop = asyncio.get_running_loop()
        if loop not in flight.loops:
            future = asyncio.wrap_future(flight.landed, loop=loop)
            # Looked at here, so that nobody is told of an error that no task was left to see.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            flight.loops[loop] = future
        return flight.loops[loop]

    def _instead(self, fallback: AccessToken | None, exc: HsmTollError) -> AccessToken:
        if fallback is None or fallback.freshness(self._clock.now()) is Freshness.EXPIRED:
            raise exc
        _log.warning("renewal failed, the token in hand still lives: %s", exc)
        return fallback

    def _enough(self, token: AccessToken | None, min_life: float) -> AccessToken:
        assert token is not None  # noqa: S101 - _join gives a flight or a token
        left = token.remaining(self._clock.now())
        if left < min_life:
            raise UsageError(
                f"a token that lives {min_life:.0f} s was asked for: new ones live "
                f"{token.lifetime} s, {max(left, 0):.0f} of them left",
                hint="ask for less; the lifetime is set by Maskinporten and Customs",
            )
        return token


def _late(flight: Flight, patience: float) -> HsmTollError:
    if flight.doing == "signing":
        return errors.DeviceError(
            f"signing: the device did not answer within {patience:.0f} s",
            hint="set HSMTOLL_HSM__ISOLATION=process, so that a module that hangs can be restarted",
            code="device-hangs",
        )
    return errors.NetworkError(
        f"a new token: not here after {patience:.0f} s ({flight.doing})",
        hint="HSMTOLL_DEADLINE sets how long to wait",
        code="deadline",
    )


def _is_final(exc: HsmTollError) -> bool:
    """Refused by somebody who will refuse it again: remembered, so that it costs no signatures."""
    return isinstance(exc, errors.GrantRefused | errors.ExchangeRefused) and not exc.retryable


_KEPT: Final = ("hint", "code", "who", "trace_id", "jti", "correlation_id", "retry_after")


def _again(exc: HsmTollError) -> HsmTollError:
    """The same error once more, for another caller: a traceback belongs to one raise."""
    twin = type(exc)(str(exc), **{name: getattr(exc, name) for name in _KEPT})
    twin.retryable = exc.retryable
    return twin


def _encoded(key: str, token: AccessToken) -> bytes:
    value = {
        "version": _VERSION,
        "key": key,
        "access_token": token.value,
        "scope": token.scope,
        "wall": token.asked.wall,
        "boot": token.asked.boot,
        "boot_id": token.asked.boot_id,
        "lifetime": token.lifetime,
    }
    return json.dumps(value).encode()


def _refusal(key: str, exc: HsmTollError, now: Moment) -> bytes:
    told = {"class": type(exc).__name__, "message": str(exc)}
    told |= {name: getattr(exc, name) for name in _KEPT}
    value = {
        "version": _VERSION,
        "key": key,
        "refused": told,
        "until": now.wall + REFUSED_FOR,
    }
    return json.dumps(value).encode()


def _decoded(key: str, raw: bytes) -> dict[str, Any] | None:
    """A value of ours, of this version, for this key; anything torn or foreign is a miss."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (value.get("version"), value.get("key")) != (_VERSION, key):
        return None
    number = (int, float)
    shapes: dict[str, type | tuple[type, ...]] = (
        {"refused": dict, "until": number}
        if "refused" in value
        else {
            "access_token": str,
            "scope": str,
            "wall": number,
            "boot": number,
            "boot_id": str,
            "lifetime": int,
        }
    )
    return value if all(isinstance(value.get(k), kind) for k, kind in shapes.items()) else None


def _remembered(told: dict[str, Any]) -> HsmTollError:
    kinds = {"ScopeNotGranted": errors.ScopeNotGranted, "ExchangeRefused": errors.ExchangeRefused}
    kind = kinds.get(str(told.get("class")), errors.GrantRefused)
    kept: dict[str, Any] = {name: told.get(name) for name in _KEPT}
    return kind(str(told.get("message")), **kept)


class Budget:
    """
    How many signatures a key may still spend: *per_hour*, counted in the store for all.

    A device may be metered, and an answer that never satisfies must not drain it.
    """

    def __init__(self, store: Store, clock: Clock, *, per_hour: int) -> None:
        self._store = store
        self._clock = clock
        self._per_hour = per_hour
        self._own: list[float] = []

    def spend(self, identity: str) -> None:
        """Count one signature of *identity*; TryAgainLater if the hour's are spent."""
        key = name_of("budget", identity)
        with self._store.lock(key, patience=2.0):
            now = self._clock.now().wall
            raw = self._store.get(key)
            spent = [at for at in _times(raw) if now - 3600 < at <= now]
            own = [at for at in self._own if now - 3600 < at <= now]
            # Without the store (it is down, its file was removed) this process still counts.
            spent = max(spent, own, key=len)
            if len(spent) >= self._per_hour:
                wait = min(spent) + 3600 - now
                raise TryAgainLater(
                    f"signing: {len(spent)} signatures were spent in the last hour, the budget",
                    hint=f"the next is free in {wait:.0f} s; HSMTOLL_BUDGET__PER_HOUR sets it, but "
                    "look first at what spends them",
                    code="budget",
                    retry_after=wait,
                )
            self._own = [*own, now]
            self._store.put(key, json.dumps([*spent, now]).encode(), ttl=3600)


def _times(raw: bytes | None) -> list[float]:
    try:
        times = json.loads(raw) if raw else []
    except ValueError:
        return []
    if not isinstance(times, list):
        return []
    return [at for at in times if isinstance(at, (int, float))]
