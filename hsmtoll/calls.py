"""
What both clients offer for calling Customs: one call, a submission, an upload, the routing feed.

Thin, and imported without HTTP: what a conversation says is in customs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hsmtoll import apis
from hsmtoll.errors import UsageError, foreign

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    import httpx

    from hsmtoll.customs import Receipt, Talk
    from hsmtoll.renewal import Engine

__all__ = ["AsyncCalls", "Calls"]


class Calls(Protocol):
    """For threads."""

    _engine: Engine
    # By API, and by process: a TLS connection cannot be shared with a child of fork.
    _clients: dict[tuple[str, int], tuple[httpx.Client, threading.Semaphore]]
    _given: list[httpx.Client]

    def api(self, name: str) -> httpx.Client:
        """An httpx.Client for the API called *name*."""

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """
        One call; the scope is found from *path*. Arguments as for httpx.Client.request.

        The answer is whole, of 64 MiB at most, and here within HSMTOLL_DEADLINE. Where none came:
        NetworkError for GET, HEAD, OPTIONS and for what was not sent, OutcomeUnknown for the rest.
        Its status is the caller's to look at. Threads wait for their turn, as many as there
        may be.
        """
        from hsmtoll import customs  # noqa: PLC0415 - HTTP is loaded for a call

        api = apis.api_of_path(path)
        url = f"{self._engine.endpoints.customs}{path}"
        try:
            return self._asked(api.name, method, url, **request)
        except customs.Lost as exc:
            raise customs.lost(exc, api, method) from exc

    def _asked(self, name: str, method: str, url: str, **request: Any) -> httpx.Response:
        from hsmtoll import customs  # noqa: PLC0415 - as above

        client, turn = self._kept(name)
        # Where hundreds wait in the pool itself, it now and then closes a connection that it has
        # just lent: that call would be lost, and a submission's fate unknown.
        with turn:
            return customs.asked(client, method, url, wire=self._engine.wire, **request)

    def _kept(self, name: str) -> tuple[httpx.Client, threading.Semaphore]:
        """One client an API, and a turn for each of its connections."""
        from hsmtoll import customs, wire  # noqa: PLC0415 - as above

        key = (name, os.getpid())
        if key not in self._clients:
            made = customs.bounded(self.api(name)), threading.Semaphore(wire.CONNECTIONS)
            self._clients.setdefault(key, made)
        return self._clients[key]

    def submit(
        self,
        api: str,
        method: str,
        level: str,
        *,
        json: Mapping[str, Any],
        mrn: str | None = None,
        patience: float = 120.0,
        accepted: Callable[[str], None] = lambda _: None,
        waiting: Callable[[float], None] = lambda _: None,
    ) -> Receipt:
        """A submission and its result: see `hsmtoll.customs.submission`. *json*: the message."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        talk = customs.submission(
            apis.named(api),
            method,
            level,
            json,
            mrn=mrn,
            now=lambda: self._engine.clock.now().boot,
            patience=patience,
            accepted=accepted,
            waiting=waiting,
        )
        return self._speak(api, talk)

    def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> Receipt:
        """A document to a declaration, checked before it is sent: see `hsmtoll.customs.upload`."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        path = Path(file)
        talk = customs.upload(declaration_id, path.name, _content(path), document_type)
        return self._speak("document", talk)

    def _speak(self, api: str, talk: Talk) -> Receipt:
        from hsmtoll import customs  # noqa: PLC0415 - as above

        engine = self._engine
        ask = partial(self._asked, api)
        return customs.spoken(talk, ask, engine.endpoints.customs, engine.clock.sleep)

    def routing(
        self, marker: str | os.PathLike[str], *, level: str = "house-consignment"
    ) -> Iterator[tuple[Any, ...]]:
        """Routing signals in batches; *marker* is the file that says how far they were taken."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        clock, wire = self._engine.clock, self._engine.wire
        at = customs.Marker(Path(marker))
        with customs.bounded(self.api("routing")) as client:
            yield from customs.routing(client, level, at, now=lambda: clock.now().wall, wire=wire)

    def _hang_up(self) -> None:
        self._clients.clear()
        while self._given:
            self._given.pop().close()


class AsyncCalls(Protocol):
    """For tasks."""

    _engine: Engine
    # By API, and by loop: connections belong to the loop that they were made in.
    _clients: dict[tuple[str, int], tuple[httpx.AsyncClient, asyncio.Semaphore]]
    _given: list[httpx.AsyncClient]

    def api(self, name: str) -> httpx.AsyncClient:
        """An httpx.AsyncClient for the API called *name*."""

    async def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """As TollClient.call; tasks wait for their turn, as many as there may be."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        api = apis.api_of_path(path)
        url = f"{self._engine.endpoints.customs}{path}"
        try:
            return await self._asked(api.name, method, url, **request)
        except customs.Lost as exc:
            raise customs.lost(exc, api, method) from exc

    async def _asked(self, name: str, method: str, url: str, **request: Any) -> httpx.Response:
        from hsmtoll import customs  # noqa: PLC0415 - as above

        client, turn = self._kept(name)
        # The pool looks through all that wait, each time that one is done.
        async with turn:
            return await customs.aasked(client, method, url, wire=self._engine.wire, **request)

    def _kept(self, name: str) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """One client an API, and a turn for each of its connections."""
        import asyncio  # noqa: PLC0415 - a token that is at hand needs none of it

        from hsmtoll import customs, wire  # noqa: PLC0415 - as above

        key = (name, id(asyncio.get_running_loop()))
        if key not in self._clients:
            made = customs.abounded(self.api(name)), asyncio.Semaphore(wire.CONNECTIONS)
            self._clients.setdefault(key, made)
        return self._clients[key]

    async def submit(
        self,
        api: str,
        method: str,
        level: str,
        *,
        json: Mapping[str, Any],
        mrn: str | None = None,
        patience: float = 120.0,
        accepted: Callable[[str], None] = lambda _: None,
        waiting: Callable[[float], None] = lambda _: None,
    ) -> Receipt:
        """As TollClient.submit."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        talk = customs.submission(
            apis.named(api),
            method,
            level,
            json,
            mrn=mrn,
            now=lambda: self._engine.clock.now().boot,
            patience=patience,
            accepted=accepted,
            waiting=waiting,
        )
        return await self._speak(api, talk)

    async def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> Receipt:
        """As TollClient.upload."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        path = Path(file)
        talk = customs.upload(declaration_id, path.name, _content(path), document_type)
        return await self._speak("document", talk)

    async def _speak(self, api: str, talk: Talk) -> Receipt:
        from hsmtoll import customs  # noqa: PLC0415 - as above

        origin = self._engine.endpoints.customs

        import asyncio  # noqa: PLC0415 - as above

        return await customs.aspoken(talk, partial(self._asked, api), origin, asyncio.sleep)

    async def routing(
        self, marker: str | os.PathLike[str], *, level: str = "house-consignment"
    ) -> AsyncIterator[tuple[Any, ...]]:
        """As TollClient.routing."""
        from hsmtoll import customs  # noqa: PLC0415 - as above

        clock, wire = self._engine.clock, self._engine.wire
        at = customs.Marker(Path(marker))
        async with customs.abounded(self.api("routing")) as client:
            feed = customs.arouting(client, level, at, now=lambda: clock.now().wall, wire=wire)
            async for batch in feed:
                yield batch

    async def _hang_up(self) -> None:
        self._clients.clear()
        while self._given:
            # One that was used in a loop that is over has no connection left to close.
            with contextlib.suppress(RuntimeError):
                await self._given.pop().aclose()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"upload of {foreign(path)}: cannot be read ({exc.strerror})") from exc
