"""
Where issued tokens lie between calls: memory, files, Redis, behind one protocol of three methods.

A store keeps bytes under a key and never looks into them. What is fresh, who renews and what
an unreadable value means is decided in cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from typing import TYPE_CHECKING, Final, Protocol

from filelock import FileLock, Timeout

from hsmtoll.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["FileStore", "MemoryStore", "Store"]

#: A stored value is a token of some kilobytes; more is not ours.
_LARGEST: Final = 256 * 1024


class Store(Protocol):
    """
    Bytes by key. *key* is hexadecimal text; *ttl* is in seconds.

    None of the methods raises for trouble that passes: an unreadable value is a miss, a value
    that cannot be kept is not kept, a lock that cannot be had is told by False.
    """

    #: Whether what lies here outlives the process, or is seen by others.
    shared: bool

    def get(self, key: str) -> bytes | None:
        """What was put, or ``None``."""

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Keep *value*, whole or not at all."""

    def lock(self, key: str, *, patience: float) -> AbstractContextManager[bool]:
        """
        Hold the lock of *key* while the context lasts; at most *patience* seconds of waiting.

        Yields whether it is held. A holder that dies frees it.
        """


class MemoryStore:
    """The process alone. It stores nothing: the cache above holds the living tokens itself."""

    shared = False

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}
        self._locks: dict[str, threading.Lock] = {}

    def get(self, key: str) -> bytes | None:
        """What was put, or ``None``."""
        return self._kept.get(key)

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Keep *value*; the reader sees by the value whether it is over."""
        del ttl
        self._kept[key] = value

    @contextlib.contextmanager
    def lock(self, key: str, *, patience: float) -> Iterator[bool]:
        """Hold the lock of *key* within this process."""
        lock = self._locks.setdefault(key, threading.Lock())
        held = lock.acquire(timeout=patience)
        try:
            yield held
        finally:
            if held:
                lock.release()


class FileStore:
    """
    A directory (0700) with a file (0600) a key, for the processes of one user on one machine.

    Files are replaced whole. Whatever is a link, belongs to another or may be read by others
    is refused with ConfigurationError: somebody has touched it. A lock is freed by the kernel
    when its process dies.
    """

    shared = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, key: str) -> bytes | None:
        """What was put, or ``None``; ConfigurationError if the file is not safely ours."""
        self._checked_directory()
        path = self._directory / f"{key}.json"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise _unsafe(path, "is a link or cannot be opened") from exc
        with os.fdopen(descriptor, "rb") as file:
            _check(path, os.fstat(descriptor), stat.S_IFREG)
            value = file.read(_LARGEST + 1)
        return value if len(value) <= _LARGEST else None

    def put(self, key: str, value: bytes, *, ttl: float) -> None:
        """Keep *value* by an atomic replace; a full disk keeps nothing and breaks nothing."""
        del ttl
        self._checked_directory()
        draft = self._directory / f".{key}.{os.getpid()}.{threading.get_ident()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
                file.write(value)
            draft.replace(self._directory / f"{key}.json")
        except OSError:
            # Fail soft: the caller has the token; the next process renews.
            with contextlib.suppress(OSError):
                draft.unlink()

    @contextlib.contextmanager
    def lock(self, key: str, *, patience: float) -> Iterator[bool]:
        """Hold the lock of *key* among the processes that use this directory."""
        self._checked_directory()
        lock = FileLock(self._directory / f"{key}.lock", mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=patience, poll_interval=0.02)
        except (Timeout, OSError):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _checked_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            seen = self._directory.lstat()
        except OSError as exc:
            raise ConfigurationError(
                f"cache directory {self._directory}: cannot be used ({exc.strerror})",
                hint="set HSMTOLL_CACHE=file:///DIR to a directory of yours, or memory:",
            ) from exc
        _check(self._directory, seen, stat.S_IFDIR)


def _check(path: Path, seen: os.stat_result, kind: int) -> None:
    if stat.S_IFMT(seen.st_mode) != kind:
        raise _unsafe(path, "is not what was put there")
    if seen.st_uid != os.geteuid():
        raise _unsafe(path, "belongs to another user")
    if seen.st_mode & 0o077:
        raise _unsafe(path, f"may be used by others (mode {stat.S_IMODE(seen.st_mode):04o})")


def _unsafe(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"cache {path}: {why}",
        hint="tokens lie there: look who did that, then remove it",
        code="cache-unsafe",
    )


def name_of(*parts: object) -> str:
    """A key for *parts*: hexadecimal, unambiguous, telling nothing of them."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
