"""
The daemon: signals, timers, the pages for monitoring and the service manager's protocol.

Authorization is in `authorize`, the limits of connections in `connections`, the syntax of requests
in `messages`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING, Final

from aiohttp import web

from hsmtoll.errors import HsmTollError, PolicyDenied
from hsmtoll.host import messages, status_page, system
from hsmtoll.host.authorize import RequestContext
from hsmtoll.host.connections import Listener, mark_complete
from hsmtoll.host.places import Limits
from hsmtoll.host.required import check_complete
from hsmtoll.host.service import Service
from hsmtoll.host.sockets import ListeningSockets
from hsmtoll.hsm.protect import keep_secrets_in_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hsmtoll.host.health import Reason
    from hsmtoll.host.measures import Asked
    from hsmtoll.host.peers import Peer
    from hsmtoll.settings import Settings

__all__ = ["serve"]

_log = logging.getLogger("hsmtoll.host")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Seconds between two rounds of housekeeping, and of self-tests that are due.
_INTERVAL: Final = 1.0
#: Seconds that requests and the service manager wait for the first self-test.
_SELF_TEST_WAIT: Final = 15.0


def serve(
    settings: Settings,
    *,
    config: str | os.PathLike[str] | None = None,
    profile: str | None = None,
    ready: Callable[[], None] = lambda: None,
    synchronised: Callable[[], bool] = system.clock_is_synchronised,
) -> int:
    """
    Serve until SIGTERM or SIGINT. *ready* is called once, as soon as grants can be signed.

    *config* and *profile* are those that the settings came from. Raises ConfigurationError or
    AuditBroken if the host cannot start. A device that is down does not prevent the start.
    """
    keep_secrets_in_memory()
    system.heads_to_system_log(logging.getLogger("hsmtoll.audit"))
    check_complete(settings.host, sockets="LISTEN_FDS" in os.environ)
    listening = ListeningSockets(settings.host)
    try:
        service = Service(
            settings,
            config=config,
            profile=profile,
            synchronised=synchronised,
            progress=_still_starting,
        )
    except HsmTollError:
        listening.close()
        raise
    host = settings.host
    limits = Limits(host.connections, host.connections_per_caller, settings.deadline)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        asyncio.run(_Daemon(service, listening, limits, ready).run())
    finally:
        listening.close()
        service.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _on_signal(number: signal.Signals, act: Callable[[], object]) -> None:
    """
    Call *act* on the running loop for signal *number*. Unlike the loop's own handler this one
    stays after the loop has ended, so that a second signal does not interrupt the cleanup.
    """
    loop = asyncio.get_running_loop()

    def handler(*_: object) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(act)

    signal.signal(number, handler)


def _still_starting() -> None:
    """Extend the service manager's start timeout: reading a day of records may take longer."""
    system.notify("EXTEND_TIMEOUT_USEC=30000000")


class _Daemon:
    """The tasks on the event loop: listeners, signals and timers around the service."""

    def __init__(
        self,
        service: Service,
        listening: ListeningSockets,
        limits: Limits,
        ready: Callable[[], None],
    ) -> None:
        self._service = service
        self._sockets = listening
        self._limits = limits
        self._ready = ready
        self._signing: tuple[Listener, ...] = ()
        self._ready_sent = False
        self._why: list[Reason] = []
        self._reloads = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tested = asyncio.Event()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            _on_signal(number, ended.set)
        _on_signal(signal.SIGHUP, lambda: self._start_task(self._reload()))
        listening, limits = self._sockets, self._limits
        metrics = [
            Listener(each, self._health, limits, peers_known=False) for each in listening.metrics
        ]
        signing = [
            Listener(each, self._answer, limits, refused=self._refused)
            for each in listening.signing
        ]
        signing += [
            Listener(each, self._answer, limits, tls=listening.tls_context, refused=self._refused)
            for each in listening.tls
        ]
        self._signing = tuple(signing)
        for listener in (*metrics, *signing):
            listener.open()
        self._start_task(self._housekeeping())
        self._start_task(self._self_test())
        self._start_task(self._watchdog())
        await ended.wait()
        system.notify("STOPPING=1")
        self._service.authorizer.ending = True
        listening.remove_created(listening.signing)
        await asyncio.gather(*(listener.close(grace=limits.max_wait) for listener in signing))
        listening.remove_created(listening.metrics)
        await asyncio.gather(*(listener.close(grace=0) for listener in metrics))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._service.requests.finish()

    def _start_task(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ requests

    async def _answer(
        self, request: web.BaseRequest, peer: Peer | PolicyDenied | None
    ) -> web.Response:
        with self._service.measures.request() as asked:
            return await self._authorized(request, peer, asked)

    async def _authorized(
        self, request: web.BaseRequest, peer: Peer | PolicyDenied | None, asked: Asked
    ) -> web.Response:
        mode, grant_request = await messages.read_request(request)
        asked.mode = mode
        mark_complete(request)
        if peer is None or isinstance(peer, PolicyDenied):
            denied = peer or PolicyDenied(
                "caller: its identity is not known", code="caller-unknown"
            )
            self._service.authorizer.refuse(denied, "unknown")
            raise denied
        asked.authenticated(self._service.profiles.policy, peer, grant_request.profile)
        transport = request.transport

        def disconnected() -> bool:
            return transport is None or transport.is_closing()

        if not self._tested.is_set():
            # With socket activation, requests may wait in the socket before the host has started.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SELF_TEST_WAIT):
                    await self._tested.wait()
        context = RequestContext(peer, grant_request, mode, disconnected)
        # Shielded: a request that has begun is finished even if its client disconnects.
        return messages.json_reply(await asyncio.shield(self._service.requests.begin(context)))

    async def _health(self, request: web.BaseRequest, peer: object) -> web.Response:
        del peer
        mark_complete(request)
        if not self._sockets.metrics_public:
            messages.check_host(request.headers.get("Host", ""))
        pages = {
            "/": self._status_page,
            "/live": self._live,
            "/ready": self._readiness,
            "/metrics": self._metrics,
        }
        # Prometheus and probes may add a query.
        page = pages.get(request.rel_url.raw_path)
        if page is None:
            raise messages.not_found("GET /, /live, /ready or /metrics")
        if request.method not in ("GET", "HEAD"):
            raise messages.wrong_method(request, "GET, HEAD")
        return page(request)

    def _refused(self, reason: str) -> None:
        self._service.measures.connections_refused.labels(reason).inc()

    def _status_page(self, request: web.BaseRequest) -> web.Response:
        del request
        headers = {**messages.HEADERS, **status_page.HEADERS}
        return web.Response(text=self._service.status_page(), headers=headers)

    def _live(self, request: web.BaseRequest) -> web.Response:
        del request
        return messages.json_reply({"live": True})

    def _readiness(self, request: web.BaseRequest) -> web.Response:
        del request
        why = self._service.health.not_ready()
        return messages.json_reply({"ready": not why, "why": why}, status=503 if why else 200)

    def _metrics(self, request: web.BaseRequest) -> web.Response:
        shown, kind = self._service.measures.exposition(request.headers.get("Accept", ""))
        return web.Response(body=shown, headers={**messages.HEADERS, "Content-Type": kind})

    # ------------------------------------------------------------------ background tasks

    async def _housekeeping(self) -> None:
        while True:
            try:
                await self._service.housekeeping()
            except HsmTollError as exc:
                _log.error("%s", exc, extra={"event": exc.code})
                await asyncio.sleep(10 * _INTERVAL)
            await asyncio.sleep(_INTERVAL)

    async def _self_test(self) -> None:
        timeout = _SELF_TEST_WAIT
        while True:
            await self._service.profiles.self_test(timeout)
            self._tested.set()
            timeout = _INTERVAL
            why = list(self._service.health.reasons())
            self._log_changes(why)
            if not self._ready_sent:
                if why:
                    # Extend the start timeout: the device may come up later than this machine.
                    system.notify(
                        f"STATUS=not ready: {why[0].text}", "EXTEND_TIMEOUT_USEC=30000000"
                    )
                else:
                    self._ready_sent = True
                    system.notify("READY=1", "STATUS=signing")
                    self._ready()
            await asyncio.sleep(_INTERVAL)

    def _log_changes(self, why: list[Reason]) -> None:
        """Log each new reason for not being ready once, and log when none is left."""
        for reason in why:
            if reason not in self._why:
                extra = {"event": "not-ready", "profile": reason.profile}
                _log.warning("not ready: %s", reason.text, extra=extra)
        if self._why and not why and self._ready_sent:
            _log.warning("ready again", extra={"event": "ready"})
        self._why = why

    async def _watchdog(self) -> None:
        every = system.watchdog_seconds()
        while every is not None:
            # Checks that the event loop and the audit's thread respond.
            await self._service.alive()
            system.notify("WATCHDOG=1")
            await asyncio.sleep(every)

    async def _reload(self) -> None:
        async with self._reloads:
            system.reloading()
            self._sockets.reload()
            for listener in self._signing:
                listener.close_outdated()
            wrong = await self._service.reload()
            await self._service.profiles.self_test(_SELF_TEST_WAIT)
            system.notify(
                "READY=1", f"STATUS={'old policy kept: ' + wrong if wrong else 'signing'}"
            )
