"""
What foreign bytes cost their reader grows with their number, and no faster.

Counted are steps of Python (lines, calls and returns), which are the same on every machine. What
happens inside of C costs time alone: `scripts/bench costs` shows that.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from hsmtoll.x509 import certificate
from tests.kit.hostile import READERS, Reader

if TYPE_CHECKING:
    from collections.abc import Callable

#: Steps that do not come from the bytes: whatever is loaded, cached or set up once.
_ONCE: Final = 2_000

#: Twice the bytes are twice the steps, and a few more where all have a part in common; where steps
#: grow with the square, they are four times as many.
_GROWTH: Final = 2.5

#: Steps for half of the bytes that are read at most: some 0.05 s.
_MOST: Final = 2_500_000


def steps_of(work: Callable[[], object]) -> int:
    """Lines, calls and returns of *work*."""
    count = 0

    def seen(_frame: Any, _event: str, _arg: object) -> Any:
        nonlocal count
        count += 1
        return seen

    certificate._read.cache_clear()
    before = sys.gettrace()
    sys.settrace(seen)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def too_many(read: Callable[[bytes], object], shape: Callable[[int], bytes], most: int) -> str:
    """How the steps of *read* grow faster than what it reads does; empty if they do not."""
    read(shape(most // 8))
    some, twice = (steps_of(partial(read, shape(size))) for size in (most // 4, most // 2))
    if twice > _GROWTH * some + _ONCE:
        return f"{some} steps for {most // 4} bytes, {twice} for twice as many"
    if twice > _MOST:
        return f"{twice} steps for {most // 2} bytes"
    return ""


@pytest.mark.parametrize("who", READERS)
def test_steps_grow_with_the_bytes_and_no_faster(who: str) -> None:
    reader: Reader = READERS[who]
    found = {what: too_many(reader, shape, reader.most) for what, shape in reader.shapes.items()}
    assert {what: why for what, why in found.items() if why} == {}


@pytest.mark.parametrize("who", READERS)
def test_as_many_bytes_as_are_read_come_to_an_end(who: str) -> None:
    # Where a step of C took the square of its time, this would take hours and not a second.
    reader = READERS[who]
    for shape in reader.shapes.values():
        reader(shape(reader.most))


def test_the_count_finds_what_grows_with_the_square_and_what_is_dear() -> None:
    def every_pair(raw: bytes) -> int:
        return sum(one == other for one in raw for other in raw)

    def every_byte_often(raw: bytes) -> int:
        return sum(one for one in raw for _ in range(100))

    def every_byte(raw: bytes) -> int:
        return sum(one for one in raw)

    assert "for twice as many" in too_many(every_pair, bytes, 4096)
    assert "steps for" in too_many(every_byte_often, bytes, 64 * 1024)
    assert too_many(every_byte, bytes, 64 * 1024) == ""
