"""
The daemon: opens the doors, lets the service answer, listens to signals and to the service manager.

What may be signed is decided in authorize, how a request must look in doors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from hsmtoll.errors import ConfigurationError, HsmTollError, PolicyDenied
from hsmtoll.host import doors, system
from hsmtoll.host.authorize import RequestContext
from hsmtoll.host.health import exposed
from hsmtoll.host.required import check_complete, needed
from hsmtoll.host.service import Service
from hsmtoll.hsm.protect import keep_secrets_in_memory

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine

    from hsmtoll.host.peers import Peer
    from hsmtoll.settings import Host, Settings

__all__ = ["serve"]

_log = logging.getLogger("hsmtoll.host")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Seconds between two rounds of housekeeping, and of self-tests.
_LOOK: Final = 1.0
#: Seconds that a caller waits for the first self-test.
_FIRST: Final = 15.0


def serve(
    settings: Settings,
    *,
    config: str | os.PathLike[str] | None = None,
    profile: str | None = None,
    ready: Callable[[], None] = lambda: None,
    synchronised: Callable[[], bool] = system.clock_is_synchronised,
) -> int:
    """
    Serve until SIGTERM or SIGINT. *ready* is called once, when grants can be had.

    *config* and *profile* are those that the settings came from. Raises ConfigurationError and
    AuditBroken for what keeps it from starting; a device that is down does not.
    """
    keep_secrets_in_memory()
    system.heads_to_system_log(logging.getLogger("hsmtoll.audit"))
    check_complete(settings.host, sockets="LISTEN_FDS" in os.environ)
    opened = _Doors(settings.host)
    try:
        service = Service(
            settings,
            config=config,
            profile=profile,
            synchronised=synchronised,
            progress=_still_starting,
        )
    except HsmTollError:
        opened.close()
        raise
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        asyncio.run(_Host(service, opened, ready, patience=settings.deadline).run())
    finally:
        opened.close()
        service.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _on_signal(number: signal.Signals, act: Callable[[], object]) -> None:
    """
    Have the running loop call *act*. Unlike the loop's own handler this one outlives the loop: a
    second signal ends nothing in the middle of what is put away.
    """
    loop = asyncio.get_running_loop()

    def handler(*_: object) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(act)

    signal.signal(number, handler)


def _still_starting() -> None:
    """A day's records may take longer to read than the manager waits for a start."""
    system.notify("EXTEND_TIMEOUT_USEC=30000000")


class _Doors:
    """The listening sockets: those that the service manager gave, else those of the settings."""

    def __init__(self, host: Host) -> None:
        self.signing: list[socket.socket] = []
        self.tls: list[socket.socket] = []
        self.metrics: list[socket.socket] = []
        self._host = host
        # With the inode: by the same name there may be another host's one day.
        self._made: dict[socket.socket, tuple[Path, int]] = {}
        self.context: ssl.SSLContext | None = None
        try:
            self._open()
        except HsmTollError:
            self.close()
            raise

    def _open(self) -> None:
        host = self._host
        for given in system.given_sockets():
            if given.name == "metrics":
                self.metrics.append(given.socket)
            elif given.socket.family == socket.AF_UNIX:
                self.signing.append(given.socket)
            else:
                self.tls.append(given.socket)
        if host.socket is not None and not self.signing:
            self.signing.append(self._unix(host.socket, "HSMTOLL_HOST__SOCKET"))
        if host.listen is not None and not self.tls:
            self.tls.append(doors.listen_tcp(host.listen, "HSMTOLL_HOST__LISTEN"))
        if self.tls:
            self.context = self._context()
        if host.metrics is not None and not self.metrics:
            self.metrics.append(self._metrics(host.metrics))
        if not self.signing and not self.tls:
            check_complete(host, sockets=False)

    def _metrics(self, where: str) -> socket.socket:
        if where.startswith("unix://"):
            return self._unix(Path(where.removeprefix("unix://")), "HSMTOLL_HOST__METRICS")
        return doors.listen_tcp(where, "HSMTOLL_HOST__METRICS", local=True)

    def _unix(self, path: Path, name: str) -> socket.socket:
        one = doors.listen_unix(path, name)
        self._made[one] = (path, path.lstat().st_ino)
        return one

    def _context(self) -> ssl.SSLContext:
        host = self._host
        return doors.server_context(
            needed(host.cert, "cert"),
            needed(host.key, "key"),
            needed(host.client_ca, "client_ca"),
            host.client_crl,
        )

    def reload(self) -> None:
        """The certificates and revocation lists again; those in use go on if that fails."""
        if self.context is None:
            return
        try:
            self.context = self._context()
        except HsmTollError as exc:
            _log.error("certificates not reloaded, those in use go on: %s", exc)

    def tls_context(self) -> ssl.SSLContext:
        """The one in use."""
        if self.context is None:
            raise ConfigurationError("no TLS is set up")
        return self.context

    def withdraw(self, listening: list[socket.socket]) -> None:
        """
        Remove those of *listening* that were made here, while they still listen: as long as they
        do, another host takes neither their names nor their inodes.
        """
        for one in listening:
            path, inode = self._made.pop(one, (None, 0))
            with contextlib.suppress(OSError):
                if path is not None and path.lstat().st_ino == inode:
                    path.unlink()

    def close(self) -> None:
        """Close all, and remove the sockets that were made here."""
        for one in (*self.signing, *self.tls, *self.metrics):
            self.withdraw([one])
            one.close()


class _Host:
    """What runs on the event loop: sockets, signals, timers, and the service behind them."""

    def __init__(
        self, service: Service, opened: _Doors, ready: Callable[[], None], *, patience: float
    ) -> None:
        self._service = service
        self._opened = opened
        self._ready = ready
        self._patience = patience
        self._signing: tuple[doors.Door, ...] = ()
        self._told_ready = False
        self._why: list[str] = []
        self._reloads = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tested = asyncio.Event()

    async def run(self) -> None:
        """Until a signal ends it."""
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            _on_signal(number, ended.set)
        _on_signal(signal.SIGHUP, lambda: self._start(self._reload()))
        opened = self._opened
        own = [doors.Door(each, self._health, peers_known=False) for each in opened.metrics]
        signing = [doors.Door(each, self._answer) for each in opened.signing]
        signing += [doors.Door(each, self._answer, tls=opened.tls_context) for each in opened.tls]
        self._signing = tuple(signing)
        for door in (*own, *signing):
            door.open()
        self._start(self._housekeeping())
        self._start(self._self_test())
        self._start(self._watchdog())
        await ended.wait()
        system.notify("STOPPING=1")
        self._service.authorizer.ending = True
        opened.withdraw(opened.signing)
        await asyncio.gather(*(door.close(patience=self._patience) for door in signing))
        opened.withdraw(opened.metrics)
        await asyncio.gather(*(door.close(patience=0) for door in own))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._service.requests.finish()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ requests

    async def _answer(
        self, request: web.BaseRequest, peer: Peer | PolicyDenied | None
    ) -> web.Response:
        mode, ask = await doors.read_ask(request)
        doors.complete(request)
        if peer is None or isinstance(peer, PolicyDenied):
            denied = peer or PolicyDenied("caller: nobody knows who it is", code="caller-unknown")
            self._service.authorizer.refuse(denied, "unknown")
            raise denied
        transport = request.transport

        def gone() -> bool:
            return transport is None or transport.is_closing()

        if not self._tested.is_set():
            # Who comes to a socket that the manager holds is there before the first self-test.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST):
                    await self._tested.wait()
        context = RequestContext(peer, ask, mode, gone)
        # A request that has begun goes on when its connection is closed.
        return doors.answer(await asyncio.shield(self._service.requests.begin(context)))

    async def _health(self, request: web.BaseRequest, peer: object) -> web.Response:
        del peer
        doors.complete(request)
        if request.method == "GET":
            match request.raw_path:
                case "/live":
                    return doors.answer({"live": True})
                case "/ready":
                    why = self._service.health.not_ready()
                    return doors.answer({"ready": not why, "why": why}, status=503 if why else 200)
                case "/metrics":
                    numbers = self._service.health.numbers()
                    dropped = sum(each.dropped for each in self._signing)
                    numbers["connections_dropped_total"] = float(dropped)
                    return web.Response(text=exposed(numbers), content_type="text/plain")
        raise doors.Refused(404, "not_found", "no such page", "GET /live, /ready or /metrics")

    # ------------------------------------------------------------------ by itself

    async def _housekeeping(self) -> None:
        while True:
            try:
                await self._service.housekeeping()
            except HsmTollError as exc:
                _log.error("%s", exc)
                await asyncio.sleep(10 * _LOOK)
            await asyncio.sleep(_LOOK)

    async def _self_test(self) -> None:
        patience = _FIRST
        while True:
            await self._service.profiles.self_test(patience)
            self._tested.set()
            patience = _LOOK
            why = self._service.health.not_ready()
            self._log_changes(why)
            if not self._told_ready:
                if why:
                    # A device that is down at the start of the machine is waited for.
                    system.notify(f"STATUS=not ready: {why[0]}", "EXTEND_TIMEOUT_USEC=30000000")
                else:
                    self._told_ready = True
                    system.notify("READY=1", "STATUS=signing")
                    _log.info("ready")
                    self._ready()
            await asyncio.sleep(_LOOK)

    def _log_changes(self, why: list[str]) -> None:
        """Log each new reason why nothing can be signed, once, and that there is none any more."""
        for reason in why:
            if reason not in self._why:
                _log.warning("not ready: %s", reason)
        if self._why and not why and self._told_ready:
            _log.warning("ready again")
        self._why = why

    async def _watchdog(self) -> None:
        every = system.watchdog_seconds()
        while every is not None:
            # It proves the loop and the audit's thread, not only that time passes.
            await self._service.alive()
            system.notify("WATCHDOG=1")
            await asyncio.sleep(every)

    async def _reload(self) -> None:
        async with self._reloads:
            system.reloading()
            self._opened.reload()
            wrong = await self._service.reload()
            await self._service.profiles.self_test(_FIRST)
            system.notify(
                "READY=1", f"STATUS={'old policy kept: ' + wrong if wrong else 'signing'}"
            )
