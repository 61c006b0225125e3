"""
TollClient and AsyncTollClient: tokens and calls, for threads and for tasks.

A caller of either colour only waits for the one renewal. PKCS#11, the environment and argv
never enter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hsmtoll import apis
from hsmtoll.errors import ConfigurationError, UsageError, foreign
from hsmtoll.tokens import ANY, AccessToken, Wish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from types import TracebackType

    import httpx

    from hsmtoll.auth import AsyncTollAuth, TollAuth
    from hsmtoll.customs import Receipt, Talk
    from hsmtoll.keeper import Keeper
    from hsmtoll.metrics import Status
    from hsmtoll.renewal import Engine

__all__ = ["AsyncTollClient", "TollClient"]


class _Shared:
    """What the two colours have in common."""

    def __init__(self, engine: Engine, *, close: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._close = close
        self._keepers: list[Keeper] = []

    def status(self) -> Status:
        """How it stands; asks neither the device nor the network."""
        from hsmtoll.metrics import status_of  # noqa: PLC0415

        return status_of(self._engine)

    def keep_fresh(self, *scopes: str) -> Keeper:
        """
        Renew in the background before anybody has to wait, until stopped: for programs that
        run long. *scopes*: APIs or scopes; none means the default. UsageError for one that
        is not known.
        """
        from hsmtoll.keeper import Keeper  # noqa: PLC0415

        engine = self._engine
        keeper = Keeper(engine, [engine.request(scope) for scope in scopes or (None,)])
        self._keepers.append(keeper)
        return keeper

    def _let_go(self) -> None:
        while self._keepers:
            self._keepers.pop().stop()
        self._close()

    def _wish(self, min_life: float, *, renew: bool) -> Wish:
        if not renew and not min_life:
            return ANY
        return Wish(min_life, since=self._engine.clock.now() if renew else None)

    def _target(self, name: str) -> tuple[str, str]:
        api = apis.named(name)
        scope = api.scope(self._engine.family)
        if not api.base:
            raise ConfigurationError(f"API {name}: a self-test at Maskinporten, nothing to call")
        return f"{self._engine.endpoints.customs}{api.base}", scope


class TollClient(_Shared):
    """
    Customs tokens and calls, for threads. Opens nothing until asked for the first token.

    Every method raises the errors of `hsmtoll.errors`, each with its exit code and a hint.
    """

    def __init__(self, engine: Engine, *, close: Callable[[], None] = lambda: None) -> None:
        super().__init__(engine, close=close)
        self._clients: dict[tuple[str, int], httpx.Client] = {}

    def token(
        self, scope: str | None = None, *, min_life: float = 0.0, renew: bool = False
    ) -> AccessToken:
        """
        A Customs token that is not expired, for an API's name or a scope.

        *min_life*: seconds it shall live at least. *renew*: a new one, whatever is held.
        """
        engine = self._engine
        return engine.token(engine.request(scope), self._wish(min_life, renew=renew))

    def auth(self, scope: str | None = None) -> TollAuth:
        """httpx.Auth that puts the token on requests to Customs' own origin, and nowhere else."""
        from hsmtoll.auth import TollAuth  # noqa: PLC0415 - a cached token needs no HTTP

        return TollAuth(self._engine, self._engine.request(scope))

    def api(self, name: str) -> httpx.Client:
        """An httpx.Client for the API called *name*: base URL, bearer, proxy, CA."""
        import httpx  # noqa: PLC0415

        base, scope = self._target(name)
        return httpx.Client(base_url=base, auth=self.auth(scope), **self._engine.wire.options())

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One call; the scope is found from *path*. Arguments as for httpx.Client.request."""
        url = f"{self._engine.endpoints.customs}{path}"
        return self._kept(apis.api_of_path(path).name).request(method, url, **request)

    def _kept(self, name: str) -> httpx.Client:
        """One client an API, so that 500 submissions do not make 500 connections."""
        # A child of fork has its own: a TLS connection cannot be shared.
        key = (name, os.getpid())
        return self._clients.get(key) or self._clients.setdefault(key, self.api(name))

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
    ) -> Receipt:
        """A submission and its result: see `hsmtoll.customs.submission`. *json*: the message."""
        from hsmtoll import customs  # noqa: PLC0415

        talk = customs.submission(
            apis.named(api), method, level, json, mrn=mrn, patience=patience, accepted=accepted
        )
        return self._speak(api, talk)

    def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> Receipt:
        """A document to a declaration, checked before it is sent: see `hsmtoll.customs.upload`."""
        from hsmtoll import customs  # noqa: PLC0415

        path = Path(file)
        talk = customs.upload(declaration_id, path.name, _content(path), document_type)
        return self._speak("document", talk)

    def _speak(self, api: str, talk: Talk) -> Receipt:
        from hsmtoll import customs  # noqa: PLC0415

        engine = self._engine
        client = self._kept(api)
        return customs.spoken(talk, client, engine.endpoints.customs, engine.clock.sleep)

    def routing(
        self, marker: str | os.PathLike[str], *, level: str = "house-consignment"
    ) -> Iterator[tuple[Any, ...]]:
        """Routing signals in batches; *marker* is the file that says how far they were taken."""
        from hsmtoll import customs  # noqa: PLC0415

        clock = self._engine.clock
        with self.api("routing") as client:
            yield from customs.routing(
                client, level, customs.Marker(Path(marker)), now=lambda: clock.now().wall
            )

    def close(self) -> None:
        """Let go of the device and the connections. Living tokens of a shared cache live on."""
        while self._clients:
            self._clients.popitem()[1].close()
        self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncTollClient(_Shared):
    """As TollClient, for tasks: what is held is given at once, and waiting holds no thread."""

    def __init__(self, engine: Engine, *, close: Callable[[], None] = lambda: None) -> None:
        super().__init__(engine, close=close)
        self._clients: dict[tuple[str, int], httpx.AsyncClient] = {}

    async def token(
        self, scope: str | None = None, *, min_life: float = 0.0, renew: bool = False
    ) -> AccessToken:
        """As TollClient.token."""
        engine = self._engine
        return await engine.atoken(engine.request(scope), self._wish(min_life, renew=renew))

    def auth(self, scope: str | None = None) -> AsyncTollAuth:
        """As TollClient.auth."""
        from hsmtoll.auth import AsyncTollAuth  # noqa: PLC0415

        return AsyncTollAuth(self._engine, self._engine.request(scope))

    def api(self, name: str) -> httpx.AsyncClient:
        """As TollClient.api."""
        import httpx  # noqa: PLC0415

        base, scope = self._target(name)
        return httpx.AsyncClient(
            base_url=base, auth=self.auth(scope), **self._engine.wire.options()
        )

    async def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """As TollClient.call."""
        url = f"{self._engine.endpoints.customs}{path}"
        return await self._kept(apis.api_of_path(path).name).request(method, url, **request)

    def _kept(self, name: str) -> httpx.AsyncClient:
        # Connections belong to the loop that they were made in.
        import asyncio  # noqa: PLC0415

        key = (name, id(asyncio.get_running_loop()))
        return self._clients.get(key) or self._clients.setdefault(key, self.api(name))

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
    ) -> Receipt:
        """As TollClient.submit."""
        from hsmtoll import customs  # noqa: PLC0415

        talk = customs.submission(
            apis.named(api), method, level, json, mrn=mrn, patience=patience, accepted=accepted
        )
        return await self._speak(api, talk)

    async def upload(
        self, declaration_id: str, file: str | os.PathLike[str], *, document_type: str
    ) -> Receipt:
        """As TollClient.upload."""
        from hsmtoll import customs  # noqa: PLC0415

        path = Path(file)
        talk = customs.upload(declaration_id, path.name, _content(path), document_type)
        return await self._speak("document", talk)

    async def _speak(self, api: str, talk: Talk) -> Receipt:
        from hsmtoll import customs  # noqa: PLC0415

        origin = self._engine.endpoints.customs
        import asyncio  # noqa: PLC0415

        return await customs.aspoken(talk, self._kept(api), origin, asyncio.sleep)

    async def routing(
        self, marker: str | os.PathLike[str], *, level: str = "house-consignment"
    ) -> AsyncIterator[tuple[Any, ...]]:
        """As TollClient.routing."""
        from hsmtoll import customs  # noqa: PLC0415

        clock = self._engine.clock
        async with self.api("routing") as client:
            feed = customs.arouting(
                client, level, customs.Marker(Path(marker)), now=lambda: clock.now().wall
            )
            async for batch in feed:
                yield batch

    async def aclose(self) -> None:
        """As TollClient.close."""
        while self._clients:
            await self._clients.popitem()[1].aclose()
        self._let_go()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"upload of {foreign(path)}: cannot be read ({exc.strerror})") from exc
