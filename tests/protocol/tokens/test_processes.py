"""Processes that share a directory: one signature for all, whoever dies on the way."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.kit.crowds import Crowd, fresh_key

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox


# Crowds of processes on a busy machine take their time to start.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"file://{tmp_path}/cache"


def test_50_cold_processes_cost_one_signature(toll_sandbox: Sandbox, cache: str) -> None:
    with Crowd(toll_sandbox, cache) as crowd:
        signed, ended = crowd.run(50)
    assert signed == 1
    assert len(ended) == 1
    assert ended.pop().startswith("token ")


def test_without_a_common_store_each_costs_its_own(toll_sandbox: Sandbox, tmp_path: Path) -> None:
    """The control: the same crowd, a directory each."""
    total = 0
    for at in range(4):
        with Crowd(toll_sandbox, f"file://{tmp_path}/cache-{at}") as crowd:
            total += crowd.run(1)[0]
    assert total == 4


@pytest.mark.parametrize("step", ["locked", "signed", "granted", "exchanged"])
def test_a_leader_that_is_killed_blocks_nobody(
    toll_sandbox: Sandbox, cache: str, step: str
) -> None:
    with Crowd(toll_sandbox, cache) as crowd:
        leader = crowd.member(step=step)
        leader.until(f"at {step}")
        followers = [crowd.member() for _ in range(3)]
        for each in followers:
            each.until("ready")
        leader.process.send_signal(signal.SIGKILL)
        leader.process.wait(60)
        outputs = [each.end() for each in followers]
    assert sum(lines.count("signed") for lines in outputs) == 1
    assert len({lines[-2] for lines in outputs}) == 1
    assert outputs[0][-2].startswith("token ")


def test_a_leader_that_forks_and_is_killed_takes_its_lock_along(
    toll_sandbox: Sandbox, cache: str
) -> None:
    """A lock of the kernel lives as long as one descriptor: the child must not keep it."""
    with Crowd(toll_sandbox, cache) as crowd:
        leader = crowd.member(step="signed", fork=True)
        child = int(leader.until("child ").split()[1])
        leader.until("at signed")
        # Half of its deadline, far beyond the time-out of this test, is what a lock that is never
        # freed would cost.
        follower = crowd.member(deadline=3600)
        follower.until("ready")
        leader.process.send_signal(signal.SIGKILL)
        leader.process.wait(60)
        try:
            output = follower.end()
            os.kill(child, 0)  # it lives still
        finally:
            os.kill(child, signal.SIGKILL)
    assert output.count("signed") == 1
    assert any(line.startswith("token ") for line in output)


def test_a_leader_that_stands_still_is_waited_for_half_the_patience(
    toll_sandbox: Sandbox, cache: str
) -> None:
    with Crowd(toll_sandbox, cache) as crowd:
        leader = crowd.member(step="signed")
        leader.until("at signed")
        follower = crowd.member(deadline=4)
        output = follower.end()
    assert output.count("signed") == 1
    assert any(line.startswith("token ") for line in output)


def test_a_leader_that_stands_still_is_replaced_by_one_and_not_by_all(
    toll_sandbox: Sandbox, cache: str
) -> None:
    with Crowd(toll_sandbox, cache) as crowd:
        leader = crowd.member(step="signed")
        leader.until("at signed")
        followers = [crowd.member(deadline=12) for _ in range(5)]
        outputs = [each.end() for each in followers]
    assert sum(lines.count("signed") for lines in outputs) == 1
    assert all(lines[-2].startswith("token ") for lines in outputs)


def test_a_follower_that_is_killed_costs_nobody_anything(toll_sandbox: Sandbox, cache: str) -> None:
    with Crowd(toll_sandbox, cache) as crowd:
        toll_sandbox.fault("slow", "token", seconds=2)
        leader = crowd.member()
        leader.until("signed")
        followers = [crowd.member() for _ in range(2)]
        for each in followers:
            each.until("ready")
        followers[0].process.kill()
        outputs = [leader.end(), followers[1].end()]
    assert sum(lines.count("signed") for lines in outputs) == 1
    assert len({lines[-2] for lines in outputs}) == 1


def test_a_warm_process_asks_nobody(toll_sandbox: Sandbox, cache: str) -> None:
    with Crowd(toll_sandbox, cache) as crowd:
        assert crowd.run(1)[0] == 1
        before = len(toll_sandbox.received)
        assert crowd.run(3)[0] == 0
    assert len(toll_sandbox.received) == before


def test_two_identities_with_equal_settings_never_share_a_token(
    toll_sandbox: Sandbox, cache: str
) -> None:
    with Crowd(toll_sandbox, cache) as ours, Crowd(toll_sandbox, cache, key=fresh_key()) as theirs:
        first, _ = ours.run(2)
        second, _ = theirs.run(2)
    # Whoever had been given the other's token would not have signed for one.
    assert (first, second) == (1, 1)
