"""Connections to the proxy: how many, how long they may be silent, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from hsmtoll.errors import ConfigurationError
from hsmtoll.proxy import server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE = 60.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ok(_: web.BaseRequest) -> web.Response:
    return web.Response(text="ok")


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]] = ok,
) -> AsyncIterator[tuple[server._Server, Callable[[bytes], Awaitable[Connection]]]]:
    """A server, and how to connect and send something first."""
    one = server._Server(handler)
    listening = await asyncio.get_running_loop().create_server(one, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    writers: list[asyncio.StreamWriter] = []

    async def connected(first: bytes) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        writer.write(first)
        return reader, writer

    async with asyncio.timeout(PATIENCE):
        yield one, connected
        await one.drain(0)
        listening.close()
        for each in writers:
            each.close()


async def head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\nok")


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nX-Slow: ", GET])
def test_a_silent_connection_is_closed_after_a_time(
    monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    async def run() -> None:
        async with serving() as (_, connected):
            reader, _ = await connected(first)
            if first == GET:
                assert (await head(reader)).startswith(b"HTTP/1.1 200")
            assert await reader.read() == b""

    monkeypatch.setattr(server, "_IDLE_TIMEOUT", 0.2)
    asyncio.run(run())


def test_headers_that_drip_are_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serving() as (_, connected):
            reader, writer = await connected(b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"X-Slow: 1\r\n")
                    await asyncio.sleep(0.05)
                    await writer.drain()

    monkeypatch.setattr(server, "_IDLE_TIMEOUT", 0.2)
    asyncio.run(run())


def test_a_request_that_lasts_is_not_closed_as_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(request: web.BaseRequest) -> web.Response:
        await asyncio.sleep(1)
        return await ok(request)

    async def run() -> None:
        async with serving(slow) as (_, connected):
            reader, _ = await connected(GET)
            assert (await head(reader)).startswith(b"HTTP/1.1 200")

    monkeypatch.setattr(server, "_IDLE_TIMEOUT", 0.2)
    asyncio.run(run())


def test_beyond_the_limit_the_longest_idle_connection_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        held = asyncio.Event()

        async def handler(request: web.BaseRequest) -> web.Response:
            if request.raw_path == "/held":
                await held.wait()
            return await ok(request)

        async with serving(handler) as (_, connected):
            busy, _ = await connected(GET.replace(b"/ ", b"/held "))
            readers = []
            for _ in range(4):
                reader, writer = await connected(GET)
                assert (await head(reader)).startswith(b"HTTP/1.1 200")
                readers.append((reader, writer))
            # Three places: one is busy, so the first two of four were closed.
            for reader, _ in readers[:2]:
                assert await reader.read() == b""
            for reader, writer in readers[2:]:
                writer.write(GET)
                assert (await head(reader)).startswith(b"HTTP/1.1 200")
            held.set()
            assert (await head(busy)).startswith(b"HTTP/1.1 200")

    monkeypatch.setattr(server, "_CONNECTIONS", 3)
    asyncio.run(run())


def test_the_end_waits_for_a_body_that_is_on_its_way_and_not_for_idle_connections() -> None:
    async def run() -> None:
        begun, bodies = asyncio.Event(), []

        async def handler(request: web.BaseRequest) -> web.Response:
            begun.set()
            bodies.append(await request.read())
            return await ok(request)

        async with serving(handler) as (one, connected):
            idle, _ = await connected(b"GET / HT")
            reader, writer = await connected(
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n1234"
            )
            await begun.wait()
            end = asyncio.create_task(one.drain(PATIENCE))
            assert await idle.read() == b""
            assert not end.done()
            writer.write(b"5678")
            assert (await head(reader)).startswith(b"HTTP/1.1 200")
            await end
            assert bodies == [b"12345678"]
            # Its connection is not kept for another one.
            assert await reader.read() == b""

    asyncio.run(run())


def test_the_end_does_not_wait_longer_than_it_is_given() -> None:
    async def run() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(_: web.BaseRequest) -> web.Response:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

        async with serving(handler) as (one, connected):
            reader, _ = await connected(GET)
            await begun.wait()
            await one.drain(0.1)
            await cancelled.wait()
            assert await reader.read() == b""

    asyncio.run(run())


@pytest.mark.parametrize(
    ("address", "taken"),
    [("127.0.0.1", True), ("0.0.0.0", False)],  # noqa: S104 - refused
)
def test_a_socket_of_the_service_manager_is_on_the_loopback(address: str, *, taken: bool) -> None:
    with socket.socket() as given:
        given.bind((address, 0))
        expected = contextlib.nullcontext() if taken else pytest.raises(ConfigurationError)
        with expected:
            server._check_local(given)


def test_the_default_port_is_left_out_by_clients() -> None:
    class Bound(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", port

    with Bound() as listening:
        for port, known in ((80, True), (8080, False)):
            assert ("localhost" in server._hosts([listening])) is known
            assert f"localhost:{port}" in server._hosts([listening])
