"""
TollClient and AsyncTollClient: sign, exchange, keep, retry.

The one renewal is written once, synchronously, and runs in a thread of the cache; a caller
of either colour only waits for it. PKCS#11, the environment and argv never enter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from hsmtoll import apis, exchange
from hsmtoll.clock import offset_of
from hsmtoll.errors import (
    ClockError,
    ConfigurationError,
    ExchangeRefused,
    HsmTollError,
    NetworkError,
    UsageError,
    foreign,
)
from hsmtoll.stores import name_of
from hsmtoll.tokens import AccessToken, TokenRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from types import TracebackType

    import httpx

    from hsmtoll.apis import Identity
    from hsmtoll.auth import AsyncTollAuth, TollAuth
    from hsmtoll.cache import Budget, Cache, Flight
    from hsmtoll.clock import Clock, Skew
    from hsmtoll.customs import Receipt, Talk
    from hsmtoll.exchange import Answer, Endpoints, Issued, Post
    from hsmtoll.signer import Signer
    from hsmtoll.wire import Wire

__all__ = ["AsyncTollClient", "Engine", "Status", "TollClient"]

_log = logging.getLogger("hsmtoll.client")

#: Seconds. A 401 on a younger token is not about its age, and a new one would change nothing.
_YOUNG: Final = 30.0


@dataclass(slots=True)
class _Known:
    """Who signs, as last seen: learned at first contact, so that a warm start needs no device."""

    path: Path | None
    value: str | None = field(default=None)

    def read(self) -> str | None:
        if self.value is None and self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                self.value = self.path.read_text(encoding="ascii").strip() or None
        return self.value

    def learn(self, value: str) -> None:
        if value == self.read():
            return
        self.value = value
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                draft = self.path.with_suffix(f".{os.getpid()}")
                draft.write_text(value, encoding="ascii")
                draft.chmod(0o600)
                draft.replace(self.path)


class Engine:
    """
    What both clients share: a request in, a living Customs token out.

    *selector* is the hash of all settings that select key, identity and endpoints; with the
    identity itself and the request it is the key of the cache (DESIGN 4.10).
    """

    def __init__(
        self,
        signer: Signer,
        *,
        endpoints: Endpoints,
        wire: Callable[[], Wire],
        cache: Cache,
        budget: Budget,
        clock: Clock,
        skew: Skew,
        selector: str,
        family: Identity,
        per_request: int = 2,
        default: TokenRequest | None = None,
        identity_file: Path | None = None,
    ) -> None:
        self.signer = signer
        self.endpoints = endpoints
        self._wire = wire
        self.cache = cache
        self.clock = clock
        self.family = family
        self._budget = budget
        self._skew = skew
        self._selector = selector
        self._per_request = per_request
        self._default = default
        self._known = _Known(identity_file)
        self._keys: dict[tuple[str | None, TokenRequest], str] = {}
        self.signatures = 0

    @cached_property
    def wire(self) -> Wire:
        """How the legs travel; made when the first one does."""
        return self._wire()

    def request(self, scope: str | None) -> TokenRequest:
        """What is asked for: an API or a scope, or the default; ConfigurationError without one."""
        default = self._default
        if scope is None:
            if default is None or not default.scope:
                raise ConfigurationError(
                    "HSMTOLL_SCOPE: required where no API or scope is named",
                    hint="set it to an API of `hsmtoll apis`, such as road",
                    code="setting-missing",
                )
            scope = default.scope
        named = apis.scope_of(scope, self.family)
        if default is None:
            return TokenRequest(named)
        return TokenRequest(named, default.resource, default.consumer_org)

    def knows(self) -> bool:
        """Whether the key of the cache is known without asking the device."""
        return self._known.read() is not None

    def key(self, request: TokenRequest) -> str:
        """The key of the cache for *request*; the device is asked who it is if nobody knows yet."""
        identity = self._known.read()
        if identity is None:
            identity = self.signer.identity()
            self._known.learn(identity)
        found = self._keys.get((identity, request))
        if found is None:
            found = name_of(
                self._selector,
                identity,
                request.scope,
                *request.resource,
                f"for {request.consumer_org}",
            )
            self._keys[identity, request] = found
        return found

    def fetch(self, request: TokenRequest) -> Callable[[Flight], AccessToken]:
        """What the cache calls when a token must be had: grant, both legs, within the budget."""

        def fetched(flight: Flight) -> AccessToken:
            import stamina  # noqa: PLC0415 - seldom needed, and a warm start should not pay

            for attempt in stamina.retry_context(
                on=_again,
                attempts=self._per_request,
                timeout=None,
                wait_initial=0.5,
                wait_max=5.0,
                wait_jitter=1.0,
            ):
                with attempt:
                    return self._attempt(request, flight)
            raise AssertionError  # the loop returns or raises

        return fetched

    def _attempt(self, request: TokenRequest, flight: Flight) -> AccessToken:
        """One grant, new from the ground: jti, signature, both legs (PROTOCOL C06, C12)."""
        flight.doing = "signing"
        self._known.learn(self.signer.identity())
        self._budget.spend(self._known.read() or "")
        self.signatures += 1
        assertion = self.signer.assertion(request)
        asked = self.clock.now()
        flight.doing = "Maskinporten"
        subject = self.granted(assertion)
        if request.scope == apis.SELF_TEST_SCOPE:
            raise self.self_test()
        flight.doing = "Customs"
        issued = self.exchanged(subject)
        lifetime = min(issued.expires_in, subject.expires_in)
        return AccessToken(issued.value, request.scope, asked, lifetime)

    @staticmethod
    def self_test() -> ExchangeRefused:
        """Where a grant for the self-test's scope ends: it worked, and opens nothing at Customs."""
        return ExchangeRefused(
            f"{apis.SELF_TEST_SCOPE}: Maskinporten granted it; stopped before the exchange",
            hint="this scope is a self-test and opens nothing at Customs: "
            "the key, its certificates and Maskinporten work together",
            code="self-test",
        )

    def granted(self, assertion: str) -> Issued:
        """Leg one; the answer's Date teaches the skew, which may call for another attempt."""
        from hsmtoll import jws  # noqa: PLC0415

        jti = jws.read_unverified(assertion)[1].get("jti")
        post = exchange.grant_post(self.endpoints, assertion)
        sent = self.clock.now()
        answer = self._leg(post, jti)
        offset = offset_of(answer.headers, sent=sent, received=self.clock.now())
        learned = offset is not None and self._skew.learn(offset)
        if learned:
            _log.warning(
                "clock: this machine is %.0f s %s Maskinporten; grants are corrected",
                abs(offset or 0),
                "behind" if (offset or 0) > 0 else "ahead of",
            )
        try:
            return exchange.read_subject(answer, post, jti=jti if isinstance(jti, str) else None)
        except HsmTollError as exc:
            about_time = isinstance(exc, ClockError) or exc.code == "MP-130"
            if about_time and offset is not None:
                self._skew.check(offset)
                exc.retryable = learned
            _when(exc, answer, self.clock)
            raise

    def exchanged(self, subject: Issued) -> Issued:
        """Leg two."""
        post = exchange.exchange_post(self.endpoints, subject)
        answer = self._leg(post, None)
        try:
            return exchange.read_issued(answer, post)
        except HsmTollError as exc:
            _when(exc, answer, self.clock)
            raise

    def _leg(self, post: Post, jti: object) -> Answer:
        began = self.clock.now()
        host = urlsplit(post.url).hostname
        try:
            answer = self.wire.post(post)
        except NetworkError as exc:
            _log.info("leg=%s host=%s failed=%s jti=%s", post.leg, host, exc.code, jti)
            raise
        _log.info(
            "leg=%s host=%s status=%d ms=%.0f jti=%s id=%s",
            post.leg,
            host,
            answer.status,
            (self.clock.now().boot - began.boot) * 1000,
            jti,
            foreign(answer.headers.get("x-correlationid", "-")),
        )
        return answer

    def worth_renewing(self, value: str, request: TokenRequest) -> bool:
        """
        Whether a 401 on the token *value* calls for a new one.

        Not if another caller has renewed it already (the new one is used instead), and not if
        it is younger than 30 s: then the API says no to something else (DESIGN 4.13).
        """
        held = self.cache.living(self.key(request))
        if held is None or held.value != value:
            return True
        now = self.clock.now()
        return held.lifetime - held.remaining(now) >= _YOUNG


def _again(exc: Exception) -> bool | float:
    if not isinstance(exc, HsmTollError) or not exc.retryable:
        return False
    if exc.retry_after is None:
        return True
    # A long wait is the caller's to decide about.
    return exc.retry_after + random.uniform(0, 0.5) if exc.retry_after <= 10 else False  # noqa: S311


def _when(exc: HsmTollError, answer: Answer, clock: Clock) -> None:
    if exc.retryable:
        exc.retry_after = exchange.retry_after(answer.headers, now=clock.now().wall)


@dataclass(frozen=True, slots=True)
class Status:
    """What an operator sees: callers *waiting* for a renewal, *signatures* spent by this client."""

    waiting: int
    signatures: int


class _Shared:
    """What the two colours have in common."""

    def __init__(self, engine: Engine, *, close: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._close = close

    def status(self) -> Status:
        """How it stands."""
        return Status(self._engine.cache.waiting(), self._engine.signatures)

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

    def token(
        self, scope: str | None = None, *, min_life: float = 0.0, renew: bool = False
    ) -> AccessToken:
        """
        A Customs token that is not expired, for an API's name or a scope.

        *min_life*: seconds it shall live at least. *renew*: a new one, whatever is held.
        """
        engine = self._engine
        request = engine.request(scope)
        key = engine.key(request)
        if not renew:
            held = engine.cache.held(key, min_life=min_life)
            if held is not None:
                return held
        avoid = _value(engine.cache.living(key)) if renew else None
        return engine.cache.get(key, engine.fetch(request), min_life=min_life, avoid=avoid)

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
        api = apis.api_of_path(path)
        with self.api(api.name) as client:
            return client.request(method, f"{self._engine.endpoints.customs}{path}", **request)

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
        with self.api(api) as client:
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
        """Let go of the device. Living tokens of a shared cache live on."""
        self._close()

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

    async def token(
        self, scope: str | None = None, *, min_life: float = 0.0, renew: bool = False
    ) -> AccessToken:
        """As TollClient.token."""
        engine = self._engine
        request = engine.request(scope)
        key = await self._key(request)
        if not renew:
            held = engine.cache.held(key, min_life=min_life)
            if held is not None:
                return held
        avoid = _value(engine.cache.living(key)) if renew else None
        return await engine.cache.aget(key, engine.fetch(request), min_life=min_life, avoid=avoid)

    async def _key(self, request: TokenRequest) -> str:
        engine = self._engine
        if engine.knows():
            return engine.key(request)
        import asyncio  # noqa: PLC0415

        # The device is asked who it is: that may take its time, and the loop has none.
        return await asyncio.to_thread(engine.key, request)

    def auth(self, scope: str | None = None) -> AsyncTollAuth:
        """As TollClient.auth."""
        from hsmtoll.auth import AsyncTollAuth  # noqa: PLC0415

        return AsyncTollAuth(self._engine, self._engine.request(scope), self._key)

    def api(self, name: str) -> httpx.AsyncClient:
        """As TollClient.api."""
        import httpx  # noqa: PLC0415

        base, scope = self._target(name)
        return httpx.AsyncClient(
            base_url=base, auth=self.auth(scope), **self._engine.wire.options()
        )

    async def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """As TollClient.call."""
        api = apis.api_of_path(path)
        async with self.api(api.name) as client:
            url = f"{self._engine.endpoints.customs}{path}"
            return await client.request(method, url, **request)

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
        import asyncio  # noqa: PLC0415

        from hsmtoll import customs  # noqa: PLC0415

        async with self.api(api) as client:
            return await customs.aspoken(
                talk, client, self._engine.endpoints.customs, asyncio.sleep
            )

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
        self._close()

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


def _value(token: AccessToken | None) -> str | None:
    return token.value if token is not None else None
