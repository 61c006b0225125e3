"""
Stores for tokens with one interface of three methods; in memory and in files. Redis: redis_store.

A store keeps bytes under a key and does not interpret them. Freshness, renewal and unreadable
values are handled in cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.fork import after_fork, notice_fork

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["LARGEST", "FileStore", "MemoryStore", "Store", "StoredValue", "name_of"]

_log = logging.getLogger("hsmtoll.tokens.cache")

#: Seconds for which a check of the cache directory is valid: usually as long as one renewal.
_CHECK_HOLDS: Final = 10.0

#: Bytes. A stored value has a few kilobytes; larger ones are ignored.
LARGEST: Final = 256 * 1024


class StoredValue(NamedTuple):
    """A *value*, and its remaining seconds (*left*) if the store itself counts time."""

    value: bytes
    left: float | None = None


class Store(Protocol):
    """
    Bytes by key. *key* is hexadecimal text; *ttl* is in seconds.

    No method raises for transient errors: an unreadable value is a miss, a value that cannot be
    written is dropped, and without a lock service the caller proceeds as if it had the lock.
    """

    def get(self, key: str) -> StoredValue | None:
        """The stored value, or ``None``."""

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Store *value* atomically."""

    def lock(self, key: str, *, timeout: float) -> AbstractContextManager[bool]:
        """
        Hold the lock of *key* during the context; wait for it at most *timeout* seconds.

        Yields False if another holder still has it. The lock is released if its holder dies.
        """


class MemoryStore:
    """Keeps values in this process only."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}
        self._locks: dict[str, threading.Lock] = {}
        after_fork(self._locks_afresh)

    def _locks_afresh(self) -> None:
        self._locks = {}

    def get(self, key: str) -> StoredValue | None:
        """The stored value, or ``None``."""
        value = self._kept.get(key)
        return StoredValue(value) if value is not None else None

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Store *value*. *ttl* is ignored: readers check the expiry in the value."""
        del ttl
        self._kept[key] = value

    @contextlib.contextmanager
    def lock(self, key: str, *, timeout: float) -> Iterator[bool]:
        """Hold the lock of *key* within this process."""
        notice_fork()
        lock = self._locks.setdefault(key, threading.Lock())
        held = lock.acquire(timeout=timeout)
        try:
            yield held
        finally:
            if held:
                lock.release()


class FileStore:
    """
    A directory (0700) with one file (0600) per key, for the processes of one user on one machine.

    Files are replaced atomically. A file that is a link, belongs to another user or can be read by
    others is refused (ConfigurationError), because somebody else has changed it. The kernel
    releases a lock when its process dies, even if child processes remain.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # End of validity of the last check of the directory (monotonic clock, seconds).
        self._checked_until = 0.0

    def get(self, key: str) -> StoredValue | None:
        """
        The stored value, or ``None``; ConfigurationError if others could change or read the file.
        """
        self._check_directory()
        path = self._directory / f"{key}.json"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise _unsafe(path, "is a link") from exc
            _log.warning("cache %s: a token could not be read (%s)", self._directory, exc.strerror)
            return None
        try:
            if (why := files.not_private(os.fstat(descriptor), stat.S_IFREG)) is not None:
                raise _unsafe(path, why)
            with open(descriptor, "rb", closefd=False) as file:
                value = file.read(LARGEST + 1)
        except OSError as exc:
            _log.warning("cache %s: a token could not be read (%s)", self._directory, exc.strerror)
            return None
        finally:
            os.close(descriptor)
        return StoredValue(value) if len(value) <= LARGEST else None

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Store *value* atomically. If that fails, as on a full disk, it logs a warning."""
        del ttl
        self._check_directory()
        try:
            files.replace(self._directory / f"{key}.json", value, fsync=False)
        except OSError as exc:
            # No error: the caller has the token, and the next process renews.
            _log.warning(
                "cache %s: a token could not be stored (%s)", self._directory, exc.strerror
            )

    @contextlib.contextmanager
    def lock(self, key: str, *, timeout: float) -> Iterator[bool]:
        """
        Hold the lock of *key* among the processes that use this directory. ConfigurationError
        (``cache-unusable``, ``cache-unsafe``) if others can change the directory.
        """
        from filelock import FileLock, Timeout  # noqa: PLC0415 - not needed for a token that is found

        self._check_directory()
        lock = FileLock(self._directory / f"{key}.lock", mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=timeout, poll_interval=0.02)
        except Timeout:
            yield False
            return
        except OSError as exc:
            _log.warning(
                "cache %s: no lock (%s); this process renews without it",
                self._directory,
                exc.strerror,
            )
            yield True
            return
        try:
            yield True
        finally:
            try:
                lock.release()
            except OSError as exc:
                _log.warning(
                    "cache %s: a lock could not be released (%s)", self._directory, exc.strerror
                )

    def _check_directory(self) -> None:
        """Create the directory if necessary. ConfigurationError if others can change it."""
        now = time.monotonic()
        try:
            if now < self._checked_until:
                # Each file in it is checked whenever it is opened.
                files.make_directory(self._directory)
                return
            files.make_private_directory(self._directory)
        except files.NotPrivate as exc:
            raise _unsafe(self._directory, exc.strerror, self._hint(exc.place)) from exc
        except OSError as exc:
            raise ConfigurationError(
                f"cache directory {self._directory}: cannot be used ({exc.strerror})",
                hint="set HSMTOLL_CACHE=file:///DIR to a directory of yours, or memory:",
                code="cache-unusable",
            ) from exc
        self._checked_until = now + _CHECK_HOLDS

    def _hint(self, place: Path) -> str | None:
        if place != self._directory:
            return (
                "set HSMTOLL_CACHE=file:///DIR where root or you own each directory of the path,"
                " and nobody else can write to it; or memory:"
            )
        seen = place.lstat()
        if not stat.S_ISDIR(seen.st_mode):
            return None
        # The mode of a volume's root often cannot be changed, but a directory can be created in it.
        below = (
            f"set HSMTOLL_CACHE=file://{sanitized(place / 'hsmtoll')}, which is made with mode 0700"
        )
        return f"chmod 700 {sanitized(place)}, or {below}" if seen.st_uid == os.geteuid() else below


def _unsafe(path: Path, why: str | None, hint: str | None = None) -> ConfigurationError:
    return ConfigurationError(
        f"cache {path}: {why}",
        hint=hint or "tokens are stored there: find out who changed it, then remove it",
        code="cache-unsafe",
    )


def name_of(*parts: object) -> str:
    """A key for *parts*: a SHA-256 in hexadecimal, which does not reveal them."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
