"""
The store in a Redis server, shared by machines; imported only where HSMTOLL_CACHE names one.

Whoever can write to the server can delete values, and no more: values are encrypted, bound to their
keys, and carry their own end. Waits and answers are bounded.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import logging
import os
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import redis
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from redis.backoff import NoBackoff
from redis.connection import SSLConnection, parse_url
from redis.exceptions import (
    LockError,
    LockNotOwnedError,
    NoPermissionError,
    RedisError,
    ResponseError,
    WatchError,
)
from redis.lock import Lock
from redis.retry import Retry

from hsmtoll import files, tls
from hsmtoll.backoff import Backoff
from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.tokens.stores import LARGEST, StoredValue

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.clock import Clock

__all__ = ["COMMANDS", "RedisStore", "read_key"]

_T = TypeVar("_T")

_log = logging.getLogger("hsmtoll.tokens.cache")

#: AES-256.
_KEY_BYTES: Final = 32
#: Seconds of one wait for Redis.
_WAIT: Final = 5.0

#: Bytes before a sealed value: until when it is good, in milliseconds of the server's clock.
_STAMP: Final = 8


class RedisStore:
    """
    Values in the server of *client*, sealed with *secret*: the AES-256-GCM key, 32 bytes, the same
    for all. Redis counts the lifetimes. If it is down, every process carries on alone, with one
    warning.
    """

    #: Seconds after which the lock of a holder that died is free; who lives prolongs it.
    LEASE = 10.0

    #: Seconds for which a server that did not answer is not asked again.
    REST = 5.0

    #: Seconds that one question may take, however many waits it is made of.
    PATIENCE = 5.0

    def __init__(self, client: redis.Redis, *, secret: bytes, clock: Clock) -> None:
        self._client = client
        self._cipher = AESGCM(secret)
        self._clock = clock
        self._rest = Backoff(self.REST, self.REST)

    @classmethod
    def at(cls, url: str, *, key_file: Path, ca_file: Path | None, clock: Clock) -> RedisStore:
        """
        The server at *url*: ``redis://``, ``rediss://`` or ``unix://``, checked by settings.

        Nothing is opened but *key_file*. Raises ConfigurationError.
        """
        return cls(_client(url, ca_file), secret=read_key(key_file), clock=clock)

    def get(self, key: str) -> StoredValue | None:
        """What was put and still lives, or ``None``; what does not open is told once and a miss."""

        def read(client: redis.Redis) -> StoredValue | None:
            pipe = client.pipeline(transaction=True)
            # Whoever can write there puts what it likes: no more is asked for than a value has.
            pipe.getrange(_name(key), 0, LARGEST)
            pipe.pttl(_name(key))
            pipe.time()
            sealed, left, now = answers = pipe.execute(raise_on_error=False)
            for each in answers:
                # A value of another type is none of ours: a miss, and to be replaced.
                if isinstance(each, Exception) and not str(each).startswith("WRONGTYPE"):
                    raise each
            if not isinstance(sealed, bytes) or left <= 0:
                return None
            if len(sealed) > LARGEST:
                _log.warning("cache: a value in Redis is larger than any token: not read")
                return None
            value = self._opened(key, sealed)
            if value is None or len(value) < _STAMP:
                return None
            # Whoever can write there can prolong the lifetime, but not what is sealed.
            left = min(left, int.from_bytes(value[:_STAMP]) - _ms(now))
            return StoredValue(value[_STAMP:], left / 1000) if left > 0 else None

        return self._asked(read, None)

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Keep *value* for *ttl*."""
        milliseconds = int(ttl * 1000)

        def write(client: redis.Redis) -> None:
            # By the server's clock, which counts the lifetimes for all.
            until = (_ms(client.time()) + milliseconds).to_bytes(_STAMP)
            nonce = os.urandom(12)
            sealed = nonce + self._cipher.encrypt(nonce, until + value, _name(key).encode())
            client.set(_name(key), sealed, px=milliseconds)

        if milliseconds > 0:
            self._asked(write, None)

    @contextlib.contextmanager
    def lock(self, key: str, *, patience: float) -> Iterator[bool]:
        """Hold the lock of *key* among all who share the server; it expires with its holder."""

        def acquired(client: redis.Redis) -> Any:
            lock = client.lock(
                f"{_name(key)}:lock",
                timeout=self.LEASE,
                sleep=0.03,
                thread_local=False,
                lock_class=_Lock,
            )
            return lock if lock.acquire(blocking_timeout=patience) else False

        lock = self._asked(acquired, None, patience=patience)
        if not lock:
            yield lock is None
            return
        done = threading.Event()
        threading.Thread(
            target=self._prolong, args=(lock, done), name="hsmtoll-lease", daemon=True
        ).start()
        try:
            yield True
        finally:
            done.set()
            self._asked(lambda _: lock.release(), None)

    def _prolong(self, lock: Any, done: threading.Event) -> None:
        while not done.wait(self.LEASE / 3):
            self._asked(lambda _: None if done.is_set() else lock.reacquire(), None)

    def _asked(
        self, question: Callable[[redis.Redis], _T], otherwise: _T, *, patience: float = 0.0
    ) -> _T:
        """
        What Redis says, or *otherwise* while it is down or its answers do not end. *patience*: for
        questions that wait for another process.
        """
        if self._clock.now().boot < self._rest.until:
            return otherwise
        try:
            with _bounded(self.PATIENCE + patience):
                answer = question(self._client)
        except LockError:
            # The lease ran out under its holder: two may have renewed, and both tokens live.
            return otherwise
        except (RedisError, OSError, *_NONSENSE) as exc:
            if isinstance(exc, _NONSENSE):
                # Nobody knows what else would come of such a conversation.
                self._client.connection_pool.disconnect()
            if not self._rest.failures:
                _log.warning("cache: Redis %s", _trouble(exc))
            # From now, not from before the question: one that hangs has taken seconds to fail.
            self._rest.failed(self._clock.now().boot)
            return otherwise
        if self._rest.failures:
            _log.info("cache: Redis answers again")
            self._rest.worked()
        return answer

    def _opened(self, key: str, sealed: bytes) -> bytes | None:
        try:
            value: bytes = self._cipher.decrypt(sealed[:12], sealed[12:], _name(key).encode())
        except (InvalidTag, ValueError):
            _log.warning(
                "cache: a value in Redis does not open; it was made with another "
                "HSMTOLL_CACHE_KEY_FILE, or somebody changed it"
            )
            return None
        return value


#: What the client library, or we, make of answers that no Redis gives.
_NONSENSE: Final = (
    AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip


def _ms(time: Any) -> int:
    """The answer of Redis' TIME, in milliseconds."""
    return int(time[0]) * 1000 + int(time[1]) // 1000


def _name(key: str) -> str:
    """The Redis key for *key*; also the associated data (AEAD) of its value."""
    return f"hsmtoll:2:{key}"


#: The Redis commands in use, for ACL SETUSER.
COMMANDS: Final = "GET GETRANGE SET DEL PTTL PEXPIRE TIME WATCH UNWATCH MULTI EXEC"


def _trouble(exc: Exception) -> str:
    """What is wrong, in words; of a text of redis-py's its kind alone, it may hold the URL."""
    if isinstance(exc, NoPermissionError) or str(exc).lower().startswith("unknown command"):
        return (
            "refuses a command that is needed; this process goes on alone. Allow its user "
            f"{COMMANDS}, on the keys hsmtoll:*"
        )
    does = "refuses" if isinstance(exc, ResponseError) else "does not answer"
    return f"{does} ({type(exc).__name__}); this process goes on alone"


@dataclass(slots=True)
class _Bounds:
    """Until when the answers to a question must be here, and how many bytes they may have still."""

    end: float
    size: int = 4 * LARGEST

    def left(self, most: float | None) -> float:
        """Seconds of a wait of *most*. TimeoutError when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        return left if most is None else min(left, most)

    def count(self, read: int) -> None:
        """So many bytes have come. OSError when they are too many."""
        self.size -= read
        if self.size < 0:
            raise OSError(errno.EMSGSIZE, "the answer is larger than any of Redis")


_bounds: ContextVar[_Bounds] = ContextVar("hsmtoll-redis")


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Limit time and size of all that this thread reads from Redis in the context."""
    before = _bounds.set(_Bounds(time.monotonic() + seconds))
    try:
        yield
    finally:
        _bounds.reset(before)


class _Socket:
    """
    A socket for redis-py, which bounds each wait and neither all of them nor what comes: a server
    that sends a byte now and then, or without end, would be read for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        """As of a socket; TimeoutError and OSError where a bound is reached."""
        with self._wait() as bounds:
            data = self._sock.recv(size)
            bounds.count(len(data))
        return data

    def recv_into(self, buffer: bytearray) -> int:
        """As recv, for hiredis."""
        with self._wait() as bounds:
            read = self._sock.recv_into(buffer)
            bounds.count(read)
        return read

    @contextlib.contextmanager
    def _wait(self) -> Iterator[_Bounds]:
        bounds, usual = _bounds.get(), self._sock.gettimeout()
        self._sock.settimeout(bounds.left(usual))
        try:
            yield bounds
        finally:
            self._sock.settimeout(usual)


class _Lock(Lock):
    """
    redis-py's lock without its scripts, which many a server does not allow: released and prolonged
    in a transaction, which fails where another holds it by now.
    """

    def register_scripts(self) -> None:
        """There are none."""

    def do_release(self, expected_token: str) -> None:
        self._while_held(expected_token, lambda pipe: pipe.delete(self.name))

    def do_reacquire(self) -> Literal[True]:
        lease = int(1000 * RedisStore.LEASE)
        self._while_held(self.local.token, lambda pipe: pipe.pexpire(self.name, lease))
        return True

    def _while_held(self, token: str | bytes, change: Callable[[Any], object]) -> None:
        # What is changed meanwhile may be the lease alone, by ourselves: look once more.
        for _ in range(5):
            with self.redis.pipeline() as pipe, contextlib.suppress(WatchError):
                pipe.watch(self.name)
                if pipe.get(self.name) != token:
                    break
                pipe.multi()
                change(pipe)
                pipe.execute()
                return
        raise LockNotOwnedError("the lock is another's by now", lock_name=self.name)


def _client(url: str, ca_file: Path | None) -> redis.Redis:
    class OurTls(SSLConnection):
        """With our own context: the system's roots, HSMTOLL_CA_FILE, no key log."""

        def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
            # The handshake ends as a whole when this has passed.
            sock.settimeout(_bounds.get().left(_WAIT))
            made = tls.client_context(ca_file).wrap_socket(sock, server_hostname=self.host)
            made.settimeout(_WAIT)
            return made

    try:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call] # redis-py's own
    except ValueError:
        # `from None`: the original quotes the URL.
        raise ConfigurationError("HSMTOLL_CACHE: not a URL of a Redis server") from None
    kind: Any = options.get("connection_class", redis.Connection)
    if url.startswith("rediss:"):
        kind = OurTls

    class Bounded(kind):  # type: ignore[misc] # of a class that the URL decides
        """Of TCP, TLS or a Unix socket."""

        def _connect(self) -> Any:
            self.socket_connect_timeout = _bounds.get().left(_WAIT)
            return _Socket(super()._connect())

    # One more try at once: a connection that idled may have been closed by a restart.
    options |= {
        "connection_class": Bounded,
        "socket_timeout": _WAIT,
        "retry": Retry(NoBackoff(), 1),
    }
    return redis.Redis(connection_pool=redis.ConnectionPool(**options))


def read_key(path: Path) -> bytes:
    """
    The 32 bytes of a key file: as they are, or as hexadecimal or base64 text.

    ConfigurationError for another content, and as `files.read` for a secret.
    """
    raw = files.read(path, "HSMTOLL_CACHE_KEY_FILE", secret=True)
    for key in (raw, *_as_text(raw)):
        if len(key) == _KEY_BYTES:
            return key
    raise ConfigurationError(
        f"HSMTOLL_CACHE_KEY_FILE {sanitized(path)}: a key of 32 bytes is expected",
        hint="as they are, or as 64 hexadecimal digits, or as base64: "
        "(umask 077; openssl rand -hex 32 > FILE)",
        code="cache-key",
    )


def _as_text(raw: bytes) -> Iterator[bytes]:
    text = raw.strip()
    with contextlib.suppress(binascii.Error):
        yield binascii.unhexlify(text)
    with contextlib.suppress(binascii.Error):
        yield base64.b64decode(text, validate=True)
