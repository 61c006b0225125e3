"""
A signing host for tests: a real `hsmtoll serve` on a SoftHSM device, and callers of it.

The process, the sockets, the certificates and the other accounts are real; the judges of what it
gives are others' (joserfc, openssl), in the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import shutil
import signal as signals
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlencode

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from prometheus_client.parser import text_string_to_metric_families

from hsmtoll.host.audit_log import list_records
from hsmtoll.host.authorize import RequestContext
from hsmtoll.host.service import Service
from tests.kit.accounts import importable
from tests.kit.commands import ForkedCommand, fork, hsmtoll
from tests.kit.own_device import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self

    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import GrantRequest
    from hsmtoll.host.profiles import Profile
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults

_T = TypeVar("_T")

#: Seconds. Generous: what is waited for comes, or the test is wrong.
PATIENCE: Final = 60.0

ROAD: Final = {"profile": "acme", "scope": "road"}
ROAD_SCOPE: Final = "toll:eu/movement/road/v2"

CRLF: Final = "\r\n"

#: This account as the policy knows it.
ME: Final = f"uid:{os.geteuid()}"

#: The name in the certificate of a caller over TLS.
APP: Final = "app.example"

PROFILE: Final = """\
[profile.acme]
environment = "sandbox"
identity = "eseal"
"""


def entry(
    caller: str,
    *,
    profile: str = "acme",
    scopes: Sequence[str] = ("road",),
    mode: Sequence[str] = ("grant", "token"),
    **more: Any,
) -> str:
    """A caller's table in a policy; *more*: per_minute, per_day, consumer_org, resource."""
    members = {"scopes": list(scopes), "mode": list(mode), **more}
    options = ", ".join(f"{name} = {dumps(value)}" for name, value in members.items())
    return f'[caller."{caller}"]\nprofile.{profile} = {{ {options} }}\n'


#: What a host has unless a test wants something else.
POLICY: Final = "\n".join([PROFILE, entry(ME), entry(f"san:dns:{APP}")])


def eventually(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until it is *true*; what never is, fails the test."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)


def errors_in(stderr: str) -> list[str]:
    """
    The lines that are errors. Warnings are none: a host that runs as the account which owns its
    policy, as in most of these tests, warns of that, unless it is root's.
    """
    return [
        line
        for line in stderr.splitlines()
        if line.startswith("hsmtoll: ") and not line.startswith("hsmtoll: warning: ")
    ]


def raw_request(path: str = "/v1/grant", *, keep: bool = False, **members: Any) -> bytes:
    """One request for the road, as it goes over the wire; the last one, unless *keep*."""
    body = dumps({**ROAD, **members}).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{'' if keep else 'Connection: close' + CRLF}{CRLF}"
    ).encode() + body


@dataclass(frozen=True)
class Reply:
    """What a caller got."""

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str]

    @property
    def word(self) -> str:
        return str(self.body.get("error", ""))


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


def speak(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    **sent: Any,
) -> Reply:
    """As `exchange`, for the one request of *connection*."""
    with contextlib.closing(connection):
        return exchange(connection, method, path, **sent)


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    json: object = None,
    data: Mapping[str, str] | None = None,
    content: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A request and its reply; *json*, *data* (a form) or *content* as its body."""
    sent = dict(headers or {})
    if json is not None:
        content = dumps(json).encode()
        sent.setdefault("Content-Type", "application/json")
    if data is not None:
        content = urlencode(data).encode()
        sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
    connection.request(method, path, content or None, sent)
    response = connection.getresponse()
    reply = response.read()
    got = {name.lower(): value for name, value in response.getheaders()}
    kind = got.get("content-type", "")
    is_json = reply and kind.startswith("application/json")
    body = loads(reply) if is_json else {"text": reply.decode()}
    return Reply(response.status, body, got)


_AS_ANOTHER = """
import socket, sys
from tests.kit.accounts import become
request = sys.stdin.buffer.read()
become(*map(int, sys.argv[2:]))
one = socket.socket(socket.AF_UNIX)
one.settimeout(60)
try:
    one.connect(sys.argv[1])
    one.sendall(request)
    while part := one.recv(65536):
        sys.stdout.buffer.write(part)
except (PermissionError, BrokenPipeError, ConnectionResetError):
    pass
"""


# ---------------------------------------------------------------------- certificates


class Authority:
    """
    A CA of callers and of the host, made by cryptography alone, and its revocation list: a root,
    or one *below* another.
    """

    def __init__(self, folder: Path, *, below: Authority | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = "Callers CA" if below is None else "Callers CA below"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (below or self)._signed(
            self._name, self._key.public_key(), ca=True, names=(), server=True
        )
        pem = self.certificate.public_bytes(s.Encoding.PEM)
        self.ca = self._written("ca.pem", pem)
        self._sent_along = pem if below is not None else b""

    def _signed(
        self,
        name: x509.Name,
        key: Any,
        *,
        ca: bool,
        names: Sequence[x509.GeneralName],
        server: bool,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not ca, key_cert_sign=ca, crl_sign=ca,
                    content_commitment=False, key_encipherment=False, data_encipherment=False,
                    key_agreement=False, encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
        )  # fmt: skip
        if not ca:
            use = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, name: str, *, server: bool = False, uri: str | None = None) -> Identity:
        """A certificate for DNS *name* (or *uri*), with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "any")])
        names = [x509.UniformResourceIdentifier(uri) if uri else x509.DNSName(name)]
        made = self._signed(subject, key.public_key(), ca=False, names=names, server=server)
        pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        file = f"{name}-{made.serial_number:x}"
        return Identity(
            made,
            self._written(f"{file}.pem", made.public_bytes(s.Encoding.PEM) + self._sent_along),
            self._written(f"{file}.key", pem),
        )

    def crl(self, *revoked: Identity | Authority, days: int = 2) -> Path:
        """A revocation list with *revoked* on it; *days* below zero make one that has expired."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - timedelta(days=9))
            .next_update(now + timedelta(days=days))
        )
        for each in revoked:
            one = x509.RevokedCertificateBuilder().serial_number(each.certificate.serial_number)
            builder = builder.add_revoked_certificate(
                one.revocation_date(now - timedelta(days=1)).build()
            )
        made = builder.sign(self._key, hashes.SHA256())
        return self._written("crl.pem", made.public_bytes(s.Encoding.PEM))

    def _written(self, name: str, raw: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(raw)
        path.chmod(0o600)
        return path


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, as files."""

    certificate: x509.Certificate
    cert: Path
    key: Path

    @property
    def sha256(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def context(self, ca: Path) -> ssl.SSLContext:
        """For a caller with this certificate who trusts *ca*."""
        context = ssl.create_default_context(cafile=str(ca))
        context.load_cert_chain(self.cert, self.key)
        return context


# ---------------------------------------------------------------------- the service alone


class RunningService:
    """A Service without sockets, on an event loop in a thread of its own."""

    def __init__(self, settings: Settings, **more: Any) -> None:
        self.parts = Service(settings, **more)
        self.audit = self.parts.audit
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def grant(
        self, peer: Peer, ask: GrantRequest, *, gone: Callable[[], bool]
    ) -> Future[dict[str, Any]]:
        """The reply to /v1/grant."""
        return self._asked(RequestContext(peer, ask, "grant", gone))

    def token(
        self, peer: Peer, ask: GrantRequest, *, gone: Callable[[], bool]
    ) -> Future[dict[str, Any]]:
        """The reply to /v1/token."""
        return self._asked(RequestContext(peer, ask, "token", gone))

    def _asked(self, context: RequestContext) -> Future[dict[str, Any]]:
        async def reply() -> dict[str, Any]:
            return await self.parts.requests.begin(context)

        return asyncio.run_coroutine_threadsafe(reply(), self.loop)

    def prove(self) -> None:
        """Self-tests, to their end."""
        self._run(self.parts.profiles.self_test(PATIENCE))

    def reload(self) -> str | None:
        return self._run(self.parts.reload())

    def not_ready(self) -> list[str]:
        return self.parts.health.not_ready()

    def profile(self, name: str = "acme") -> Profile:
        found = self.parts.profiles.get(name)
        assert found is not None
        return found

    def finish(self) -> None:
        """As the daemon's end: who is on the way is answered."""
        self._run(self.parts.requests.finish())

    def close(self) -> None:
        """A second time changes nothing."""
        if self.loop.is_closed():
            return
        self.finish()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()
        self.parts.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)


# ---------------------------------------------------------------------- the host


@dataclass
class RunningHost:
    """
    A real `hsmtoll serve`, once it is started, with its files below *home*. *environ* has what
    the process is told; *shim* counts what its device is asked, in all its processes.
    """

    home: Path
    environ: dict[str, str]
    authority: Authority
    tls_port: int
    shim: Faults | None = None
    manager: socket.socket | None = None
    process: ForkedCommand | subprocess.Popen[bytes] | None = None
    notifications: list[str] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.home / "run" / "host.sock"

    @property
    def url(self) -> str:
        """For HSMTOLL_SIGNER__URL."""
        return f"unix://{self.socket}"

    @property
    def tls_url(self) -> str:
        """For HSMTOLL_SIGNER__URL."""
        return f"https://localhost:{self.tls_port}"

    @property
    def metrics(self) -> Path:
        return self.home / "run" / "metrics.sock"

    @property
    def policy(self) -> Path:
        return self.home / "etc" / "policy.toml"

    @property
    def stop_file(self) -> Path:
        return self.home / "etc" / "stop"

    @property
    def audit(self) -> Path:
        return self.home / "audit"

    @property
    def public_key(self) -> Path:
        """Of the audit."""
        return self.home / "audit.pub"

    @property
    def stderr(self) -> Path:
        return self.home / "stderr"

    def write_policy(self, *entries: str, before: str = PROFILE) -> None:
        """Replace the policy by *entries* below the profile."""
        self.say("\n".join([before, *entries]))

    def say(self, policy: str) -> None:
        """Replace the policy."""
        draft = self.policy.with_suffix(".new")
        draft.write_text(policy)
        draft.chmod(0o644)
        draft.replace(self.policy)

    def start(self, *, ready: bool = True, program: Sequence[str] = (), **environ: str) -> Self:
        """
        Start it, and wait until it says READY=1 to its manager. *program* is run instead of
        `hsmtoll -v serve`, with the same settings.
        """
        if self.manager is not None:
            self.manager.close()
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        where = self.home / "notify"
        where.unlink(missing_ok=True)
        manager.bind(str(where))
        self.manager = manager
        self.notifications.clear()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HSMTOLL_")}
        variables = inherited | {"NOTIFY_SOCKET": str(where)} | self.environ | environ
        with self.stderr.open("ab") as log, Path(os.devnull).open("r+b") as nothing:
            if program:
                self.process = subprocess.Popen(
                    program, stdin=nothing, stdout=nothing, stderr=log, env=variables
                )
            else:
                self.process = fork(
                    "-v", "serve", stdin=nothing, stdout=nothing, stderr=log, env=variables
                )
        if ready:
            self.hear("READY=1")
        return self

    def hear(self, word: str) -> None:
        """Wait until the service manager is told *word*."""
        until = time.monotonic() + PATIENCE
        assert self.manager is not None
        self.manager.settimeout(0.2)
        while word not in self.notifications:
            assert time.monotonic() < until, f"not told {word}: {self.log()}"
            assert self.process is not None
            assert self.process.poll() is None, f"it ended: {self.log()}"
            with contextlib.suppress(TimeoutError):
                self.notifications += self.manager.recv(4096).decode().splitlines()

    def log(self) -> str:
        """What it said on standard error."""
        return self.stderr.read_text(errors="replace")

    def signal(self, number: signals.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def reload(self) -> None:
        """SIGHUP, and wait until it is done."""
        self.notifications.clear()
        self.signal(signals.SIGHUP)
        self.hear("READY=1")

    def end(self, number: signals.Signals = signals.SIGTERM) -> int:
        """End it; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """kill -9."""
        self.end(signals.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)
        if self.manager is not None:
            self.manager.close()
        shutil.rmtree(self.home, ignore_errors=True)

    # ------------------------------------------------------------------ callers

    def ask(self, path: str = "/v1/grant", **members: Any) -> Reply:
        """For the road, as this account, on the Unix socket; *members* change the request."""
        return self.send("POST", path, json={**ROAD, **members})

    def send(self, method: str, path: str, **options: Any) -> Reply:
        """Anything, as this account, on the Unix socket."""
        return speak(self.connect(), method, path, **options)

    def connect(self, identity: Identity | None = None) -> http.client.HTTPConnection:
        """A connection for several requests: as this account, or as the holder of *identity*."""
        if identity is None:
            return _Unix(self.socket)
        context = identity.context(self.authority.ca)
        return http.client.HTTPSConnection(
            "localhost", self.tls_port, context=context, timeout=PATIENCE
        )

    def ask_tls(self, identity: Identity, path: str = "/v1/grant", **members: Any) -> Reply:
        """For the road, as the holder of a certificate."""
        return speak(self.connect(identity), "POST", path, json={**ROAD, **members})

    def as_account(self, uid: int, request: bytes, *, gid: int | None = None) -> bytes:
        """What another account gets, from a process of its own; nothing if it cannot connect."""
        # The interpreter may be where only this account can start it: it changes by itself.
        who = (str(uid), str(uid if gid is None else gid))
        return subprocess.run(
            [sys.executable, "-c", _AS_ANOTHER, str(self.socket), *who],
            input=request, env=importable(), capture_output=True, check=True, timeout=2 * PATIENCE,
        ).stdout  # fmt: skip

    def open_to_all(self) -> None:
        """Let every account reach the socket, so that only the policy stands before it."""
        self.socket.parent.chmod(0o755)
        self.socket.chmod(0o666)

    def health(self, page: str, method: str = "GET", **options: Any) -> Reply:
        """What the metrics listener answers: `/live`, `/ready`, `/metrics`."""
        return speak(_Unix(self.metrics), method, page, **options)

    def measured(self, name: str, **labels: str) -> float | None:
        """The value of one sample of `/metrics`; None if it is not there."""
        text = self.health("/metrics").body["text"]
        for family in text_string_to_metric_families(text):
            for each in family.samples:
                if (each.name, each.labels) == (f"hsmtoll_host_{name}", labels):
                    return each.value
        return None

    @property
    def faults(self) -> Faults:
        """Of its device, where there are any."""
        assert self.shim is not None
        return self.shim

    def signatures(self) -> int:
        """How often the device was asked for one, ever."""
        return self.faults.count("C_SignInit")

    def records(self, *events: str) -> list[dict[str, Any]]:
        """What is in the audit, of *events* or all."""
        return [e for e in list_records(self.audit) if not events or e["event"] in events]

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """`hsmtoll ARGV…` with the host's own settings."""
        return self.run(*argv)

    def run(self, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """As command, with some of them changed."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HSMTOLL_")}
        return hsmtoll(*argv, env=inherited | self.environ | environ, timeout=PATIENCE)


def make_host(
    environ: Mapping[str, str], *entries: str, faults: Faults | None = None
) -> RunningHost:
    """
    A host that is not started yet: profile acme is the identity of *environ*. Without *entries*
    this account and the certificate of ``app.example`` may have the road.
    """
    # Not below pytest's own directory: other accounts have to reach the socket.
    folder = Path(tempfile.mkdtemp(prefix="hsmtoll-host-"))
    folder.chmod(0o755)
    for name, mode in (("run", 0o750), ("etc", 0o755), ("audit", 0o700), ("state", 0o700)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    key = Ed25519PrivateKey.generate()
    private = folder / "audit.key"
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    (folder / "audit.pub").write_bytes(
        key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    authority = Authority(folder / "tls")
    server = authority.issue("localhost", server=True)
    port = free_port()
    host = {
        "socket": str(folder / "run" / "host.sock"),
        "listen": f"127.0.0.1:{port}",
        "cert": str(server.cert),
        "key": str(server.key),
        "client_ca": str(authority.ca),
        "policy": str(folder / "etc" / "policy.toml"),
        "audit_dir": str(folder / "audit"),
        "audit_key": str(private),
        "stop_file": str(folder / "etc" / "stop"),
        "metrics": f"unix://{folder}/run/metrics.sock",
    }
    variables = {f"HSMTOLL_HOST__{name.upper()}": value for name, value in host.items()}
    # Whose the key is, the policy says.
    chosen = {k: v for k, v in environ.items() if k != "HSMTOLL_IDENTITY"}
    variables["HSMTOLL_STATE"] = str(folder / "state")
    made = RunningHost(folder, chosen | variables, authority, port, faults)
    made.say("\n".join([PROFILE, *entries]) if entries else POLICY)
    return made
