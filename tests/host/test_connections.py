"""Connections of one listener: kept for further requests, waiting for a place, and closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.host import connections, places
from hsmtoll.host.connections import Listener, mark_complete
from hsmtoll.host.messages import json_reply
from hsmtoll.host.places import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import web

PATIENCE = 60.0
REQUEST = b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
ROOMY = Limits(connections=8, per_caller=8, max_wait=PATIENCE)


class Served:
    """A listener, what its handler was asked, and the word to answer; by default at once."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._changed = asyncio.Condition()
        self._ended = False
        self.writers: list[asyncio.StreamWriter] = []
        self.refused: list[str] = []
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        self.listener = Listener(listening, self._handle, limits, refused=self.refused.append)
        self.listener.open()
        self.asked: list[str] = []
        self.may = asyncio.Event()
        self.may.set()

    async def _handle(self, request: web.BaseRequest, peer: object) -> web.Response:
        del peer
        await request.read()
        mark_complete(request)
        async with self._changed:
            self.asked.append(request.path)
            self._changed.notify_all()
        await self.may.wait()
        return json_reply({"path": request.path})

    async def until_asked(self, *paths: str) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.asked == list(paths))

    async def end(self) -> None:
        """A second time changes nothing."""
        if not self._ended:
            self._ended = True
            await self.listener.close(grace=PATIENCE)

    async def client(self) -> Client:
        """A new connection; it is closed at the end."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        self.writers.append(writer)
        return Client(reader, writer)


@contextlib.asynccontextmanager
async def served(folder: Path, limits: Limits = ROOMY) -> AsyncIterator[Served]:
    async with asyncio.timeout(PATIENCE):
        one = Served(folder / "sock", limits)
        try:
            yield one
        finally:
            one.may.set()
            await one.end()
            for writer in one.writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, raw: bytes) -> None:
        self._writer.write(raw)

    async def reply(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next reply."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        await self._reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers

    async def asked(self, number: int = 0) -> tuple[int, dict[str, str]]:
        self.send(REQUEST % number)
        return await self.reply()

    async def closed(self) -> bool:
        """Wait until the other side has closed it; whether nothing came before."""
        try:
            return await self._reader.read() == b""
        except ConnectionResetError:
            return True


def run(work: Any) -> None:
    asyncio.run(work)


def test_requests_of_one_connection_are_served_one_after_the_other(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path) as one:
            client = await one.client()
            for number in range(3):
                status, headers = await client.asked(number)
                assert (status, headers["keep-alive"]) == (200, "timeout=60")
            # The second waits for the reply to the first, although it is there already.
            one.may.clear()
            client.send(REQUEST % 3 + REQUEST % 4)
            await one.until_asked("/0", "/1", "/2", "/3")
            one.may.set()
            assert [(await client.reply())[0] for _ in range(2)] == [200, 200]
            assert one.asked == ["/0", "/1", "/2", "/3", "/4"]

    run(work())


def test_nothing_is_read_after_a_request_that_says_it_is_the_last(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path) as one:
            client = await one.client()
            last = REQUEST.replace(b"Host: a", b"Host: a\r\nConnection: close") % 0
            client.send(last + REQUEST % 1)
            # A parser may refuse both: nothing may follow such a request (RFC 9112 section 9.6).
            assert (await client.reply())[0] in (200, 400)
            assert await client.closed()
            assert "/1" not in one.asked
            client = await one.client()
            client.send(last)
            status, headers = await client.reply()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.closed()

    run(work())


@pytest.mark.parametrize("what", ["nothing", "half"])
def test_a_connection_without_a_next_request_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    # What it does not wait for ends the test by its time limit.
    short, long = ("_IDLE_TIMEOUT", "_REQUEST_TIMEOUT")[:: 1 if what == "nothing" else -1]
    monkeypatch.setattr(connections, short, 0.2)
    monkeypatch.setattr(connections, long, 10 * PATIENCE)

    async def work() -> None:
        async with served(tmp_path) as one:
            client = await one.client()
            client.send(REQUEST % 0)
            assert (await client.reply())[0] == 200
            if what == "half":
                client.send(REQUEST[:20])
            assert await client.closed()
            assert one.asked == ["/0"]

    run(work())


def test_a_connection_that_is_old_is_closed_after_its_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_MAX_AGE", -1.0)

    async def work() -> None:
        async with served(tmp_path) as one:
            client = await one.client()
            status, headers = await client.asked()
            assert (status, headers["connection"]) == (200, "close")
            assert "keep-alive" not in headers
            assert await client.closed()

    run(work())


def test_those_above_the_limit_of_a_caller_wait_for_their_turn(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path, Limits(8, 1, PATIENCE)) as one:
            one.may.clear()
            clients = []
            for number in range(4):
                clients.append(await one.client())
                clients[-1].send(REQUEST % number)
            await one.until_asked("/0")
            one.may.set()
            replies = [await client.reply() for client in clients]
            assert one.asked == ["/0", "/1", "/2", "/3"]
            assert [status for status, _ in replies] == [200] * 4
            # Whoever waits has the place next; the last one may keep it.
            assert ["keep-alive" in headers for _, headers in replies] == [False] * 3 + [True]

    run(work())


def test_an_idle_connection_is_closed_for_another_one_of_its_caller(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path, Limits(8, 2, PATIENCE)) as one:
            first, second = await one.client(), await one.client()
            for each in (first, second, first):
                assert (await each.asked())[0] == 200
            # The third takes the place of the one that was used least recently.
            assert (await (await one.client()).asked())[0] == 200
            assert await second.closed()
            assert (await first.asked())[0] == 200
            assert one.refused == []

    run(work())


def test_who_has_waited_too_long_is_told_to_come_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path, Limits(8, 1, 0.2)) as one:
            one.may.clear()
            first, second = await one.client(), await one.client()
            first.send(REQUEST % 0)
            status, headers = await second.asked(1)
            assert (status, headers["retry-after"]) == (503, "1")
            assert await second.closed()
            one.may.set()
            assert (await first.reply())[0] == 200
            assert one.asked == ["/0"]

    run(work())


def test_more_than_may_wait_are_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_MAX_WAITING_PER_CALLER", 1)
    monkeypatch.setattr(places, "_MAX_REJECTED", 1)

    async def work() -> None:
        async with served(tmp_path, Limits(8, 1, PATIENCE)) as one:
            one.may.clear()
            clients = [await one.client() for _ in range(3)]
            clients[0].send(REQUEST % 0)
            clients[1].send(REQUEST % 1)
            # A fourth is closed at once while the third has no reply yet.
            assert await (await one.client()).closed()
            assert (await clients[2].asked(2))[0] == 503
            assert one.refused == ["busy", "busy"]
            one.may.set()
            assert [(await each.reply())[0] for each in clients[:2]] == [200, 200]

    run(work())


def test_at_the_total_limit_the_oldest_silent_one_is_closed(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path, Limits(3, 8, PATIENCE)) as one:
            one.may.clear()
            busy, silent, newer = [await one.client() for _ in range(3)]
            busy.send(REQUEST % 0)
            await one.until_asked("/0")
            last = await one.client()
            last.send(REQUEST % 1)
            assert await silent.closed()
            assert one.refused == ["crowded"]
            one.may.set()
            assert (await busy.reply())[0] == 200
            assert (await last.reply())[0] == 200
            assert (await newer.asked(2))[0] == 200

    run(work())


def test_at_the_end_replies_are_finished_and_all_others_closed(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path, Limits(8, 3, PATIENCE)) as one:
            busy, idle, silent = [await one.client() for _ in range(3)]
            assert (await idle.asked())[0] == 200
            one.may.clear()
            busy.send(REQUEST % 1 + REQUEST % 2)
            await one.until_asked("/0", "/1")
            waits = await one.client()
            waits.send(REQUEST % 3)
            ending = asyncio.create_task(one.end())
            for each in (idle, silent, waits):
                assert await each.closed()
            assert not ending.done()
            one.may.set()
            status, headers = await busy.reply()
            assert (status, headers["connection"]) == (200, "close")
            await ending
            assert one.asked == ["/0", "/1"]

    run(work())
