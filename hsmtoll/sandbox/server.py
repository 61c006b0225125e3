"""
The sandbox's HTTPS servers: three local ports, a CA of their own, an event loop in a thread.

Maskinporten, Customs and the admin endpoint have one port each: the real services are different
origins, between which a token must not leak, and one can be down while the others work.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import ssl
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from hsmtoll.sandbox.admin import Admin, read_body
from hsmtoll.sandbox.fault_effects import Gates, corrupted, replacement, send
from hsmtoll.sandbox.faults import Fault, Faults
from hsmtoll.sandbox.pki import Authority, issue_tls, pem, tls_authority
from hsmtoll.sandbox.rules import TABLE
from hsmtoll.sandbox.services import EXCHANGE, Reply, Request, Services
from hsmtoll.sandbox.settings import PROFILES, Profile, Settings
from hsmtoll.sandbox.state import NORWEGIAN_SCOPES, Anchor, Client, Received, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from aiohttp.web_request import BaseRequest
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa

__all__ = ["Sandbox"]

Side = Literal["maskinporten", "customs", "admin"]


class Sandbox:
    """
    A local Maskinporten and Customs, as a context manager.

        with Sandbox(trust=[authority]) as sandbox:
            os.environ.update(sandbox.environ())

    *profile* and keywords of `Settings` choose how strict it is; *clock* returns epoch seconds;
    *trust* holds authorities or CA certificates, *clients* Norwegian clients. *host* is the
    address to listen on, *names* what the TLS certificate is good for (the first is used in
    URLs), *ports* those of Maskinporten, Customs and admin (0: any free one).

    Public parts: `issuer`, `token_endpoint`, `customs`, `admin`, `admin_secret`, `ca_file`,
    `faults`, `received`, `state`.
    """

    def __init__(
        self,
        *,
        profile: Profile = "strict-docs",
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        trust: Iterable[Authority | x509.Certificate] = (),
        clients: Iterable[Client] = (),
        host: str = "127.0.0.1",
        names: Sequence[str] = ("localhost", "127.0.0.1", "::1"),
        ports: tuple[int, int, int] = (0, 0, 0),
        **changes: Any,
    ) -> None:
        chosen = replace(settings or PROFILES[profile], **changes)
        if unknown := chosen.without - set(TABLE):
            raise ValueError(f"no such rule: {', '.join(sorted(unknown))}")
        self.settings = chosen
        self.state = State()
        self.faults = Faults()
        self.admin_secret = secrets.token_urlsafe(24)
        self._clock, self._host, self._names = clock, host, tuple(names)
        self._ports = dict(zip(("maskinporten", "customs", "admin"), ports, strict=True))
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._failed: BaseException | None = None
        self._folder = Path()
        self._runners: dict[str, web.ServerRunner] = {}
        self._sites: dict[str, web.TCPSite] = {}
        self._tls: ssl.SSLContext | None = None
        self._gates = Gates()
        self._admin = Admin(self.state, self.faults, self.admin_secret, self._apply_refusals)
        self._services = Services(chosen, self.state, clock)
        self._services.offset = self._offset
        for authority in trust:
            self.trust(authority)
        for client in clients:
            self.register_client(client)

    # --- what tests and the command line use --------------------------------------------------

    @property
    def issuer(self) -> str:
        """Maskinporten's issuer identifier, with its trailing slash."""
        return self._services.issuer

    @property
    def token_endpoint(self) -> str:
        """Maskinporten's token endpoint."""
        return f"{self.issuer}token"

    @property
    def customs(self) -> str:
        """The origin of Customs, without a slash."""
        return self._services.customs

    @property
    def exchange_endpoint(self) -> str:
        """Customs' token endpoint."""
        return f"{self.customs}{EXCHANGE}"

    @property
    def admin(self) -> str:
        """The admin endpoint's origin; it requires ``Authorization: Bearer <admin_secret>``."""
        return f"https://{self._names[0]}:{self._ports['admin']}"

    @property
    def ca_file(self) -> Path:
        """PEM of the CA behind its TLS certificates."""
        return self._folder / "ca.pem"

    @property
    def received(self) -> list[Received]:
        """The requests received so far, oldest first."""
        with self.state.lock:
            return list(self.state.received)

    def environ(self) -> dict[str, str]:
        """The environment variables with which hsmtoll uses this sandbox."""
        return {
            "HSMTOLL_ENVIRONMENT": "sandbox",
            "HSMTOLL_ENDPOINTS__ISSUER": self.issuer,
            "HSMTOLL_ENDPOINTS__TOKEN": self.token_endpoint,
            "HSMTOLL_ENDPOINTS__CUSTOMS": self.customs,
            "HSMTOLL_CA_FILE": str(self.ca_file),
        }

    def admin_environ(self) -> dict[str, str]:
        """The environment variables for the admin endpoint."""
        return {"SANDBOX_ADMIN": self.admin, "SANDBOX_ADMIN_SECRET": self.admin_secret}

    def trust(
        self,
        authority: Authority | x509.Certificate,
        *,
        environment: Literal["test", "prod"] | None = None,
    ) -> None:
        """Puts a root (or any CA) on the trust list; of an `Authority` also its intermediate."""
        with self.state.lock:
            if isinstance(authority, Authority):
                only = authority.environment if authority.kind == "norwegian" else None
                self.state.anchors.append(Anchor(authority.root, environment or only))
                self.state.pinned.append(authority.intermediate)
            else:
                self.state.anchors.append(Anchor(authority, environment))

    def register_client(
        self,
        client: Client | str,
        *,
        org_no: str = "987654325",
        scopes: Iterable[str] = NORWEGIAN_SCOPES,
        keys: Mapping[str, rsa.RSAPublicKey] | None = None,
    ) -> Client:
        """Registers a Norwegian client; *keys* (kid to public key) count as posted just now."""
        if isinstance(client, str):
            posted = self._clock()
            dated = {kid: (key, posted) for kid, key in (keys or {}).items()}
            client = Client(client, org_no, frozenset(scopes), dated)
        with self.state.lock:
            self.state.clients[client.client_id] = client
        return client

    def allow(self, org: str, *scopes: str) -> None:
        """Grant *scopes* to *org*, in addition to earlier calls; others are refused (M65)."""
        with self.state.lock:
            self.state.allowed.setdefault(org, set()).update(scopes)

    def delegate(self, consumer_org: str, supplier: str, *scopes: str) -> None:
        """Delegate *scopes* of *consumer_org* to *supplier* (without that: MP-251)."""
        self.state.delegate(consumer_org, supplier, scopes)

    def revoke(self, certificate: x509.Certificate) -> None:
        """Puts a certificate on the revocation list (M30)."""
        with self.state.lock:
            self.state.revoked.add(certificate.serial_number)

    def signal(self, org: str, routing: str = "TO_ENTRY", **members: Any) -> str:
        """Adds an item to *org*'s routing feed and returns its marker."""
        marker = str(uuid.uuid4())
        item = {**members, "routingResult": {"id": marker, "routing": routing}}
        with self.state.lock:
            self.state.signals.append((org, item))
        return marker

    # --- start and stop ---------------------------------------------------------------------

    def start(self) -> Self:
        """Start the servers; return when they listen. Raises OSError if a port is taken."""
        self._folder = Path(tempfile.mkdtemp(prefix="hsmtoll-sandbox-"))
        self._tls = self._tls_context()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="sandbox", daemon=True
        )
        self._thread.start()
        ready.wait()
        if self._failed is not None:
            self.stop()
            raise self._failed
        return self

    def stop(self) -> None:
        """Stop the servers and remove the files. A second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._stopping is not None and thread.is_alive():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def refresh(self) -> None:
        """Close or reopen the ports after ``refuse`` faults were set or cleared."""
        if self._loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._apply_refusals(), self._loop).result()

    def fault(
        self,
        name: str,
        endpoint: str = "*",
        *,
        times: int | None = None,
        after: int = 0,
        **options: Any,
    ) -> Fault:
        """As `Faults.set`; in force when it returns."""
        fault = self.faults.set(name, endpoint, times=times, after=after, **options)
        self.refresh()
        return fault

    def clear_faults(self) -> None:
        """Clear all faults; in force when it returns."""
        self.faults.clear()
        self.refresh()

    def _tls_context(self) -> ssl.SSLContext:
        ca, _ = tls_authority()
        certificate, key = issue_tls(self._names)
        self.ca_file.write_bytes(pem(ca))
        both = self._folder / "server.pem"
        both.touch(mode=0o600)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        both.write_bytes(secret + pem(certificate))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(both)
        return context

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that waits
            self._failed = error
        finally:
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        # Do not log failed handshakes: the client reports them.
        self._loop.set_exception_handler(lambda _, __: None)
        try:
            for side in ("maskinporten", "customs", "admin"):
                await self._listen(side)
            name = self._names[0]
            self._services.issuer = f"https://{name}:{self._ports['maskinporten']}/"
            self._services.customs = f"https://{name}:{self._ports['customs']}"
            ready.set()
            await self._stopping.wait()
        finally:
            for runner in self._runners.values():
                for connection in runner.server.connections if runner.server else ():
                    if connection.transport is not None:
                        connection.transport.abort()
                await runner.cleanup()
            # Aborted connections are closed in the next iterations of the loop.
            await asyncio.sleep(0.05)

    async def _listen(self, side: Side) -> None:
        handlers = {"maskinporten": self._maskinporten, "customs": self._customs}
        handler = handlers.get(side, self._admin.handle)
        server = web.Server(handler, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        self._runners[side] = runner
        site = web.TCPSite(
            runner, self._host, self._ports[side], ssl_context=self._tls, reuse_address=True
        )
        await site.start()
        self._sites[side] = site
        self._ports[side] = int(runner.addresses[0][1])

    async def _apply_refusals(self) -> None:
        closed = {
            "maskinporten": ("token", "metadata", "jwk", "health"),
            "customs": ("exchange", "api"),
        }
        sides: tuple[Side, ...] = ("maskinporten", "customs")
        for side in sides:
            refused = any(self.faults.standing("refuse", one) for one in closed[side])
            if refused and side in self._sites:
                del self._sites[side]
                await self._runners.pop(side).cleanup()
            elif not refused and side not in self._sites:
                await self._listen(side)

    def _offset(self, endpoint: str) -> float:
        fault = self.faults.standing("clock", endpoint)
        return fault.seconds(60) if fault else 0.0

    # --- requests ---------------------------------------------------------------------------

    async def _maskinporten(self, request: BaseRequest) -> web.StreamResponse:
        last = request.path.rpartition("/")[2]
        endpoint = {"token": "token", "jwk": "jwk", "health": "health"}.get(last, "metadata")
        return await self._handle(request, endpoint, self._services.maskinporten)

    async def _customs(self, request: BaseRequest) -> web.StreamResponse:
        endpoint = "exchange" if request.path == EXCHANGE else "api"
        return await self._handle(request, endpoint, self._services.customs_api)

    async def _handle(
        self, request: BaseRequest, endpoint: str, answer: Callable[[Request], Reply]
    ) -> web.StreamResponse:
        body = await read_body(request)
        if body is None:
            return web.Response(status=413)
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Request(request.method, request.raw_path, headers, body)
        fault = self._fault(endpoint, asked)
        ids = {"X-CorrelationID": str(uuid.uuid4()), "x-request-id": str(uuid.uuid4())}
        if fault:
            await self._delay(fault)
        early = replacement(fault, asked)
        with self.state.lock:
            reply = early or answer(asked)
            kind = {"token": "grant", "exchange": "exchange", "api": "call"}.get(endpoint)
            if kind:
                empty = Received(kind, asked.method, asked.target, reply.status)
                seen = reply.received or empty
                name = fault.name if fault else None
                shown = replace(seen, fault=name, correlation_id=ids["X-CorrelationID"])
                self.state.received.append(shown)
            if fault and fault.name == "401" and endpoint == "api":
                self.state.dead_tokens.add(headers.get("authorization", "").partition(" ")[2])
        reply = corrupted(fault, reply)
        extra = {"Date": formatdate(self._services.now(endpoint), usegmt=True)}
        if endpoint in {"exchange", "api"} and "T26" not in self.settings.without:
            extra |= ids
        return await send(request, reply, {**reply.headers, **extra}, fault)

    def _fault(self, endpoint: str, asked: Request) -> Fault | None:
        rule = "T27" if endpoint in {"exchange", "api"} else "M89"
        if rule in self.settings.without:
            return None
        return self.faults.take(endpoint, asked.path)

    async def _delay(self, fault: Fault) -> None:
        if fault.name == "slow":
            await asyncio.sleep(fault.seconds(2))
        elif fault.name == "rotate-keys":
            fault.seen += 1
            if fault.seen == 1:
                with self.state.lock:
                    self._services.rotate()
        elif fault.name == "hold":
            await self._gates.wait(fault)
