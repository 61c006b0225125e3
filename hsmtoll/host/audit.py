"""
Writes the audit log: what was signed for whom, in hash-chained records with signed checkpoints.

A record is on disk before the host acts on it. Assertions, tokens and PINs are never written, only
their hashes. `audit_log` describes the files, and verifies them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll import directories, files
from hsmtoll.errors import AuditBroken, ConfigurationError, sanitized
from hsmtoll.host.audit_log import (
    EVENTS,
    LONGEST_LINE,
    MAX_UNSEALED,
    MEMBERS,
    Checkpoint,
    Report,
    checkpoints_of,
    segments_of,
    segments_since,
    sha256,
    stamp,
    verify,
)
from hsmtoll.host.quota import DAY, Usage
from hsmtoll.host.recent import Recent
from hsmtoll.host.required import needed
from hsmtoll.jsonio import read_strict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll.host.policy import Counts
    from hsmtoll.settings import Settings

__all__ = ["Audit", "noted_checkpoint", "private_key", "verify_recent"]

_log = logging.getLogger("hsmtoll.audit")

# Built once: each grant has two records.
_NAMES: Final = frozenset(MEMBERS)
_JSON: Final = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))

#: A checkpoint is due after so many records or seconds, and is made outside the lock, after a sync
#: or by the timer. At the larger bounds (MAX_UNSEALED, _MOST_SECONDS) it is made inside the lock,
#: before the next record, so that `audit_log.verify` accepts what a killed host leaves.
_DUE_RECORDS: Final = 50
_DUE_SECONDS: Final = 30.0
_MOST_SECONDS: Final = 60.0

_SEGMENT: Final = 8 * 1024 * 1024
_CLOSED: Final = "it is closed"
_MAKE_KEY: Final = (
    "openssl genpkey -algorithm ed25519 -out audit.key; it is for the host's account alone"
)


class Audit:
    """
    The only writer of a log. Thread-safe.

    Opening verifies the records of the last day, from the checkpoint before them on. A log that
    does not verify, or that ends before the checkpoint noted in *noted* (a file outside of
    *directory*), is not continued. Once a write has failed, every method that writes raises
    AuditBroken, so nothing is signed any more. *progress* is called often while records are read.

    An appended record is on disk after `sync`; one fsync serves all records before it. *fsync* is
    for tests.
    """

    def __init__(
        self,
        directory: Path,
        key: Path,
        *,
        now: Callable[[], float],
        noted: Path,
        progress: Callable[[], None] = lambda: None,
        fsync: Callable[[int], None] = os.fsync,
    ) -> None:
        self._directory = directory
        self._noted = noted
        self._now = now
        self._fsync = fsync
        self._lock = threading.Lock()
        self._key = private_key(key)
        files.check_own(directory, "HSMTOLL_HOST__AUDIT_DIR")
        self._broken: str | None = None
        self._usage = Usage()
        self._recent = Recent()
        # Held to use a descriptor outside of `_lock`, and to close old ones.
        self._syncing = threading.Lock()
        self._retired: list[int] = []
        # Taken last, after either of the two: one checkpoint is written at a time.
        self._checkpointing = threading.Lock()
        try:
            files.make_directory(noted.parent)
        except OSError as exc:
            raise ConfigurationError(
                f"HSMTOLL_STATE {sanitized(noted.parent)}: cannot be made ({exc.strerror})",
                hint="an existing directory of the host's account, 0700, outside of the audit's",
                code="state-unwritable",
            ) from exc
        with contextlib.ExitStack() as opening:
            try:
                files.make_directory(directory)
                lock = directory / "lock"
                self._owner = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                opening.callback(os.close, self._owner)
                fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._continue(self._read_back(progress))
            except OSError as exc:
                raise AuditBroken(
                    f"audit {sanitized(directory)}: cannot be written ({exc.strerror})",
                    hint="one signing host writes it, and its account must own the directory",
                    code="audit-unwritable",
                ) from exc
            opening.pop_all()

    def _continue(self, report: Report) -> None:
        """Continue the log after the last record of *report*."""
        self.seq, self.head, self._synced = report.seq, report.head, report.seq
        self._sealed_seq, self._sealed_at = report.sealed, self._now()
        self._checkpoint_sha256 = report.checkpoint_sha256
        # The time of the oldest record that no checkpoint covers, or an earlier time.
        self._oldest = self._now()
        self._path, self._file, self._size, self._checkpoints = self._opened()
        if report.sealed < report.seq:
            # A killed host wrote these records, or somebody else: the checkpoint marks them.
            span = (report.sealed + 1, report.seq)
            self._put_checkpoint(report.seq, report.head, unverified=span)

    def _read_back(self, progress: Callable[[], None]) -> Report:
        before = 0.0

        def seen(record: dict[str, Any]) -> None:
            nonlocal before
            at = datetime.fromisoformat(record["time"]).timestamp()
            if at < before:
                self._usage.clamp_to(at)
            before = at
            if at >= since:
                self._usage.add(record, at)
                self._recent.add(record)
            if record["seq"] % 1000 == 0:
                progress()

        since = self._now() - DAY
        report = verify_recent(self._directory, self._key, self._noted, since=since, seen=seen)
        if segments := segments_of(self._directory):
            if not self._noted.exists():
                _log.warning(
                    "audit %s: there is no note of its last checkpoint at %s: records may have been"
                    " cut off; compare the log with an audit head in the system log"
                    " (`hsmtoll audit verify --head`)",
                    self._directory, self._noted,
                )  # fmt: skip
            # A crash in the middle of a write leaves half a line. It was never acknowledged.
            for file in (segments[-1], checkpoints_of(segments[-1])):
                if file.exists():
                    _drop_half_line(file)
        return report

    def _opened(self) -> tuple[Path, int, int, int]:
        """Open the segment to append to: path, descriptor, size, descriptor of its checkpoints."""
        segments = segments_of(self._directory)
        if segments and segments[-1].stat().st_size < _SEGMENT:
            path = segments[-1]
        else:
            path = self._directory / f"audit-{self.seq + 1:012d}.jsonl"
            self._carry_over(segments, path)
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        checkpoints = os.open(checkpoints_of(path), flags, 0o640)
        descriptor = os.open(path, flags, 0o640)
        files.sync_directory(self._directory)
        return path, descriptor, os.fstat(descriptor).st_size, checkpoints

    def _check_untouched(self) -> None:
        """OSError if something else has moved, replaced or changed the segment."""
        there, ours = self._path.stat(), os.fstat(self._file)
        if not os.path.samestat(there, ours) or there.st_size != self._size:
            raise OSError(errno.EBADF, f"{self._path.name} was moved, replaced or changed")

    def _carry_over(self, segments: list[Path], fresh: Path) -> None:
        """Begin the checkpoints of *fresh* with the last one of the segment before."""
        if segments:
            last = checkpoints_of(segments[-1]).read_bytes().splitlines(keepends=True)[-1]
            files.replace(checkpoints_of(fresh), last, mode=0o640)

    def write(self, event: str, **members: Any) -> tuple[int, str]:
        """Append a record and sync it; returns its seq and the head. Raises AuditBroken."""
        seq, head = self.append(event, **members)
        self.sync(seq)
        return seq, head

    def append(self, event: str, **members: Any) -> tuple[int, str]:
        """Append a record, which is on disk only after `sync`; returns its seq and the head."""
        if event not in EVENTS or not members.keys() <= _NAMES:
            raise ValueError("not a member of an audit record")
        with self._lock:
            if self._broken:
                raise self._unwritable(self._broken)
            now = self._now()
            try:
                self._check_untouched()
                unsealed = self.seq - self._sealed_seq
                full = self._size >= _SEGMENT
                late = abs(now - self._oldest) >= _MOST_SECONDS
                if unsealed and (full or late or unsealed >= MAX_UNSEALED):
                    # Synced here: refusals are appended without a sync, and may be many at once.
                    self._fsync(self._file)
                    self._put_checkpoint(self.seq, self.head)
                if full:
                    # The old one is on disk: a crash leaves no segment without its predecessor.
                    fresh = self._opened()
                    self._retired += [self._file, self._checkpoints]
                    self._path, self._file, self._size, self._checkpoints = fresh
                record = dict.fromkeys(MEMBERS) | members
                record |= {
                    "seq": self.seq + 1, "time": stamp(now), "prev": self.head, "event": event,
                }  # fmt: skip
                line = _JSON.encode(record).encode("ascii") + b"\n"
                if len(line) > LONGEST_LINE:
                    raise ValueError("longer than a record is read back")
                self._append(line)
            except OSError as exc:
                raise self._breaks(exc) from exc
            if self.seq == self._sealed_seq:
                self._oldest = now
            self.seq, self.head = self.seq + 1, sha256(line)
            self._usage.add(record, now)
            self._recent.add(record)
            return self.seq, self.head

    def sync(self, seq: int) -> None:
        """Wait until the record *seq* is on disk. AuditBroken if that fails."""
        with self._syncing:
            if seq > self._synced:
                self._flushed()
        self.seal_if_due()

    def _flushed(self) -> tuple[int, str]:
        """
        Sync all records; returns the seq and the head that are on disk. Called with `_syncing`
        held and `_lock` free, so that appends do not wait for the disk.
        """
        with self._lock:
            if self._broken:
                raise self._unwritable(self._broken)
            upto, head, file = self.seq, self.head, self._file
            # They are synced, and no other thread uses them: `_syncing` is held.
            while self._retired:
                os.close(self._retired.pop())
        try:
            self._fsync(file)
        except OSError as exc:
            raise self._breaks(exc) from exc
        self._synced = upto
        return upto, head

    def _append(self, line: bytes) -> None:
        try:
            _write_all(self._file, line)
        except OSError:
            # Remove the partial line: with the next record the log would look altered.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def _breaks(self, exc: OSError) -> AuditBroken:
        self._broken = exc.strerror or "unknown"
        _log.critical("audit %s cannot be written: nothing is signed (%s)", self._directory, exc)
        return self._unwritable(self._broken)

    def _unwritable(self, why: str | None) -> AuditBroken:
        return AuditBroken(
            f"audit {sanitized(self._directory)}: cannot be written ({why})",
            hint="nothing is signed until then: make room, or find out who else changes that file,"
            " and restart the host",
            code="audit-unwritable",
        )

    def seal(self) -> None:
        """Write a checkpoint and log the head, unless the head has one already."""
        with self._syncing:
            self._seal()

    def seal_if_due(self) -> None:
        """Write a checkpoint if one is due. A timer calls it for a log without new records."""
        if self._seal_is_due():
            with self._syncing:
                # Another thread may have written it meanwhile.
                if self._seal_is_due():
                    self._seal()

    def _seal_is_due(self) -> bool:
        # abs(): after the clock was set back, the next one must not be late by as much.
        late = abs(self._now() - self._sealed_at) >= _DUE_SECONDS
        return late or self.seq - self._sealed_seq >= _DUE_RECORDS

    def _seal(self) -> None:
        if self._broken or self.seq == self._sealed_seq:
            return
        # Records first: no checkpoint may be on disk without them after a crash.
        self._put_checkpoint(*self._flushed())

    def _put_checkpoint(
        self, seq: int, head: str, unverified: tuple[int, int] | None = None
    ) -> None:
        """Write a checkpoint of the record *seq*, which is on disk, unless one covers it."""
        with self._checkpointing:
            if seq <= self._sealed_seq:
                return
            now = self._now()
            made = Checkpoint(seq, head, stamp(now), self._checkpoint_sha256, unverified)
            line = made.line(self._key)
            try:
                _write_all(self._checkpoints, line)
                os.fsync(self._checkpoints)
                files.replace(self._noted, json.dumps({"seq": seq, "head": head}).encode())
            except OSError as exc:
                raise self._breaks(exc) from exc
            self._checkpoint_sha256 = sha256(line)
            self._sealed_seq, self._sealed_at = seq, now
        _log.info("audit head %d:%s", seq, head)

    @property
    def unsealed(self) -> int:
        """Number of records that no checkpoint covers."""
        return self.seq - self._sealed_seq

    @property
    def sealed_at(self) -> float:
        """When the last checkpoint was written, in seconds since the epoch."""
        return self._sealed_at

    def recent(self) -> Recent:
        """The last grants and refusals of the last day, oldest first."""
        with self._lock:
            return Recent(self._recent.granted.copy(), self._recent.refused.copy())

    def free_bytes(self) -> int:
        """Room for this account on the disk of the log."""
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    @property
    def broken(self) -> str | None:
        """Why the log cannot be written; ``None`` if it can."""
        return self._broken

    def counts(
        self, caller: str, profile: str, *, of: Literal["signed", "given", "either"] = "either"
    ) -> Counts:
        """
        Usage of *profile* by *caller*: signatures, replies (grants and released tokens), or the
        higher of both.
        """
        with self._lock:
            return self._usage.counts(caller, profile, self._now(), of)

    def free_in(self, caller: str, profile: str, *, minute: int | None, day: int | None) -> float:
        """Seconds until *caller* is below both limits again."""
        with self._lock:
            return self._usage.free_in(caller, profile, self._now(), minute=minute, day=day)

    def close(self) -> None:
        """Write a last checkpoint and release the log. May be called more than once."""
        with contextlib.suppress(AuditBroken):
            self.seal()
        with self._syncing, self._lock:
            if self._broken != _CLOSED:
                self._broken = _CLOSED
                for each in (*self._retired, self._file, self._checkpoints, self._owner):
                    os.close(each)


def verify_recent(
    directory: Path,
    key: Ed25519PrivateKey,
    noted: Path,
    *,
    since: float,
    seen: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Report:
    """
    Verify the records of the log in *directory* after *since* (POSIX time), from the checkpoint
    before them on, and that the checkpoint in the note *noted* is there. A host may be writing.

    Raises AuditBroken for a log that cannot be continued, OSError for files.
    """
    # Before the log is read: a running host goes on writing both.
    known = _read_noted(noted, directory)
    segments = segments_of(directory)
    report = Report()
    if segments:
        recent = segments_since(segments, datetime.fromtimestamp(since, UTC))
        head = known and f"{known[0]}:{known[1]}"
        report = verify(recent, key.public_key(), head, seen=seen)
    sealed = report.checkpoint.seq if report.checkpoint else 0
    if report.bad is None and known is not None and sealed < known[0]:
        report.bad = f"the checkpoint of record {known[0]}, which was noted, is not there"
    if report.bad is not None:
        raise AuditBroken(
            f"audit {sanitized(directory)}: {report.bad}",
            hint="keep it as evidence; a new log begins in another directory"
            " (HSMTOLL_HOST__AUDIT_DIR)",
            code="audit-broken",
        )
    report.sealed = sealed
    return report


def noted_checkpoint(settings: Settings) -> Path:
    """The file with the log's last checkpoint, outside of the log's directory."""
    directory = needed(settings.host.audit_dir, "audit_dir").absolute()
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return (settings.state or directories.state_directory()) / f"audit-{name}.json"


def _read_noted(path: Path, directory: Path) -> tuple[int, str] | None:
    """The last checkpoint of the host that writes *directory*, from its note at *path*."""
    try:
        noted = read_strict(path.read_bytes())
        return int(noted["seq"]), str(noted["head"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise AuditBroken(
            f"audit {sanitized(directory)}: the note of its last checkpoint,"
            f" {sanitized(path)}, cannot be read",
            hint="verify the log (`hsmtoll audit verify`), then remove that file",
            code="audit-broken",
        ) from exc


def _write_all(descriptor: int, line: bytes) -> None:
    written = os.write(descriptor, line)
    # After a short write, the next one raises the reason.
    while written < len(line):
        written += os.write(descriptor, line[written:])


def _drop_half_line(file: Path) -> None:
    raw = file.read_bytes()
    if raw and not raw.endswith(b"\n"):
        with file.open("r+b") as whole:
            whole.truncate(raw.rfind(b"\n") + 1)
            os.fsync(whole.fileno())


def private_key(path: Path) -> Ed25519PrivateKey:
    """HSMTOLL_HOST__AUDIT_KEY. ConfigurationError if it is not safe, or not an Ed25519 key."""
    raw = files.read(path, "HSMTOLL_HOST__AUDIT_KEY", secret=True, code="audit-key", hint=_MAKE_KEY)
    try:
        key = serialization.load_pem_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # `from None`: the original may carry the key.
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(
            f"HSMTOLL_HOST__AUDIT_KEY {sanitized(path)}: not an Ed25519 private key in PEM",
            hint=_MAKE_KEY,
            code="audit-key",
        ) from None
    return key
