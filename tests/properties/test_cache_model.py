"""
A model of the cache: programs that come and die, clocks that jump, servers that refuse.

Two programs share a directory, each with a memory of its own. After every step: no expired
token was given, no two flights of one program are in the air, and nobody is left waiting.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hsmtoll.errors import GrantRefused, HsmTollError, NetworkError, UsageError
from hsmtoll.remembered import PersistedText
from hsmtoll.testing.clock import SettableClock
from hsmtoll.token import NO_REQUIREMENTS, AccessToken, TokenRequest, TokenRequirements
from hsmtoll.tokens.cache import Cache
from hsmtoll.tokens.single_flight import PendingRenewal
from hsmtoll.tokens.stores import FileStore

REQUEST = TokenRequest("toll:eu/movement/road/v2")
WHO = "a" * 64


class Issuer:
    """Issues numbered tokens and remembers, by true time, when each of them dies."""

    def __init__(self, clock: SettableClock) -> None:
        self._clock = clock
        self.true = 0.0
        self.dies: dict[str, float] = {}
        self.fails: list[HsmTollError | None] = []
        self.lifetime = 120
        self.flying = 0
        self.most = 0

    def known_identity(self) -> str:
        return WHO

    def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
        del request
        pending.phase, pending.identity = "signing", WHO
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            asked = self._clock.now()
            error = self.fails.pop() if self.fails else None
            if error is not None:
                raise error
            value = f"token-{len(self.dies)}"
            self.dies[value] = self.true + self.lifetime
            return AccessToken(value, REQUEST.scope, asked, self.lifetime)
        finally:
            self.flying -= 1


class Programs(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        random.seed(0)
        self.directory = Path(tempfile.mkdtemp())
        self.clock = SettableClock(1_800_000_000.0)
        self.issuer = Issuer(self.clock)
        self.lifetimes = {self.issuer.lifetime}
        self.caches = [self._cache(), self._cache()]
        self.set_back = 0.0

    def _cache(self, *, background: bool = True) -> Cache:
        store = FileStore(self.directory / "cache")
        return Cache(
            store,
            self.clock,
            selector="settings",
            remembered=PersistedText(),
            deadline=10,
            background=background,
        )

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory, ignore_errors=True)

    def _get(self, cache: Cache, requirements: TokenRequirements) -> None:
        try:
            token = cache.get(REQUEST, lambda: self.issuer, requirements)
        except UsageError:
            # Told by what new tokens live, or by what the one that lives now was given: no
            # signature is spent to find out whether the issuer has changed its mind.
            assert requirements.min_life > min(self.lifetimes)
        except HsmTollError:
            # Nothing could be renewed: then nothing that lives was held back either.
            held = cache.unexpired_in_memory(REQUEST, requirements)
            assert held is None
        else:
            assert self.issuer.true < self.issuer.dies[token.value], "expired, and given"
            assert requirements.satisfied_by(token, self.clock.now())
        self._land()

    def _land(self) -> None:
        for cache in self.caches:
            for pending in list(cache._pending.values()):
                assert pending.done.wait(10), "a flight that never lands"

    @rule(who=st.integers(0, 1))
    def ask(self, who: int) -> None:
        self._get(self.caches[who], NO_REQUIREMENTS)

    @rule(who=st.integers(0, 1), min_life=st.sampled_from([1.0, 30.0, 70.0, 110.0, 1000.0]))
    def ask_for_more(self, who: int, min_life: float) -> None:
        self._get(self.caches[who], TokenRequirements(min_life=min_life))

    @rule(who=st.integers(0, 1))
    def renew(self, who: int) -> None:
        self._get(self.caches[who], TokenRequirements(since=self.clock.now()))

    @rule(who=st.integers(0, 1))
    def refuse_at_the_api(self, who: int) -> None:
        held = self.caches[who].unexpired_in_memory(REQUEST)
        self._get(self.caches[who], TokenRequirements(avoid=held.value if held else None))

    @rule(seconds=st.sampled_from([0.5, 5.0, 31.0, 59.0, 61.0, 119.0, 121.0, 4000.0]))
    def pass_time(self, seconds: float) -> None:
        """Awake or asleep."""
        self.clock.advance(seconds)
        self.issuer.true += seconds

    @precondition(lambda self: self.set_back == 0)
    @rule(seconds=st.sampled_from([-3600.0, -30.0, 30.0, 3600.0]))
    def set_the_clock(self, seconds: float) -> None:
        self.set_back = seconds
        self.clock.set_wall(self.clock.now().wall + seconds)

    @precondition(lambda self: self.set_back == 0)
    @rule(off=st.sampled_from([0.0, 20.0, 400.0]))
    def reboot(self, off: float) -> None:
        """The machine starts again; programs lose their memory, files stay."""
        self.issuer.true += off
        self.clock.advance(off)
        self.clock.reboot()
        self.caches = [self._cache(), self._cache()]

    @rule(who=st.integers(0, 1), background=st.booleans())
    def die(self, who: int, background: bool) -> None:
        self.caches[who] = self._cache(background=background)

    @rule(
        error=st.sampled_from(["refused", "network"]),
        times=st.integers(1, 2),
    )
    def break_the_issuer(self, error: str, times: int) -> None:
        for _ in range(times):
            self.issuer.fails.append(
                GrantRefused("no") if error == "refused" else NetworkError("down", retryable=True)
            )

    @rule()
    def heal_the_issuer(self) -> None:
        self.issuer.fails.clear()

    @rule(lifetime=st.sampled_from([1, 20, 120, 600]))
    def change_lifetimes(self, lifetime: int) -> None:
        self.issuer.lifetime = lifetime
        self.lifetimes.add(lifetime)

    @rule(cut=st.integers(0, 400))
    def tear_a_file(self, cut: int) -> None:
        key = self.caches[0].key(REQUEST, WHO)
        path = self.directory / "cache" / f"{key}.json"
        with contextlib.suppress(FileNotFoundError):
            path.write_bytes(path.read_bytes()[:cut])

    @invariant()
    def nobody_waits(self) -> None:
        for cache in getattr(self, "caches", ()):
            assert cache.waiting() == 0

    @invariant()
    def one_flight_at_a_time(self) -> None:
        if hasattr(self, "issuer"):
            assert self.issuer.most <= 1


TestPrograms: Any = Programs.TestCase
TestPrograms.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)


def test_the_model_would_see_an_expired_token() -> None:
    """The control: a cache that believes the wall clock alone is caught."""

    class Believer(SettableClock):
        pass

    clock = Believer(1_800_000_000.0)
    issuer = Issuer(clock)
    token = issuer.renew(REQUEST, PendingRenewal(0.0, NO_REQUIREMENTS))
    clock.advance(200)
    issuer.true += 200
    clock.set_wall(1_800_000_000.0 + 10)
    by_the_wall_alone = token.lifetime - (clock.now().wall - token.asked.wall)
    assert by_the_wall_alone > 0
    assert issuer.true > issuer.dies[token.value]
    assert token.remaining(clock.now()) < 0
