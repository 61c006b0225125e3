"""What is made once is made once, whoever asks first, and never waits for a thread that is gone."""

from __future__ import annotations

import threading

import pytest

from hsmtoll import once
from hsmtoll.once import made_once


class Things:
    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.made: list[object] = []

    @made_once
    def slow(self) -> object:
        """Made while others ask."""
        self.begun.set()
        assert self.go_on.wait(60)
        self.made.append(object())
        return self.made[-1]

    @made_once
    def of_another(self) -> list[object]:
        return [self.quick]

    @made_once
    def quick(self) -> object:
        return object()

    @made_once
    def broken(self) -> object:
        self.made.append(object())
        raise ValueError("not yet")


def test_threads_that_ask_at_once_get_the_same() -> None:
    things, seen = Things(), []
    threads = [threading.Thread(target=lambda: seen.append(things.slow)) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert things.begun.wait(60)
    things.go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(things.made) == 1
    assert seen == things.made * 8


def test_one_may_be_made_of_another_and_each_object_has_its_own() -> None:
    things = Things()
    assert things.of_another == [things.quick]
    assert things.quick is not Things().quick


def test_what_fails_is_tried_again() -> None:
    things = Things()
    for _ in range(2):
        with pytest.raises(ValueError, match="not yet"):
            assert things.broken
    assert len(things.made) == 2


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    things = Things()
    thread = threading.Thread(target=lambda: things.slow)
    thread.start()
    assert things.begun.wait(60)
    # What the child runs first; the thread that holds the lock is the parent's.
    once._after_fork()
    assert things.quick is things.quick
    things.go_on.set()
    thread.join(60)
