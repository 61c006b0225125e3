"""
Signatures without a thread for each: what the loop hands to the device ahead of time comes back
right and in order, and whatever is not plain goes to somebody who may wait.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.host.ahead import QUICK, Ahead, Turn
from hsmtoll.hsm.isolated import IsolatedDevice, to_sign
from hsmtoll.jws import SigningInput
from hsmtoll.settings import load
from tests.hosting import eventually
from tests.lab import workers
from tests.soak.measure import children

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.signer import LocalSigner, Prepared
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import ThrowAway
    from tests.hosting import RunningHost

PATIENCE = 60.0


@dataclass
class Desk:
    """A device in processes of its own, and who asks it without waiting."""

    device: IsolatedDevice
    signer: LocalSigner
    request: Any
    made: list[str] = field(default_factory=list)

    def sign(self) -> str:
        """As a thread does, which waits."""
        return self.signer.assertion(self.request)

    async def ask(self, ahead: Ahead) -> asyncio.Future[Any]:
        """Its outcome: the assertion, an error, or ``None`` for "a thread has to"."""
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def then(made: Prepared | None, said: bytes | HsmTollError | None) -> None:
            told.set_result(made.proven(said) if made and isinstance(said, bytes) else said)

        if ahead.ask(lambda: self.signer.prepared(self.request), then) is None:
            told.set_result(None)
        return told

    async def crowd(self, ahead: Ahead, size: int) -> list[Any]:
        """The outcomes of as many at once."""
        every = [await self.ask(ahead) for _ in range(size)]
        return [await asyncio.wait_for(each, PATIENCE) for each in every]


@pytest.fixture
def make(
    toll_eseal: ThrowAway,
    toll_sandbox: Sandbox,
    toll_faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Desk]]:
    environ = {**toll_eseal.environ(), **toll_sandbox.environ(), **toll_faults.environ()}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    apps: list[App] = []

    def made(*, processes: int = 1, **settings: Any) -> Desk:
        app = App(load(hsm={"isolation": "process"}, host={"workers": processes}, **settings))
        apps.append(app)
        (device,) = app.devices
        assert isinstance(device, IsolatedDevice)
        return Desk(device, app.local_signer(device), app.engine.request("road"))

    yield made
    toll_faults.clear()
    for each in apps:
        each.close()


def run(desk: Desk, work: Callable[[Ahead], Coroutine[None, None, None]]) -> None:
    """*work*, with a way to the device that is closed at the end."""

    async def whole() -> None:
        ahead = Ahead(desk.device, asyncio.get_running_loop())
        try:
            await work(ahead)
        finally:
            ahead.close()

    asyncio.run(whole())


def steady(desk: Desk) -> Desk:
    """One whose device has signed, and is known to be quick."""
    desk.sign()
    for _ in range(20):
        desk.sign()
        if desk.device.pace <= QUICK:
            return desk
    raise AssertionError(f"a signature took {desk.device.pace} s")


def test_a_crowd_is_signed_for_in_order_and_without_a_thread(
    make: Callable[..., Desk], toll_faults: Faults
) -> None:
    desk = steady(make())
    before, threads = toll_faults.count("C_SignInit"), threading.active_count()

    async def work(ahead: Ahead) -> None:
        every = await desk.crowd(ahead, 40)
        assert threading.active_count() == threads
        assert len({each.split(".")[1] for each in every}) == 40

    # Each was checked against the key that it names: `Prepared.proven` gives out no other.
    run(desk, work)
    assert toll_faults.count("C_SignInit") - before == 40
    # And the process is everybody's again.
    assert desk.sign()
    assert len(workers()) == 1


def test_a_device_that_has_not_signed_yet_is_a_threads_to_start(make: Callable[..., Desk]) -> None:
    desk = make()

    async def work(ahead: Ahead) -> None:
        assert await desk.crowd(ahead, 1) == [None]

    run(desk, work)
    assert workers() == []
    # The control.
    run(steady(desk), lambda ahead: taken(desk, ahead))


async def taken(desk: Desk, ahead: Ahead) -> None:
    assert (await desk.crowd(ahead, 1))[0].count(".") == 2


def test_a_slow_device_is_asked_one_by_one(make: Callable[..., Desk], toll_faults: Faults) -> None:
    desk = steady(make())
    toll_faults.set("slow", ms=100, function="C_SignInit")
    desk.sign()

    async def work(ahead: Ahead) -> None:
        assert await desk.crowd(ahead, 1) == [None]

    run(desk, work)
    toll_faults.clear()
    run(steady(desk), lambda ahead: taken(desk, ahead))


def test_all_processes_take_part(make: Callable[..., Desk], toll_faults: Faults) -> None:
    desk = make(processes=2)
    # Two at once, each long enough for the other to need a process of its own.
    toll_faults.set("slow", ms=300, function="C_SignInit")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: desk.sign(), range(2)))
    toll_faults.clear()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: desk.sign(), range(20)))
    steady(desk)

    async def work(ahead: Ahead) -> None:
        every = [await desk.ask(ahead) for _ in range(8)]
        assert not desk.device.has_idle
        assert [await each for each in every]

    run(desk, work)


def test_who_may_wait_is_let_in_between(make: Callable[..., Desk]) -> None:
    desk = steady(make())

    async def work(ahead: Ahead) -> None:
        loop = asyncio.get_running_loop()
        waiting = [await desk.ask(ahead) for _ in range(600)]
        signed = await asyncio.wait_for(loop.run_in_executor(None, desk.sign), PATIENCE)
        assert signed.count(".") == 2
        # It did not have to wait for all of them.
        assert not all(each.done() for each in waiting)
        for each in waiting:
            assert (await asyncio.wait_for(each, PATIENCE)).count(".") == 2

    run(desk, work)


def test_a_process_that_dies_was_at_the_first_question_alone(
    make: Callable[..., Desk], toll_faults: Faults
) -> None:
    desk = steady(make())
    toll_faults.set("crash", function="C_SignInit")

    async def work(ahead: Ahead) -> None:
        first, *others = await desk.crowd(ahead, 5)
        assert isinstance(first, HsmTollError)
        assert (first.code, first.exit_code) == ("module-crashed", 30)
        assert "SIGABRT" in str(first)
        # They were not asked: a thread starts another process for them.
        assert others == [None] * 4
        toll_faults.clear()
        assert await desk.crowd(ahead, 1) == [None]

    run(desk, work)
    run(steady(desk), lambda ahead: taken(desk, ahead))


def test_one_that_is_killed_while_nobody_asks_is_started_again_by_a_thread(
    make: Callable[..., Desk],
) -> None:
    desk = steady(make())
    os.kill(workers()[0], signal.SIGKILL)

    async def work(ahead: Ahead) -> None:
        (said,) = await desk.crowd(ahead, 1)
        assert said is None or said.code == "module-crashed"

    run(desk, work)
    run(steady(desk), lambda ahead: taken(desk, ahead))


def test_one_that_hangs_is_ended_at_the_deadline(
    make: Callable[..., Desk], toll_faults: Faults
) -> None:
    desk = steady(make(deadline=1.0))
    toll_faults.set("hang", function="C_SignInit")

    async def work(ahead: Ahead) -> None:
        first, *others = await desk.crowd(ahead, 3)
        assert isinstance(first, HsmTollError)
        assert first.code == "device-hung"
        assert others == [None] * 2

    run(desk, work)
    toll_faults.clear()
    assert desk.sign()


def test_an_error_of_the_device_is_told_to_the_one_it_concerns(
    make: Callable[..., Desk], toll_faults: Faults
) -> None:
    desk = steady(make())
    toll_faults.set("token-removed")

    async def work(ahead: Ahead) -> None:
        (first,) = await desk.crowd(ahead, 1)
        assert isinstance(first, HsmTollError)
        assert first.exit_code == 30
        # What is the matter with it is a thread's to find out.
        assert await desk.crowd(ahead, 1) == [None]

    run(desk, work)


def test_a_wrong_signature_is_given_to_nobody(
    make: Callable[..., Desk], toll_faults: Faults
) -> None:
    desk = steady(make())
    toll_faults.set("wrong-signature")

    async def work(ahead: Ahead) -> None:
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        taken = ahead.ask(
            lambda: desk.signer.prepared(desk.request), lambda *said: told.set_result(said)
        )
        assert taken is not None
        made, said = await asyncio.wait_for(told, PATIENCE)
        assert isinstance(said, bytes)
        with pytest.raises(HsmTollError) as caught:
            made.proven(said)
        assert caught.value.code == "signature-wrong"

    run(desk, work)


def test_one_whose_turn_has_not_come_can_still_be_cancelled(
    make: Callable[..., Desk], toll_faults: Faults
) -> None:
    desk = steady(make())
    before = toll_faults.count("C_SignInit")

    async def work(ahead: Ahead) -> None:
        heard: list[object] = []
        both = asyncio.Event()

        def then(*said: object) -> None:
            heard.append(said)
            if len(heard) == 2:
                both.set()

        turns = [ahead.ask(lambda: desk.signer.prepared(desk.request), then) for _ in range(6)]
        assert all(isinstance(each, Turn) for each in turns)
        # The first two are at the device or in its pipe.
        assert [each.cancel() for each in turns if each is not None] == [False] * 2 + [True] * 4
        await asyncio.wait_for(both.wait(), PATIENCE)
        await asyncio.sleep(0.1)
        assert len(heard) == 2

    run(desk, work)
    assert toll_faults.count("C_SignInit") - before == 2


def test_two_questions_of_the_largest_kind_go_ahead_though_nobody_reads(
    make: Callable[..., Desk],
) -> None:
    desk = steady(make())
    made = desk.signer.prepared(desk.request)
    assert made is not None
    large = [made.unsigned.ljust(64 * 1024, each) for each in (b"a", b"b")]
    child = desk.device.lend()
    assert child is not None
    (worker,) = workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        for each in large:
            child.post(to_sign("RS256", SigningInput(each), ()), "Signing")
    finally:
        os.kill(worker, signal.SIGCONT)
    answers: list[Any] = []
    while len(answers) < 2:
        select.select([child], [], [], PATIENCE)
        answers += child.answers("Signing")
    for each, answer in zip(large, answers, strict=True):
        assert made.key.verify("RS256", each, answer["data"])
    desk.device.take_back(child)
    assert desk.sign()


def test_at_the_end_who_waits_is_sent_elsewhere_and_the_process_is_given_back(
    make: Callable[..., Desk],
) -> None:
    desk = steady(make())

    async def work(ahead: Ahead) -> None:
        every = [await desk.ask(ahead) for _ in range(6)]
        ahead.close()
        told = [await asyncio.wait_for(each, PATIENCE) for each in every]
        assert told == [None] * 6

    run(desk, work)
    assert desk.sign()


def test_a_stop_holds_though_callers_stand_in_line(running_host: RunningHost) -> None:
    running_host.ask()
    with ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(running_host.ask) for _ in range(300)]
        while running_host.signatures() < 20:
            pass
        running_host.stop_file.touch()
        at_the_stop = running_host.signatures()
        replies = [each.result(PATIENCE) for each in asked]
    refused = [each for each in replies if each.status != 200]
    assert refused
    assert {(each.status, each.word) for each in refused} == {(403, "stopped")}
    # Those that the device had been given before: the one that it was at, and the next ones.
    assert running_host.signatures() <= at_the_stop + 20
    # All that was had is in the audit, and so is what was signed and not handed over any more.
    signed = [e for e in running_host.records("result") if e["outcome"].startswith("signed")]
    assert len(signed) >= len(replies) - len(refused) + 1
    assert len(signed) == running_host.signatures() - 1
    running_host.stop_file.unlink()
    assert running_host.ask().status == 200


@pytest.mark.parametrize("usable_first", [True, False])
def test_with_a_list_of_keys_whichever_signs_a_crowd_is_served(
    make_host: Callable[..., RunningHost], usable_first: bool
) -> None:
    host = make_host()
    there = host.environ["HSMTOLL_HSM__KEY"]
    missing = there.replace("object=", "object=no-")
    assert missing != there
    keys = (there, missing) if usable_first else (missing, there)
    host.start(HSMTOLL_HSM__KEY=" ".join(keys))
    with ThreadPoolExecutor(7) as pool:
        replies = list(pool.map(lambda _: host.ask(), range(60)))
    assert {each.status for each in replies} == {200}
    assert len({each.body["jti"] for each in replies}) == 60
    # Where a process that is asked ahead dies, another key may do: a thread sees to it.
    assert host.process is not None
    for each in children(host.process.pid):
        os.kill(each, signal.SIGKILL)
    assert host.ask().status == 200 or not usable_first
    eventually(lambda: host.ask().status == 200)
