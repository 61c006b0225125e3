"""
The store in a Redis server, shared by machines; imported only where HSMTOLL_CACHE names one.

Other users of the server can only delete values: each value is encrypted, bound to its key, and
contains its own expiry. Time and size of responses are limited.
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
#: Seconds for each connect, send or receive.
_SOCKET_TIMEOUT: Final = 5.0

#: Bytes of the expiry before each value: milliseconds by the server's clock.
_EXPIRY_BYTES: Final = 8


class RedisStore:
    """
    Values in the server of *client*, encrypted with *secret*, an AES-256-GCM key of 32 bytes that
    all processes share. Redis expires values. While it is down, each process works without it,
    after one warning.
    """

    #: Seconds after which the lock of a dead holder expires; a live holder prolongs it.
    LEASE = 10.0

    #: Seconds without a request after the server has failed.
    RETRY_AFTER_DOWN = 5.0

    #: Seconds for one operation, with all its requests.
    DEADLINE = 5.0

    def __init__(self, client: redis.Redis, *, secret: bytes, clock: Clock) -> None:
        self._client = client
        self._cipher = AESGCM(secret)
        self._clock = clock
        self._backoff = Backoff(self.RETRY_AFTER_DOWN, self.RETRY_AFTER_DOWN)

    @classmethod
    def at(cls, url: str, *, key_file: Path, ca_file: Path | None, clock: Clock) -> RedisStore:
        """
        The server at *url*: ``redis://``, ``rediss://`` or ``unix://``, checked by settings.

        Reads only *key_file*; connects later. Raises ConfigurationError.
        """
        return cls(_client(url, ca_file), secret=read_key(key_file), clock=clock)

    def get(self, key: str) -> StoredValue | None:
        """
        The unexpired value, or ``None``; one that cannot be decrypted is a miss, with a warning.
        """

        def read(client: redis.Redis) -> StoredValue | None:
            pipe = client.pipeline(transaction=True)
            # Other users of the server may store a large value: read at most the maximum size.
            pipe.getrange(_name(key), 0, LARGEST)
            pipe.pttl(_name(key))
            pipe.time()
            encrypted, left, now = answers = pipe.execute(raise_on_error=False)
            for each in answers:
                # Another program's value of another type: a miss, and replaced by the next put.
                if isinstance(each, Exception) and not str(each).startswith("WRONGTYPE"):
                    raise each
            if not isinstance(encrypted, bytes) or left <= 0:
                return None
            if len(encrypted) > LARGEST:
                _log.warning("cache: a value in Redis is larger than any token: not read")
                return None
            value = self._decrypted(key, encrypted)
            if value is None or len(value) < _EXPIRY_BYTES:
                return None
            # Other users of the server can prolong the TTL, but not the encrypted expiry.
            left = min(left, int.from_bytes(value[:_EXPIRY_BYTES]) - _ms(now))
            return StoredValue(value[_EXPIRY_BYTES:], left / 1000) if left > 0 else None

        return self._call(read, None)

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Store *value* for *ttl* seconds."""
        milliseconds = int(ttl * 1000)

        def write(client: redis.Redis) -> None:
            # By the server's clock, which is the same for all processes.
            until = (_ms(client.time()) + milliseconds).to_bytes(_EXPIRY_BYTES)
            nonce = os.urandom(12)
            encrypted = nonce + self._cipher.encrypt(nonce, until + value, _name(key).encode())
            client.set(_name(key), encrypted, px=milliseconds)

        if milliseconds > 0:
            self._call(write, None)

    @contextlib.contextmanager
    def lock(self, key: str, *, timeout: float) -> Iterator[bool]:
        """Hold the lock of *key* among all users of the server. It expires if its holder dies."""

        def acquired(client: redis.Redis) -> Any:
            lock = client.lock(
                f"{_name(key)}:lock",
                timeout=self.LEASE,
                sleep=0.03,
                thread_local=False,
                lock_class=_Lock,
            )
            return lock if lock.acquire(blocking_timeout=timeout) else False

        lock = self._call(acquired, None, timeout=timeout)
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
            self._call(lambda _: lock.release(), None)

    def _prolong(self, lock: Any, done: threading.Event) -> None:
        while not done.wait(self.LEASE / 3):
            self._call(lambda _: None if done.is_set() else lock.reacquire(), None)

    def _call(
        self, operation: Callable[[redis.Redis], _T], default: _T, *, timeout: float = 0.0
    ) -> _T:
        """
        The result of *operation*, or *default* if Redis is down or its response exceeds the limits.
        *timeout*: additional seconds for an operation that waits for another process.
        """
        if self._clock.now().boot < self._backoff.until:
            return default
        try:
            with _limited(self.DEADLINE + timeout):
                answer = operation(self._client)
        except LockError:
            # The lease expired early: two processes may have renewed, and both tokens are valid.
            return default
        except (RedisError, OSError, *_INVALID_RESPONSE) as exc:
            if isinstance(exc, _INVALID_RESPONSE):
                # The connections may be in an undefined state.
                self._client.connection_pool.disconnect()
            if not self._backoff.failures:
                _log.warning("cache: Redis %s", _trouble(exc))
            # From now on, because an operation that hangs takes seconds to fail.
            self._backoff.failed(self._clock.now().boot)
            return default
        if self._backoff.failures:
            _log.info("cache: Redis answers again")
            self._backoff.worked()
        return answer

    def _decrypted(self, key: str, encrypted: bytes) -> bytes | None:
        try:
            value: bytes = self._cipher.decrypt(encrypted[:12], encrypted[12:], _name(key).encode())
        except (InvalidTag, ValueError):
            _log.warning(
                "cache: a value in Redis cannot be decrypted: it was stored with another "
                "HSMTOLL_CACHE_KEY_FILE, or changed"
            )
            return None
        return value


#: Exceptions of redis-py and of this module for responses that no Redis server sends.
_INVALID_RESPONSE: Final = (
    AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip


def _ms(time: Any) -> int:
    """The response to the command TIME, in milliseconds."""
    return int(time[0]) * 1000 + int(time[1]) // 1000


def _name(key: str) -> str:
    """The Redis key for *key*; also the associated data (AEAD) of its value."""
    return f"hsmtoll:2:{key}"


#: The Redis commands in use, for ACL SETUSER.
COMMANDS: Final = "GET GETRANGE SET DEL PTTL PEXPIRE TIME WATCH UNWATCH MULTI EXEC"


def _trouble(exc: Exception) -> str:
    """The failure for the log: only the class of *exc*, whose text may contain the URL."""
    if isinstance(exc, NoPermissionError) or str(exc).lower().startswith("unknown command"):
        return (
            "refuses a required command; this process works without it. Allow its user "
            f"{COMMANDS}, on the keys hsmtoll:*"
        )
    does = "refuses" if isinstance(exc, ResponseError) else "does not answer"
    return f"{does} ({type(exc).__name__}); this process works without it"


@dataclass(slots=True)
class _Limits:
    """Deadline (monotonic clock) and remaining bytes of the responses to one operation."""

    end: float
    size: int = 4 * LARGEST

    def left(self, most: float | None) -> float:
        """The seconds left, at most *most*. TimeoutError if there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the response takes too long")
        return left if most is None else min(left, most)

    def count(self, read: int) -> None:
        """Count *read* received bytes. OSError if they exceed the limit."""
        self.size -= read
        if self.size < 0:
            raise OSError(errno.EMSGSIZE, "the response is too large")


_limits: ContextVar[_Limits] = ContextVar("hsmtoll-redis")


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Limit the time, and the size of what this thread reads from Redis, in the context."""
    before = _limits.set(_Limits(time.monotonic() + seconds))
    try:
        yield
    finally:
        _limits.reset(before)


class _Socket:
    """
    A socket with limits for a whole operation. redis-py limits each receive only, so a server that
    sends a byte now and then, or without end, would block the thread forever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        """As socket.recv; TimeoutError and OSError if a limit is exceeded."""
        with self._wait() as limits:
            data = self._sock.recv(size)
            limits.count(len(data))
        return data

    def recv_into(self, buffer: bytearray) -> int:
        """As recv, for hiredis."""
        with self._wait() as limits:
            read = self._sock.recv_into(buffer)
            limits.count(read)
        return read

    @contextlib.contextmanager
    def _wait(self) -> Iterator[_Limits]:
        limits, usual = _limits.get(), self._sock.gettimeout()
        self._sock.settimeout(limits.left(usual))
        try:
            yield limits
        finally:
            self._sock.settimeout(usual)


class _Lock(Lock):
    """
    redis-py's lock without Lua scripts, which many servers do not permit. It is released and
    prolonged in a transaction, which fails if the lock has another holder.
    """

    def register_scripts(self) -> None:
        """Register nothing."""

    def do_release(self, expected_token: str) -> None:
        self._while_held(expected_token, lambda pipe: pipe.delete(self.name))

    def do_reacquire(self) -> Literal[True]:
        lease = int(1000 * RedisStore.LEASE)
        self._while_held(self.local.token, lambda pipe: pipe.pexpire(self.name, lease))
        return True

    def _while_held(self, token: str | bytes, change: Callable[[Any], object]) -> None:
        # WatchError: perhaps our own thread has only prolonged the lease. Check again.
        for _ in range(5):
            with self.redis.pipeline() as pipe, contextlib.suppress(WatchError):
                pipe.watch(self.name)
                if pipe.get(self.name) != token:
                    break
                pipe.multi()
                change(pipe)
                pipe.execute()
                return
        raise LockNotOwnedError("the lock has another holder", lock_name=self.name)


def _client(url: str, ca_file: Path | None) -> redis.Redis:
    class OurTls(SSLConnection):
        """TLS with our own context: the system's roots, HSMTOLL_CA_FILE, no key log."""

        def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
            # The timeout limits the handshake as a whole.
            sock.settimeout(_limits.get().left(_SOCKET_TIMEOUT))
            made = tls.client_context(ca_file).wrap_socket(sock, server_hostname=self.host)
            made.settimeout(_SOCKET_TIMEOUT)
            return made

    try:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call] # redis-py's own
    except ValueError:
        # `from None`: the original quotes the URL.
        raise ConfigurationError("HSMTOLL_CACHE: not a URL of a Redis server") from None
    kind: Any = options.get("connection_class", redis.Connection)
    if url.startswith("rediss:"):
        kind = OurTls

    class Limited(kind):  # type: ignore[misc] # of a class that the URL decides
        """A connection by TCP, TLS or Unix socket, with limits."""

        def _connect(self) -> Any:
            self.socket_connect_timeout = _limits.get().left(_SOCKET_TIMEOUT)
            return _Socket(super()._connect())

    # Retry once: a restart of the server may have closed an idle connection.
    options |= {
        "connection_class": Limited,
        "socket_timeout": _SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 1),
    }
    return redis.Redis(connection_pool=redis.ConnectionPool(**options))


def read_key(path: Path) -> bytes:
    """
    The key (32 bytes) in a file: raw, hexadecimal or base64.

    ConfigurationError for other content, and as `files.read` for a secret.
    """
    raw = files.read(path, "HSMTOLL_CACHE_KEY_FILE", secret=True)
    for key in (raw, *_as_text(raw)):
        if len(key) == _KEY_BYTES:
            return key
    raise ConfigurationError(
        f"HSMTOLL_CACHE_KEY_FILE {sanitized(path)}: a key of 32 bytes is expected",
        hint="raw, as 64 hexadecimal digits, or as base64: "
        "(umask 077; openssl rand -hex 32 > FILE)",
        code="cache-key",
    )


def _as_text(raw: bytes) -> Iterator[bytes]:
    text = raw.strip()
    with contextlib.suppress(binascii.Error):
        yield binascii.unhexlify(text)
    with contextlib.suppress(binascii.Error):
        yield base64.b64decode(text, validate=True)
