"""Frames between a device and the process that isolates it: whole, bounded, in time."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from hsmtoll.hsm.pipe import Pipe

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Pipe(ours), theirs


def frame(message: object) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def test_two_messages_that_came_together_are_two(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, there = ends
    there.sendall(frame({"one": 1}) + frame({"two": 2}))
    assert (pipe.receive(), pipe.receive()) == ({"one": 1}, {"two": 2})


def test_a_message_that_comes_in_pieces_is_one(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, there = ends
    whole = frame({"do": "x" * 300})
    for part in (whole[:2], whole[2:9], whole[9:-1], whole[-1:]):
        there.sendall(part)
    assert pipe.receive() == {"do": "x" * 300}


def test_what_one_end_sends_the_other_receives(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, there = ends
    for each in ({"do": "sign", "unsigned": "e30." * 3000}, {"do": "key"}):
        pipe.send(each)
        assert Pipe(there).receive() == each


def test_one_that_drips_is_cut_off_at_the_moment_named(ends: tuple[Pipe, socket.socket]) -> None:
    _, there = ends
    at = iter((0.0, 4.0, 8.0, 12.0))
    pipe = Pipe(ends[0].socket, now=lambda: next(at))
    there.sendall(frame({"whole": True})[:3])
    with pytest.raises(TimeoutError):
        # Each part would be in time by itself; the second look is past it.
        pipe.receive(until=3.0)


def test_nobody_is_waited_for_past_the_moment(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, _ = ends
    with pytest.raises(TimeoutError):
        pipe.receive(until=time.monotonic() + 0.05)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", EOFError),
        (frame({"half": "one"})[:-1], EOFError),
        (struct.pack(">I", 1 << 31), ValueError),
        (struct.pack(">I", 3) + b"{]}", ValueError),
        (frame(["no", "message"]), TypeError),
    ],
    ids=["nothing", "half", "too-large", "nonsense", "a-list"],
)
def test_what_is_no_message_is_an_error(
    ends: tuple[Pipe, socket.socket], sent: bytes, error: type[Exception]
) -> None:
    pipe, there = ends
    there.sendall(sent)
    there.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        pipe.receive()
