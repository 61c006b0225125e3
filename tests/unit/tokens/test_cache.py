"""What the cache promises to one process: one flight, nothing expired, nothing lost."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import (
    ClockError,
    ConfigurationError,
    DeviceError,
    GrantRefused,
    HsmTollError,
    NetworkError,
    TryAgainLater,
    UsageError,
)
from hsmtoll.remembered import PersistedText
from hsmtoll.token import (
    NO_REQUIREMENTS,
    AccessToken,
    ClockReading,
    TokenRequest,
    TokenRequirements,
)
from hsmtoll.tokens import records
from hsmtoll.tokens.cache import Cache
from hsmtoll.tokens.single_flight import THREAD, PendingRenewal
from hsmtoll.tokens.stores import FileStore, MemoryStore, Store, StoredValue, name_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REQUEST = TokenRequest("toll:eu/movement/road/v2")
#: The key of the store for *REQUEST* and the first name of a `Well`.
KEY = name_of("settings", "a" * 64, REQUEST.scope, "for None", "details ").encode()


@dataclass
class HandClock:
    """Both clocks, moved by hand; sleeping moves them."""

    wall: float = 1_800_000_000.0
    boot: float = 1000.0
    boot_id: str = "one"

    def now(self) -> ClockReading:
        return ClockReading(self.wall, self.boot, self.boot_id)

    def sleep(self, seconds: float) -> None:
        self.pass_(seconds)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds


@dataclass
class Well:
    """
    A renewer that counts: tokens numbered, or the error it was told to raise. *known*: whether it
    is known before the first one who signs.
    """

    clock: HandClock
    lifetime: int = 120
    name: str = "a" * 64
    fetched: int = 0
    error: BaseException | None = None
    hold: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    known: bool = True

    def __call__(self) -> Well:
        return self

    def known_identity(self) -> str | None:
        return self.name if self.known else None

    def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
        assert request == REQUEST
        pending.identity = self.name
        return self.fetch(pending)

    def fetch(self, pending: PendingRenewal) -> AccessToken:
        pending.phase = "signing"
        self.fetched += 1
        asked = self.clock.now()
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(30)
        if self.error is not None:
            raise self.error
        return AccessToken(f"token-{self.fetched}", REQUEST.scope, asked, self.lifetime)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def well(clock: HandClock) -> Well:
    return Well(clock)


def cache_of(
    clock: HandClock,
    store: Store | None = None,
    *,
    deadline: float = 20,
    background: bool = True,
    remembered: Path | None = None,
) -> Cache:
    return Cache(
        MemoryStore() if store is None else store,
        clock,
        selector="settings",
        remembered=PersistedText(remembered),
        deadline=deadline,
        background=background,
    )


class Counting(MemoryStore):
    """A store that notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.gets: list[str] = []

    def get(self, key: str) -> StoredValue | None:
        self.gets.append(key)
        return super().get(key)


def wait_until_renewed(cache: Cache) -> None:
    """Wait for the flight in the air, if there is one."""
    for pending in list(cache._pending.values()):
        assert pending.done.wait(10)


def flown() -> None:
    """Wait for the threads of all flights, to their last word."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(10)


def wait_for(come: Callable[[], bool]) -> None:
    """Until it has come; the room's own time limit ends a test that waits in vain."""
    while not come():
        time.sleep(0.002)


async def crowded(cache: Cache, callers: int) -> None:
    """Until so many wait."""
    while cache.waiting() < callers:  # noqa: ASYNC110 - a count of callers has no event
        await asyncio.sleep(0)


def test_as_long_as_nobody_knows_who_signs_nothing_is_looked_for_in_the_store(
    clock: HandClock, tmp_path: Path
) -> None:
    store, memory = Counting(), tmp_path / "identity"
    first = Well(clock, known=False)
    assert cache_of(clock, store, remembered=memory).get(REQUEST, first).value == "token-1"
    assert store.gets == []
    # What was learned is known to the next program of this machine …
    again = Well(clock, known=False)
    assert cache_of(clock, store, remembered=memory).get(REQUEST, again).value == "token-1"
    assert again.fetched == 0
    # … and to no other machine, which has another device by the same name.
    other = Well(clock, known=False, name="b" * 64)
    theirs = tmp_path / "theirs"
    cache_of(clock, store, remembered=theirs).get(REQUEST, other)
    assert other.fetched == 1
    cache_of(clock, store, remembered=theirs).get(REQUEST, other)
    assert other.fetched == 1


def test_a_new_identity_is_known_once_its_token_can_be_found(
    clock: HandClock, tmp_path: Path
) -> None:
    """A program that starts in between waits for the one that renews, and signs nothing."""
    store, memory = FileStore(tmp_path / "cache"), tmp_path / "identity"
    leader, hold = Well(clock, known=False), threading.Event()
    leader.hold = hold
    cache = cache_of(clock, store, remembered=memory)
    one = threading.Thread(target=cache.get, args=(REQUEST, leader))
    one.start()
    assert leader.entered.wait(10)
    assert not memory.exists()
    follower, got = Well(clock, known=False), list[str]()
    behind = cache_of(clock, store, remembered=memory)
    two = threading.Thread(target=lambda: got.append(behind.get(REQUEST, follower).value))
    two.start()
    wait_for(lambda: behind.waiting() == 1)
    hold.set()
    one.join(20)
    two.join(20)
    assert (got, follower.fetched) == (["token-1"], 0)


def test_a_certificate_that_takes_over_makes_a_new_identity(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    cache = cache_of(clock, store)
    cache.get(REQUEST, well)
    well.name = "b" * 64
    clock.pass_(130)
    cache.get(REQUEST, well)
    # Whoever knows only the old one finds nothing that lives, and whoever knows the new one does.
    for name, fetched in (("a" * 64, 1), ("b" * 64, 0)):
        other = Well(clock, name=name)
        cache_of(clock, store).get(REQUEST, other)
        assert other.fetched == fetched


def test_a_token_costs_the_store_two_reads_when_it_is_cold_and_one_when_it_is_warm(
    clock: HandClock, well: Well
) -> None:
    store = Counting()
    cache = cache_of(clock, store)
    key = cache.key(REQUEST, well.name)
    cache.get(REQUEST, well)
    # Before the lock and under it.
    assert store.gets == [key, key]
    store.gets.clear()
    cache_of(clock, store).get(REQUEST, well)
    assert (store.gets, well.fetched) == ([key], 1)


def test_an_error_about_the_caller_is_for_the_one_who_led_and_for_nobody_else(
    clock: HandClock, well: Well, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetch, hold, results = cache_of(clock), well.fetch, threading.Event(), list[str]()
    well.hold = hold

    def only_the_first_is_denied(pending: PendingRenewal) -> AccessToken:
        token = fetch(pending)
        if well.fetched == 1:
            raise TryAgainLater("not you", scope="caller")
        return token

    def ask() -> None:
        try:
            results.append(cache.get(REQUEST, well).value)
        except TryAgainLater as exc:
            results.append(str(exc))

    monkeypatch.setattr(well, "fetch", only_the_first_is_denied)
    crowd = [threading.Thread(target=ask) for _ in range(20)]
    for each in crowd:
        each.start()
    wait_for(lambda: cache.waiting() == 20)
    hold.set()
    for each in crowd:
        each.join(20)
    assert sorted(results) == ["not you", *["token-2"] * 19]
    # Nothing is remembered of it: the control is a failure of the device, which rests.
    clock.pass_(1)
    well.error = TryAgainLater("not you", scope="caller")
    before = well.fetched
    for _ in range(3):
        with pytest.raises(TryAgainLater):
            cache.get(REQUEST, well, TokenRequirements(since=clock.now()))
        clock.pass_(0.1)
    assert well.fetched == before + 3
    well.error = DeviceError("down")
    for _ in range(3):
        with pytest.raises(DeviceError):
            cache.get(REQUEST, well, TokenRequirements(since=clock.now()))
        clock.pass_(0.1)
    assert well.fetched == before + 4


def test_a_fresh_token_is_given_again_and_costs_nothing(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    first = cache.get(REQUEST, well)
    clock.pass_(59)
    assert cache.get(REQUEST, well) is first
    assert cache.fresh_in_memory(REQUEST) is first
    assert well.fetched == 1


def test_a_stale_token_is_given_while_one_renews(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    first = cache.get(REQUEST, well)
    clock.pass_(61)
    well.hold = threading.Event()
    assert [cache.get(REQUEST, well) for _ in range(50)] == [first] * 50
    well.hold.set()
    wait_until_renewed(cache)
    assert cache.get(REQUEST, well).value == "token-2"
    assert well.fetched == 2


def test_the_command_line_waits_for_the_renewal_of_a_stale_token(
    clock: HandClock, well: Well
) -> None:
    cache = cache_of(clock, background=False)
    cache.get(REQUEST, well)
    clock.pass_(61)
    assert cache.get(REQUEST, well).value == "token-2"


def test_and_falls_back_to_it_when_the_renewal_fails(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock, background=False)
    first = cache.get(REQUEST, well)
    clock.pass_(61)
    well.error = NetworkError("nobody there", retryable=True)
    assert cache.get(REQUEST, well) is first
    assert well.fetched == 2


def test_a_process_that_starts_with_a_stale_token_on_disk_falls_back_to_it(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    cache_of(clock, store).get(REQUEST, well)
    clock.pass_(61)
    well.error = NetworkError("nobody there")
    token = cache_of(clock, store, background=False).get(REQUEST, well)
    assert token.value == "token-1"


def test_an_expired_token_is_never_given_even_if_nothing_else_can_be_had(
    clock: HandClock, well: Well
) -> None:
    cache = cache_of(clock)
    cache.get(REQUEST, well)
    clock.pass_(120)
    well.error = NetworkError("nobody there")
    with pytest.raises(NetworkError, match="nobody there"):
        cache.get(REQUEST, well)
    assert cache.unexpired_in_memory(REQUEST) is None


def test_a_failed_renewal_backs_off_and_then_tries_again(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.error = NetworkError("nobody there")
    for _ in range(100):
        with pytest.raises(NetworkError):
            cache.get(REQUEST, well)
    assert well.fetched == 1
    clock.pass_(1.3)
    with pytest.raises(NetworkError):
        cache.get(REQUEST, well)
    assert well.fetched == 2
    clock.pass_(3)
    well.error = None
    assert cache.get(REQUEST, well).value == "token-3"


@pytest.mark.parametrize(("trouble", "tries"), [(DeviceError, 60), (NetworkError, 15)])
def test_a_device_that_was_down_for_long_is_asked_again_within_ten_seconds_or_so(
    clock: HandClock, well: Well, trouble: type[HsmTollError], tries: int
) -> None:
    cache = cache_of(clock)
    well.error = trouble("it is down")
    for _ in range(600):
        with pytest.raises(trouble):
            cache.get(REQUEST, well)
        clock.pass_(1)
    # Ten minutes. With the control, whose askers cost others something, once in one of them.
    assert 0.7 * tries < well.fetched < 1.3 * tries
    well.error = None
    if trouble is DeviceError:
        clock.pass_(12)
        assert cache.get(REQUEST, well).value == f"token-{well.fetched}"


def test_every_caller_gets_an_error_of_its_own(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.error = GrantRefused("no", code="MP-100", trace_id="t", hint="do this")
    seen: list[HsmTollError] = []
    for _ in range(3):
        with pytest.raises(GrantRefused) as caught:
            cache.get(REQUEST, well)
        seen.append(caught.value)
    assert len({id(each) for each in seen}) == 3
    assert {(str(e), e.code, e.trace_id, e.hint) for e in seen} == {
        ("no", "MP-100", "t", "do this")
    }


def test_a_refusal_is_remembered_for_30_s_by_every_process(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    well.error = GrantRefused("no", code="MP-100", who="you")
    for _ in range(50):
        with pytest.raises(GrantRefused, match="no") as caught:
            cache_of(clock, store, background=False).get(REQUEST, well)
        assert caught.value.code == "MP-100"
    assert well.fetched == 1
    clock.pass_(31)
    with pytest.raises(GrantRefused):
        cache_of(clock, store, background=False).get(REQUEST, well)
    assert well.fetched == 2


def test_a_refusal_takes_no_living_token_from_the_others(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    cache_of(clock, store).get(REQUEST, well)
    clock.pass_(61)
    well.error = GrantRefused("no")
    for _ in range(3):
        assert cache_of(clock, store, background=False).get(REQUEST, well).value == "token-1"
    assert well.fetched == 2


def test_trouble_that_passes_is_not_remembered_for_others(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    errors = (
        NetworkError("nobody there", retryable=True),
        # A signing host refuses each of its callers by himself, also for what will pass.
        ClockError("not synchronised yet", scope="caller"),
    )
    for fetched, well.error in enumerate(errors):
        for _ in range(2):
            with pytest.raises(type(well.error)):
                cache_of(clock, store).get(REQUEST, well)
        assert well.fetched == 2 * (fetched + 1)
    # The control: a clock that Maskinporten refuses.
    well.error = ClockError("iat is ahead")
    for _ in range(2):
        with pytest.raises(ClockError):
            cache_of(clock, store).get(REQUEST, well)
    assert well.fetched == 5


def test_a_server_that_asks_for_patience_gets_it_from_every_process(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    well.error = TryAgainLater("slow down", scope="service", retryable=True, retry_after=90)
    for _ in range(5):
        with pytest.raises(TryAgainLater):
            cache_of(clock, store).get(REQUEST, well)
        clock.pass_(15)
    assert well.fetched == 1
    clock.pass_(20)
    well.error = None
    assert cache_of(clock, store).get(REQUEST, well).value == "token-2"


def test_a_token_that_was_refused_is_not_given_again(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    first = cache.get(REQUEST, well)
    assert cache.get(REQUEST, well, TokenRequirements(avoid=first.value)).value == "token-2"
    assert cache.get(REQUEST, well, TokenRequirements(avoid=first.value)).value == "token-2"
    assert well.fetched == 2


def test_one_who_joins_a_flight_for_another_wish_gets_his_own(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.hold = threading.Event()
    got: dict[str, AccessToken] = {}
    first = threading.Thread(target=lambda: got.update(first=cache.get(REQUEST, well)))
    first.start()
    assert well.entered.wait(10)
    clock.pass_(1)
    # A token that was asked for before this moment will not do.
    requirements = TokenRequirements(since=clock.now())
    second = threading.Thread(
        target=lambda: got.update(second=cache.get(REQUEST, well, requirements))
    )
    second.start()
    wait_for(lambda: cache.waiting() == 2)
    well.hold.set()
    first.join(10)
    second.join(10)
    assert (got["first"].value, got["second"].value) == ("token-1", "token-2")


def test_renew_gives_a_new_token_also_to_a_process_that_holds_none(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    cache_of(clock, store).get(REQUEST, well)
    clock.pass_(1)
    requirements = TokenRequirements(since=clock.now())
    assert cache_of(clock, store).get(REQUEST, well, requirements).value == "token-2"
    # And one who waited for the lock while that one was fetched takes it.
    assert cache_of(clock, store).get(REQUEST, well, requirements).value == "token-2"
    assert well.fetched == 2


def test_a_life_that_no_token_has_is_refused_and_spends_one_signature_at_most(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    for _ in range(20):
        with pytest.raises(UsageError, match="new ones are valid for 120 s"):
            cache_of(clock, store).get(REQUEST, well, TokenRequirements(min_life=600))
    assert well.fetched == 1


def test_a_minimum_life_renews_a_token_that_has_less(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    cache.get(REQUEST, well)
    clock.pass_(30)
    assert cache.get(REQUEST, well, TokenRequirements(min_life=80)).value == "token-1"
    assert cache.get(REQUEST, well, TokenRequirements(min_life=100)).value == "token-2"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"version": 1, "key": "%s", "token": {"access_token": "old"}}' % KEY,
        b'{"version": 2, "key": "%s"}' % KEY,
        b'{"version": 2, "key": "%s", "ttl": 120, "token": [], "refusal": 7}' % KEY,
        b'{"version": 2, "key": "%s", "ttl": 120, "token": {"access_token": "x", "scope": "s",'
        b' "wall": NaN, "boot": 1, "boot_id": "one", "lifetime": 120, "left": 120}}' % KEY,
        b'{"version": 2, "key": "%s", "ttl": 9, "refusal": {"class": "GrantRefused",'
        b' "message": "no", "until": 1e999}}' % KEY,
        b'{"version": 2, "key": "%s", "ttl": 9, "refusal": {"class": "PinIncorrect",'
        b' "message": "no", "until": 1800000020}}' % KEY,
        b"[" * 100_000,
    ],
)
def test_what_is_torn_or_foreign_or_newer_is_a_miss(
    clock: HandClock, well: Well, tmp_path: Path, raw: bytes
) -> None:
    store = FileStore(tmp_path / "cache")
    cache = cache_of(clock, store)
    assert cache.key(REQUEST, well.name).encode() == KEY
    store.put(KEY.decode(), raw, ttl=100)
    assert cache.get(REQUEST, well).value == "token-1"


def test_a_value_of_another_key_is_a_miss(clock: HandClock, well: Well, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "cache")
    other = Well(clock, name="b" * 64)
    cache = cache_of(clock, store)
    cache.get(REQUEST, other)
    kept = store.get(cache.key(REQUEST, other.name))
    assert kept is not None
    store.put(cache.key(REQUEST, well.name), kept.value, ttl=100)
    cache_of(clock, store).get(REQUEST, well)
    assert well.fetched == 1
    # The control: under its own key it is read.
    cache_of(clock, store).get(REQUEST, other)
    assert other.fetched == 1


def test_another_machines_token_lives_as_long_as_the_store_says(clock: HandClock) -> None:
    token = AccessToken("t", "s", ClockReading(clock.wall + 200, 5.0, "other"), 120)
    then = ClockReading(clock.wall + 200, 5.0, "other")
    raw, ttl = records.written("k", token, None, now=then)
    assert ttl == 120

    def read(left: float | None, now: ClockReading) -> AccessToken | None:
        return records.read("k", StoredValue(raw, left), now=now, longest=300).token

    # Its clock is ahead of ours: by our wall clock alone it would prove nothing.
    ours = read(None, clock.now())
    assert ours is not None
    assert ours.remaining(clock.now()) <= 0
    theirs = read(100.0, clock.now())
    assert theirs is not None
    assert theirs.remaining(clock.now()) == pytest.approx(100)
    assert read(100.0, ClockReading(clock.wall - 200, 1, "one")) is None
    # A refusal that stands longer than the token lives prolongs it by nothing.
    refusal = records.Refusal(GrantRefused("no"), then.wall + 300)
    raw, ttl = records.written("k", token, refusal, now=then)
    assert ttl == 300
    both = read(ttl - 20, clock.now())
    assert both is not None
    assert both.remaining(clock.now()) == pytest.approx(100)


def test_400_threads_on_a_cold_cache_cost_one_signature(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.hold = threading.Event()
    got: list[AccessToken] = []
    threads = [
        threading.Thread(target=lambda: got.append(cache.get(REQUEST, well))) for _ in range(400)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: cache.waiting() == 400)
    well.hold.set()
    for thread in threads:
        thread.join(20)
    assert {token.value for token in got} == {"token-1"}
    assert len(got) == 400
    assert (well.fetched, cache.waiting()) == (1, 0)


def test_10_000_tasks_on_a_cold_cache_cost_one_signature(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.hold = threading.Event()

    async def crowd() -> list[AccessToken]:
        tasks = [asyncio.create_task(cache.aget(REQUEST, well)) for _ in range(10_000)]
        await crowded(cache, 10_000)
        assert well.hold is not None
        well.hold.set()
        return await asyncio.gather(*tasks)

    assert {token.value for token in asyncio.run(crowd())} == {"token-1"}
    assert (well.fetched, cache.waiting()) == (1, 0)


def test_without_the_flight_every_caller_costs_a_signature(clock: HandClock, well: Well) -> None:
    """The control of the two above: what they count is the flight's doing."""

    async def crowd() -> None:
        await asyncio.gather(*(cache_of(clock).aget(REQUEST, well) for _ in range(20)))

    asyncio.run(crowd())
    assert well.fetched == 20


def test_a_task_that_is_cancelled_cancels_nobody_else(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.hold = threading.Event()

    async def crowd() -> list[AccessToken | BaseException]:
        tasks = [asyncio.create_task(cache.aget(REQUEST, well)) for _ in range(10)]
        await crowded(cache, 10)
        # The one that started the flight is among them.
        for task in tasks[:5]:
            task.cancel()
        await asyncio.sleep(0)
        assert cache.waiting() == 5
        assert well.hold is not None
        well.hold.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    got = asyncio.run(crowd())
    assert all(isinstance(each, asyncio.CancelledError) for each in got[:5])
    assert [each.value for each in got[5:] if isinstance(each, AccessToken)] == ["token-1"] * 5
    assert well.fetched == 1


def test_if_all_who_waited_are_gone_the_token_is_kept(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.hold = threading.Event()

    async def crowd() -> None:
        task = asyncio.create_task(cache.aget(REQUEST, well))
        await crowded(cache, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(crowd())
    well.hold.set()
    wait_until_renewed(cache)
    assert cache.get(REQUEST, well).value == "token-1"
    assert well.fetched == 1


def test_two_loops_and_threads_share_one_flight(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.hold = threading.Event()
    got: list[str] = []

    async def one() -> None:
        got.append((await cache.aget(REQUEST, well)).value)

    threads = [threading.Thread(target=lambda: asyncio.run(one())) for _ in range(4)]
    threads += [threading.Thread(target=lambda: got.append(cache.get(REQUEST, well).value))]
    for thread in threads:
        thread.start()
    wait_for(lambda: cache.waiting() == 5)
    well.hold.set()
    for thread in threads:
        thread.join(20)
    assert got == ["token-1"] * 5


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_ends_a_flight_those_who_wait_hear_of_it(
    clock: HandClock, well: Well, error: BaseException
) -> None:
    cache = cache_of(clock)
    well.error = error
    with pytest.raises(type(error)):
        cache.get(REQUEST, well)
    well.error = None
    # A mistake that repeats itself must not spend a signature for each call.
    clock.pass_(2)
    assert cache.get(REQUEST, well).value == "token-2"


def test_a_mistake_rests_as_a_failure_does(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    well.error = ValueError("a bug")
    for _ in range(5):
        with pytest.raises(ValueError, match="a bug"):
            cache.get(REQUEST, well)
    assert well.fetched == 1
    clock.pass_(2)
    with pytest.raises(ValueError, match="a bug"):
        cache.get(REQUEST, well)
    assert well.fetched == 2


def test_failures_that_go_on_for_hours_are_told_as_the_first_one_is(
    clock: HandClock, well: Well
) -> None:
    cache = cache_of(clock)
    well.error = DeviceError("the device is down", code="device-down")
    for _ in range(1_100):
        with pytest.raises(DeviceError, match="the device is down"):
            cache.get(REQUEST, well)
        clock.pass_(13)
    assert well.fetched == 1_100
    well.error = None
    assert cache.get(REQUEST, well).value == "token-1101"


def test_a_token_that_comes_back_the_same_costs_one_signature_for_all(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose tokens never change answers a refused one with its equal."""
    well, hold, got = Well(clock), threading.Event(), list[str]()
    cache, fetch = cache_of(clock), well.fetch

    def constant(pending: PendingRenewal) -> AccessToken:
        token = fetch(pending)
        return AccessToken("constant", token.scope, token.asked, token.lifetime)

    monkeypatch.setattr(well, "fetch", constant)
    cache.get(REQUEST, well)
    well.hold = hold
    crowd = [
        threading.Thread(
            target=lambda: got.append(
                cache.get(REQUEST, well, TokenRequirements(avoid="constant")).value
            )
        )
        for _ in range(20)
    ]
    for each in crowd:
        each.start()
    wait_for(lambda: cache.waiting() == 20)
    hold.set()
    for each in crowd:
        each.join(10)
    assert (well.fetched, got) == (2, ["constant"] * 20)


def test_a_device_that_hangs_is_told_after_the_patience_of_the_first(
    clock: HandClock, well: Well
) -> None:
    cache = cache_of(clock, deadline=0.2)
    well.hold = threading.Event()
    with pytest.raises(HsmTollError) as caught:
        cache.get(REQUEST, well)
    assert (caught.value.code, caught.value.exit_code) == ("device-hangs", 30)
    with pytest.raises(HsmTollError):
        asyncio.run(cache.aget(REQUEST, well))
    well.hold.set()
    wait_until_renewed(cache)
    # What came late is not lost.
    assert cache.get(REQUEST, well).value == "token-1"
    assert well.fetched == 1


def test_a_store_that_is_not_safe_is_an_error_and_not_a_signature(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    with pytest.raises(ConfigurationError):
        cache_of(clock, FileStore(tmp_path / "cache")).get(REQUEST, well)
    assert well.fetched == 0


def test_the_count_of_hits_says_where_tokens_came_from(
    clock: HandClock, well: Well, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    cache = cache_of(clock, store)
    for _ in range(3):
        cache.get(REQUEST, well)
    other = cache_of(clock, store)
    other.get(REQUEST, well, NO_REQUIREMENTS)
    assert cache.hits == {"fresh": 2, "stale": 0, "stored": 0, "fetched": 1}
    assert other.hits == {"fresh": 0, "stale": 0, "stored": 1, "fetched": 0}
    assert cache.left() == 120
    clock.pass_(1000)
    assert cache.left() == 0


def test_a_token_that_is_over_when_it_comes_costs_one_signature(clock: HandClock) -> None:
    well, hold, errors = Well(clock, lifetime=1), threading.Event(), list[HsmTollError]()
    well.hold, cache = hold, cache_of(clock)

    def ask() -> None:
        try:
            cache.get(REQUEST, well)
        except HsmTollError as exc:
            errors.append(exc)

    crowd = [threading.Thread(target=ask) for _ in range(20)]
    for each in crowd:
        each.start()
    wait_for(lambda: cache.waiting() == 20)
    clock.pass_(2)
    hold.set()
    for each in crowd:
        each.join(10)
    assert well.fetched == 1
    assert {(type(each), each.code) for each in errors} == {(NetworkError, "token-over")}


def test_renew_is_a_new_token_after_the_clock_was_set_back(clock: HandClock, well: Well) -> None:
    cache = cache_of(clock)
    cache.get(REQUEST, well)
    clock.pass_(10)
    clock.wall -= 3600
    assert cache.get(REQUEST, well, TokenRequirements(since=clock.now())).value == "token-2"


def test_a_life_that_new_tokens_just_miss_costs_one_signature(
    clock: HandClock, well: Well, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetch = cache_of(clock), well.fetch

    def slow(pending: PendingRenewal) -> AccessToken:
        token = fetch(pending)
        clock.pass_(0.4)
        return token

    monkeypatch.setattr(well, "fetch", slow)
    for _ in range(5):
        with pytest.raises(UsageError):
            cache.get(REQUEST, well, TokenRequirements(min_life=well.lifetime))
    assert well.fetched == 1
    # The control: what a new one has left when it comes can be had.
    assert (
        cache.get(REQUEST, well, TokenRequirements(min_life=well.lifetime - 1)).value == "token-1"
    )


def test_a_token_that_came_slowly_does_not_speak_for_the_next(
    clock: HandClock, well: Well, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetch = cache_of(clock), well.fetch

    def slow(pending: PendingRenewal) -> AccessToken:
        token = fetch(pending)
        clock.pass_(20 if well.fetched == 1 else 0.1)
        return token

    monkeypatch.setattr(well, "fetch", slow)
    assert cache.get(REQUEST, well).value == "token-1"
    assert cache.get(REQUEST, well, TokenRequirements(min_life=110)).value == "token-2"


def test_a_mistake_is_raised_anew_for_each_caller(
    clock: HandClock, well: Well, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(clock)

    def mistaken(pending: PendingRenewal) -> AccessToken:
        raise KeyError(pending.phase)

    monkeypatch.setattr(well, "fetch", mistaken)
    depths = []
    for _ in range(20):
        with pytest.raises(KeyError) as caught:
            cache.get(REQUEST, well)
        frames = [each.name for each in caught.traceback]
        depths.append(len(frames))
        assert frames[-1] == "mistaken"
    assert depths[-1] == depths[1]


def test_a_failed_renewal_is_told_once(
    clock: HandClock, well: Well, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(clock)
    cache.get(REQUEST, well)
    clock.pass_(100)
    well.error = NetworkError("nobody answered")
    # By a warning where the token in hand still serves …
    assert cache.get(REQUEST, well).value == "token-1"
    flown()
    assert [each.message for each in caplog.records].count(
        "renewal failed, the cached token is still valid: nobody answered"
    ) == 1
    # … and where it does not, by the error alone.
    caplog.clear()
    clock.pass_(2)
    with pytest.raises(NetworkError):
        cache.get(REQUEST, well, TokenRequirements(since=clock.now()))
    flown()
    assert caplog.records == []


def test_a_living_token_is_given_where_no_thread_is_to_be_had(
    clock: HandClock, well: Well, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(clock)
    cache.get(REQUEST, well)
    clock.pass_(70)

    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    assert cache.get(REQUEST, well).value == "token-1"


SPAN: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")


class Traced(Well):
    """A renewer that notes below which span it works, as tracing of HTTP clients does."""

    def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
        self.name = SPAN.get()
        SPAN.set("a span of the renewal's own")
        return super().renew(request, pending)


def test_a_renewal_works_in_the_context_of_the_thread_that_asked_for_it(clock: HandClock) -> None:
    well, cache = Traced(clock), cache_of(clock)
    for span in ("first", "second"):
        token = SPAN.set(span)
        cache.get(REQUEST, well)
        assert (well.name, SPAN.get()) == (span, span)
        SPAN.reset(token)
        clock.pass_(600)
    assert well.fetched == 2


def test_a_renewal_works_in_the_context_of_the_task_that_asked_for_it(clock: HandClock) -> None:
    well, cache = Traced(clock), cache_of(clock)

    async def asked(span: str) -> str:
        SPAN.set(span)
        await cache.aget(REQUEST, well)
        return SPAN.get()

    async def asked_by_two_tasks() -> list[str]:
        return [*await asyncio.gather(asked("first"), asked("second"))]

    assert asyncio.run(asked_by_two_tasks()) == ["first", "second"]
    assert (well.name, well.fetched) == ("first", 1)
