"""Machines that share a Redis: one signature, and nothing that whoever writes there could use."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import socketserver
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import redis
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsmtoll.client import TollClient
from hsmtoll.clock import SystemClock
from hsmtoll.errors import ConfigurationError
from hsmtoll.sandbox.pki import issue_tls, pem, tls_authority
from hsmtoll.testing.clock import SettableClock
from hsmtoll.tokens.redis_store import COMMANDS, RedisStore
from hsmtoll.tokens.stores import name_of
from tests.kit.crowds import Crowd, fresh_key
from tests.kit.own_device import free_port
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox

# Crowds of processes on a busy machine take their time to start.
pytestmark = pytest.mark.timeout(300)

KEY, OTHER = name_of("a key"), name_of("another")


class Server:
    """A Redis of this test's own, on a Unix socket."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "save": "",
            "appendonly": "no",
            "dir": str(self._directory),
        }
        argv = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            ["redis-server", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            assert self._process.poll() is None, "redis-server ended at once"
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.exceptions.RedisError:
                time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
            self.socket.unlink(missing_ok=True)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(secrets.token_bytes(32))
    path.chmod(0o600)
    return path


@pytest.fixture
def store(server: Server, key_file: Path) -> RedisStore:
    return store_at(server, key_file)


def store_at(server: Server, key_file: Path) -> RedisStore:
    return RedisStore.at(server.url, key_file=key_file, ca_file=None, clock=SystemClock())


@contextmanager
def raw(server: Server) -> Iterator[redis.Redis]:
    """As whoever can write to Redis."""
    with server.client() as client:
        yield client


def test_what_was_put_is_got_with_the_time_that_redis_gives_it(store: RedisStore) -> None:
    assert store.get(KEY) is None
    store.put(KEY, b"value", ttl=100)
    kept = store.get(KEY)
    assert kept is not None
    assert kept.value == b"value"
    assert kept.left is not None
    assert 90 < kept.left <= 100
    store.put(OTHER, b"value", ttl=0.05)
    time.sleep(0.1)
    assert store.get(OTHER) is None


def test_nothing_readable_lies_there(store: RedisStore, server: Server) -> None:
    store.put(KEY, b"the-secret-token", ttl=100)
    with raw(server) as client:
        lying = repr([(name, client.get(name)) for name in client.scan_iter("*")])
    assert KEY in lying
    assert "secret" not in lying


def test_a_value_moved_to_another_key_does_not_open(
    store: RedisStore, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, b"mine", ttl=100)
    store.put(OTHER, b"theirs", ttl=100)
    with raw(server) as client:
        mine, theirs = f"hsmtoll:2:{KEY}", f"hsmtoll:2:{OTHER}"
        client.rename(theirs, mine)
    assert store.get(KEY) is None
    assert "cannot be decrypted" in caplog.text


@pytest.mark.parametrize("change", ["bit", "cut", "empty", "plain", "list"])
def test_a_value_that_was_changed_is_a_miss(store: RedisStore, server: Server, change: str) -> None:
    store.put(KEY, b"value", ttl=100)
    name = f"hsmtoll:2:{KEY}"
    with raw(server) as client:
        sealed = client.get(name)
        assert isinstance(sealed, bytes)
        client.delete(name)
        if change == "list":
            client.rpush(name, sealed)
        else:
            client.set(
                name,
                {
                    "bit": sealed[:-1] + bytes([sealed[-1] ^ 1]),
                    "cut": sealed[:-3],
                    "empty": b"",
                    "plain": b"value",
                }[change],
                px=100_000,
            )
    assert store.get(KEY) is None


def test_a_value_of_another_secret_is_a_miss(
    store: RedisStore, server: Server, tmp_path: Path
) -> None:
    store.put(KEY, b"value", ttl=100)
    path = tmp_path / "other-key"
    path.write_bytes(secrets.token_bytes(32))
    path.chmod(0o600)
    assert store_at(server, path).get(KEY) is None
    # The control.
    assert store.get(KEY) is not None


def test_a_lock_excludes_and_is_freed(server: Server, key_file: Path) -> None:
    first, second = store_at(server, key_file), store_at(server, key_file)
    with first.lock(KEY, timeout=1) as held:
        assert held
        with second.lock(KEY, timeout=0.1) as free:
            assert not free
        with second.lock(OTHER, timeout=0.1) as free:
            assert free
    with second.lock(KEY, timeout=0.1) as free:
        assert free


def test_a_holder_who_lives_keeps_the_lock_longer_than_its_lease(
    server: Server, key_file: Path
) -> None:
    class Short(RedisStore):
        LEASE = 6.0

    def at() -> Short:
        return Short(server.client(), secret=key_file.read_bytes(), clock=SystemClock())

    first, second = at(), at()
    with first.lock(KEY, timeout=1), raw(server) as client:
        left, prolonged = Short.LEASE * 1000, 0
        # Prolonged at each third of it: after four times it would be over by itself.
        while prolonged < 4:
            time.sleep(0.05)
            before, left = left, client.pttl(f"hsmtoll:2:{KEY}:lock")
            assert left > 0
            prolonged += left > before
        with second.lock(KEY, timeout=0.1) as free:
            assert not free
    # The control: one who is gone without a word loses it.
    with raw(server) as client:
        assert client.lock(f"hsmtoll:2:{KEY}:lock", timeout=0.3).acquire()
    with second.lock(KEY, timeout=60) as free:
        assert free


def test_40_processes_of_four_machines_cost_one_signature(
    server: Server, toll_sandbox: Sandbox, key_file: Path
) -> None:
    with Crowd(toll_sandbox, server.url, key_file) as crowd:
        signed, ended = crowd.run(40)
    assert signed == 1
    assert len(ended) == 1
    assert ended.pop().startswith("token ")


def test_a_leader_that_is_killed_blocks_the_others_for_its_lease_alone(
    server: Server, toll_sandbox: Sandbox, key_file: Path
) -> None:
    with Crowd(toll_sandbox, server.url, key_file) as crowd:
        leader = crowd.member(step="signed")
        leader.until("at signed")
        leader.process.kill()
        output = crowd.member().end()
    assert output.count("signed") == 1
    assert any(line.startswith("token ") for line in output)


def test_two_devices_with_equal_settings_never_share_a_token(
    server: Server, toll_sandbox: Sandbox, key_file: Path
) -> None:
    ours = Crowd(toll_sandbox, server.url, key_file)
    theirs = Crowd(toll_sandbox, server.url, key_file, key=fresh_key())
    with ours, theirs:
        first, _ = ours.run(2)
        second, _ = theirs.run(2)
    # Whoever found the other's token would not have signed. The tokens themselves may be equal:
    # Customs gives the same bytes for the same business within a second.
    assert (first, second) == (1, 1)


def test_redis_that_dies_fails_no_call_and_is_used_again_when_it_is_back(
    server: Server, toll_sandbox: Sandbox, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_at(server, key_file)
    store._backoff.longest = 0.0  # asked again at once, so that the test need not wait
    token_service, signer = token_service_of(
        toll_sandbox, store=store, identity_file=key_file.with_name("who")
    )
    client = TollClient(token_service)
    first = client.token("road")
    server.kill()
    assert client.token("road") is first
    caplog.clear()
    for _ in range(3):
        client.token("road", renew=True)
    assert len(signer.signed) == 4
    down = [r for r in caplog.records if "Redis does not answer" in r.getMessage()]
    assert len(down) == 1, "one warning for one outage"
    server.start()
    client.token("air")
    other, unused = token_service_of(
        toll_sandbox, store=store_at(server, key_file), identity_file=key_file.with_name("who")
    )
    TollClient(other).token("air")
    assert unused.signed == []


def test_a_redis_that_never_was_there_costs_a_warning(
    tmp_path: Path, toll_sandbox: Sandbox, key_file: Path
) -> None:
    store = RedisStore.at(
        f"unix://{tmp_path}/nothing", key_file=key_file, ca_file=None, clock=SystemClock()
    )
    token_service, signer = token_service_of(toll_sandbox, store=store)
    client = TollClient(token_service)
    threads = [threading.Thread(target=client.token, args=("road",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(signer.signed) == 1, "in this process the flight is one still"


def test_a_password_in_the_url_is_told_to_nobody(
    server: Server, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"unix://:hunter2hunter2@{server.socket}"
    store = RedisStore.at(url, key_file=key_file, ca_file=None, clock=SystemClock())
    assert store.get(KEY) is None
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(store)


def test_a_url_that_is_none_is_told_without_its_password(key_file: Path) -> None:
    url = "redis://:hunter2@localhost:port/0"
    with pytest.raises(ConfigurationError) as caught:
        RedisStore.at(url, key_file=key_file, ca_file=None, clock=SystemClock())
    assert "hunter2" not in str(caught.value)


def test_a_redis_on_another_machine_is_reached_by_verified_tls_alone(
    tmp_path: Path, key_file: Path
) -> None:
    certificate, key = issue_tls(("localhost", "127.0.0.1"))
    authority = tmp_path / "ca.pem"
    authority.write_bytes(pem(tls_authority()[0]))
    (tmp_path / "server.pem").write_bytes(pem(certificate))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "server.key").write_bytes(private)
    port = free_port()
    process = subprocess.Popen(
        [
            *("redis-server", "--port", "0", "--tls-port", str(port), "--save", ""),
            *("--tls-cert-file", "server.pem", "--tls-key-file", "server.key"),
            *("--tls-auth-clients", "no", "--bind", "127.0.0.1"),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"rediss://localhost:{port}/0"
        until = time.monotonic() + 20
        kept = None
        while kept is None and time.monotonic() < until:
            trusted = RedisStore.at(url, key_file=key_file, ca_file=authority, clock=SystemClock())
            trusted.put(KEY, b"value", ttl=100)
            kept = trusted.get(KEY)
            time.sleep(0.05)
        assert kept is not None
        assert kept.value == b"value"
        # The control: without that CA the same server is nobody, and a cache that is down a miss.
        stranger = RedisStore.at(url, key_file=key_file, ca_file=None, clock=SystemClock())
        assert stranger.get(KEY) is None
    finally:
        process.kill()
        process.wait(10)


def test_a_redis_that_hangs_is_asked_once_and_then_left_alone(
    server: Server, key_file: Path
) -> None:
    clock = SettableClock.at_real_time()
    store = RedisStore(server.client(), secret=key_file.read_bytes(), clock=clock)
    store.put(KEY, b"value", ttl=100)
    assert server._process is not None
    server._process.send_signal(signal.SIGSTOP)
    try:
        assert store.get(KEY) is None
    finally:
        server._process.send_signal(signal.SIGCONT)
    # It would answer again, but nobody asks it before its rest is over.
    for _ in range(8):
        assert store.get(KEY) is None
    clock.advance(RedisStore.RETRY_AFTER_DOWN + 1)
    kept = store.get(KEY)
    assert kept is not None
    assert kept.value == b"value"


class Slow(socketserver.StreamRequestHandler):
    """Between a client and a real Redis: passes answers on, at some time a byte now and then."""

    dripping = threading.Event()
    real = ""

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as there, contextlib.suppress(OSError):
            there.connect(self.real)
            answers = threading.Thread(target=self._back, args=(there,), daemon=True)
            answers.start()
            while asked := self.request.recv(65536):
                there.sendall(asked)

    def _back(self, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while answer := there.recv(65536):
                # Minutes for a value of some kilobytes, and no wait of a second in them.
                while answer and self.dripping.is_set():
                    self.request.sendall(answer[:1])
                    answer = answer[1:]
                    time.sleep(0.05)
                self.request.sendall(answer)


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    """The URL of a server that is no Redis."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_redis_that_drips_is_read_until_its_time_is_over_and_used_again_when_it_is_not(
    server: Server, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Through(Slow):
        dripping, real = threading.Event(), str(server.socket)

    clock = SettableClock.at_real_time()
    with serving(Through) as url:
        store = RedisStore.at(url, key_file=key_file, ca_file=None, clock=clock)
        store.put(KEY, b"x" * 50_000, ttl=1000)
        store.DEADLINE = 1.0
        Through.dripping.set()
        assert store.get(KEY) is None
        assert "Redis does not answer (TimeoutError)" in caplog.text
        # One that drips from the first word on, and while it is asked for a lock.
        fresh = RedisStore.at(url, key_file=key_file, ca_file=None, clock=clock)
        fresh.DEADLINE = 1.0
        with fresh.lock(KEY, timeout=0.1) as held:
            assert held
        Through.dripping.clear()
        store.DEADLINE = 60.0
        clock.advance(RedisStore.RETRY_AFTER_DOWN + 1)
        kept = store.get(KEY)
        assert kept is not None
        assert len(kept.value) == 50_000


@pytest.mark.parametrize("begin", [b"$9999999999\r\n", b"*9999999999\r\n", b"+", b""])
def test_a_redis_that_answers_without_end_is_left_alone(
    key_file: Path, caplog: pytest.LogCaptureFixture, begin: bytes
) -> None:
    sent: list[int] = []

    class Endless(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(begin)
                while True:
                    self.request.sendall(b":1\r\n" * 10_000)
                    sent.append(40_000)

    with serving(Endless) as url:
        store = RedisStore.at(url, key_file=key_file, ca_file=None, clock=SystemClock())
        store.DEADLINE = 60.0
        assert store.get(KEY) is None
    assert "this process works without it" in caplog.text
    # What lies in the buffers of the sockets, and not what would have come in a minute.
    assert sum(sent) < 64 * 1024 * 1024


def test_a_value_larger_than_a_token_is_not_read_and_is_replaced(
    server: Server, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(OTHER, b"value", ttl=100)
    with raw(server) as client:
        client.set(f"hsmtoll:2:{KEY}", b"x" * (50 << 20), px=100_000)
        client.config_resetstat()
        assert store.get(KEY) is None
        assert client.info("stats")["total_net_output_bytes"] < 1 << 20
    assert "larger than any token" in caplog.text
    # Redis itself is well.
    assert store.get(OTHER) is not None
    store.put(KEY, b"x" * 200_000, ttl=100)
    assert store.get(KEY) is not None


def test_a_lifetime_that_somebody_prolonged_ends_when_it_was_to_end(
    server: Server, store: RedisStore
) -> None:
    store.put(KEY, b"value", ttl=0.5)
    with raw(server) as client:
        client.pexpire(client.keys("hsmtoll:*")[0], 100_000)
    time.sleep(0.6)
    assert store.get(KEY) is None


def test_what_is_no_value_is_replaced_at_once(server: Server, store: RedisStore) -> None:
    with raw(server) as client:
        client.rpush(f"hsmtoll:2:{KEY}", "x")
    assert store.get(KEY) is None
    store.put(KEY, b"value", ttl=100)
    assert store.get(KEY) is not None


#: What the page caching names, and nothing else.
ALLOWED = "+@connection +get +getrange +set +del +pttl +pexpire +time +watch +unwatch +multi +exec"


def restricted(server: Server, key_file: Path, rules: str) -> RedisStore:
    with server.client() as client:
        client.execute_command(
            *("ACL", "SETUSER", "hsmtoll", "reset", "on", ">geheim", "~hsmtoll:*", *rules.split())
        )
    url = f"unix://hsmtoll:geheim@{server.socket}"
    return RedisStore.at(url, key_file=key_file, ca_file=None, clock=SystemClock())


@pytest.mark.parametrize("rules", ["+@all -@scripting", ALLOWED])
def test_a_server_without_scripts_keeps_tokens_and_frees_its_locks(
    server: Server, key_file: Path, caplog: pytest.LogCaptureFixture, rules: str
) -> None:
    store = restricted(server, key_file, rules)
    with store.lock(KEY, timeout=5) as held:
        assert held
        store.put(KEY, b"token", ttl=60)
    with server.client() as client:
        assert client.keys("*:lock") == []
        assert [command for command in _called(client) if command.startswith("eval")] == []
    assert store.get(KEY) is not None
    # Nobody waits for a lease: the lock is free at once.
    with restricted(server, key_file, rules).lock(KEY, timeout=0.0) as held:
        assert held
    assert caplog.records == []


def _called(client: redis.Redis) -> list[str]:
    stats: dict[str, object] = client.info("commandstats")
    return [name.removeprefix("cmdstat_") for name in stats]


def test_a_lock_that_is_prolonged_outlives_its_lease_and_frees_no_other_ones(
    server: Server, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "LEASE", 0.6)
    store = restricted(server, key_file, ALLOWED)
    with store.lock(KEY, timeout=5), server.client() as client:
        time.sleep(1.5)
        with restricted(server, key_file, ALLOWED).lock(KEY, timeout=0.0) as second:
            assert not second
        # Somebody deleted it and holds it now: it is theirs to free.
        (name,) = client.keys("*:lock")
        client.set(name, b"another's")
    with server.client() as client:
        assert client.get(name) == b"another's"


def test_a_command_that_is_not_allowed_is_named_with_what_to_allow(
    server: Server, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = restricted(server, key_file, ALLOWED.replace("+watch ", ""))
    for _ in range(3):
        with store.lock(KEY, timeout=5) as held:
            assert held
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "refuses a required command" in messages[0]
    assert COMMANDS in messages[0]
    assert "geheim" not in messages[0]
    for word in COMMANDS.lower().split():
        assert f"+{word}" in ALLOWED


@pytest.mark.parametrize(
    "answer",
    [b"*1\r\n" * 5000 + b":1\r\n", b":7\r\n", b"*-1\r\n", b"*2\r\n:1\r\n:2\r\n", b"$-1\r\n",
     b"?\r\n", b"+OK\r\n", b"*3\r\n:1\r\n$1\r\nx\r\n+y\r\n"],
)  # fmt: skip
def test_what_answers_as_no_redis_does_is_left_alone(
    key_file: Path, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while self.rfile.readline():
                    self.wfile.write(answer)

    with serving(Odd) as url:
        one = RedisStore.at(url, key_file=key_file, ca_file=None, clock=SystemClock())
        one.put("a" * 64, b"token", ttl=60)
        assert one.get("a" * 64) is None
        with one.lock("a" * 64, timeout=0.1):
            pass
    assert "Traceback" not in caplog.text
