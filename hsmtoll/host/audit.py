"""
What was signed for whom: a chain of lines on disk, sealed by a key of its own.

A line holds the SHA-256 of the one before; every hundred lines or minute the head is signed
with the audit key. No assertion, token or PIN enters: only their hashes do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import operator
import os
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Final, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hsmtoll.errors import AuditBroken, ConfigurationError, foreign
from hsmtoll.host.policy import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["EVENTS", "MEMBERS", "Audit", "Report", "list_records", "verify"]

_log = logging.getLogger("hsmtoll.audit")

# fmt: off
MEMBERS: Final = (
    "seq", "time", "prev", "event", "caller", "profile", "scope", "options", "jti", "iat", "exp",
    "cert_sha256", "assertion_sha256", "token_sha256", "policy_sha256", "outcome",
)
# fmt: on
EVENTS: Final = frozenset(
    {"intent", "result", "release", "refused", "policy", "certificate", "start", "stop"}
)
# Made once, for the two records of each grant.
_NAMES: Final = frozenset(MEMBERS)
_NUMBERS: Final = frozenset({"seq", "iat", "exp"})
_TEXTS: Final = _NAMES - _NUMBERS - {"options"}
_JSON: Final = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))
_FIRST: Final = "0" * 64
_EVERY: Final = 100
_SECONDS: Final = 60.0
#: Records at the end that no seal covers yet: the host seals before there are more.
_MOST_UNSEALED: Final = 10 * _EVERY
_SEGMENT: Final = 16 * 1024 * 1024
_SEALS: Final = "checkpoints.jsonl"
_CLOSED: Final = "it is closed"
_DAY: Final = 86_400.0
_MINUTE: Final = 60.0

#: Outcomes that say: the device was not asked, so nothing was had.
_NOT_ASKED: Final = ("device-down", "device-busy", "busy", "stopped")


def _sealed(seq: int, head: str, at: str) -> bytes:
    return f"hsmtoll audit checkpoint\n{seq}\n{head}\n{at}\n".encode()


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")


def _segments(path: Path) -> list[Path]:
    return sorted(path.glob("audit-*.jsonl")) if path.is_dir() else [path]


def _lines(path: Path) -> Iterator[bytes]:
    # As long as they are now: a host that writes on must not keep its reader for ever.
    for segment, size in [(each, each.stat().st_size) for each in _segments(path)]:
        left = size
        with segment.open("rb") as file:
            while left > 0 and (line := file.readline()):
                left -= len(line)
                yield line


class _Window:
    """When something was had, by jti: of the last day and, apart, of the last minute."""

    def __init__(self) -> None:
        self._spans = {_MINUTE: deque[tuple[float, str]](), _DAY: deque[tuple[float, str]]()}
        self._newest = 0.0

    def not_after(self, now: float) -> None:
        """
        The clock said more before: it was ahead then. What it called later was had by *now*, and
        no span is longer for it.
        """
        if self._newest > now:
            self._newest = now
            for span, each in self._spans.items():
                self._spans[span] = deque((min(at, now), jti) for at, jti in each)

    def add(self, at: float, jti: str = "") -> None:
        """One more, the newest."""
        self.not_after(at)
        self._newest = at
        for each in self._spans.values():
            each.append((at, jti))

    def take_back(self, jti: str) -> None:
        """Not had after all: the newest of that jti."""
        for each in self._spans.values():
            # From its end: it was added a moment ago.
            for place in range(len(each) - 1, -1, -1):
                if each[place][1] == jti:
                    del each[place]
                    break

    def of(self, span: float, now: float) -> deque[tuple[float, str]]:
        """Those of the last *span* seconds, oldest first: a look costs the same however many."""
        self.not_after(now)
        each = self._spans[span]
        while each and each[0][0] <= now - span:
            each.popleft()
        return each


@dataclass(slots=True)
class _Had:
    """When a caller was signed for, and when something was handed to it."""

    signed: _Window = field(default_factory=_Window)
    given: _Window = field(default_factory=_Window)


class Audit:
    """
    The one writer. Every method may be called from any thread.

    Opening reads all that is there: a log that does not verify is not continued. AuditBroken
    from then on for whatever cannot be written: nothing may be signed after that.

    A record is decided about and appended inside `held`, and on disk after `sync`: one fsync
    serves all who wait for it, so that a crowd costs no more than a few. *fsync* is for tests.
    """

    def __init__(
        self,
        directory: Path,
        key: Path,
        *,
        now: Callable[[], float],
        fsync: Callable[[int], None] = os.fsync,
    ) -> None:
        self._directory = directory
        self._now = now
        self._fsync = fsync
        self._lock = threading.RLock()
        self._key = _private(key)
        self._broken: str | None = None
        self._had: defaultdict[tuple[str, str], _Had] = defaultdict(_Had)
        self.seq, self.head = 0, _FIRST
        self._sealed_seq, self._sealed_at = 0, now()
        # Whoever has it may use a descriptor outside the critical section, and closes old ones.
        self._syncing = threading.Lock()
        self._retired: list[int] = []
        self._synced = 0
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._owner = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_back()
            self._file, self._size = self._opened()
        except OSError as exc:
            raise AuditBroken(
                f"audit {directory}: cannot be written ({exc.strerror})",
                hint="one signing host writes it, and its account must own the directory",
                code="audit-unwritable",
            ) from exc

    def _read_back(self) -> None:
        segments = _segments(self._directory)
        if segments:
            # A crash in the middle of a write leaves half a line. It was never acknowledged.
            _drop_half_line(segments[-1])
        if (self._directory / _SEALS).exists():
            _drop_half_line(self._directory / _SEALS)
        report = verify(self._directory, self._key.public_key())
        if report.bad is not None:
            raise AuditBroken(
                f"audit {self._directory}: {report.bad}",
                hint="keep it as evidence, and start with an empty directory",
                code="audit-broken",
            )
        self.seq, self.head = report.seq, report.head
        self._sealed_seq, self._synced = report.sealed, report.seq
        since, before = self._now() - _DAY, 0.0
        for line in _lines(self._directory):
            record = json.loads(line)
            at = datetime.fromisoformat(record["time"]).timestamp()
            if at < before:
                for had in self._had.values():
                    had.signed.not_after(at)
                    had.given.not_after(at)
            before = at
            if at >= since:
                self._count(record, at)

    def _opened(self) -> tuple[int, int]:
        segments = _segments(self._directory)
        if segments and segments[-1].stat().st_size < _SEGMENT:
            path = segments[-1]
        else:
            path = self._directory / f"audit-{self.seq + 1:012d}.jsonl"
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o640)
        _sync_directory(self._directory)
        return descriptor, os.fstat(descriptor).st_size

    def write(self, event: str, **members: Any) -> tuple[int, str]:
        """One record, on disk when this returns. The seq and the head; AuditBroken otherwise."""
        seq, head = self.append(event, **members)
        self.sync(seq)
        return seq, head

    def append(self, event: str, **members: Any) -> tuple[int, str]:
        """One record, not yet safe: nothing may follow from it before `sync` of its seq."""
        if event not in EVENTS or not members.keys() <= _NAMES:
            raise ValueError("not a member of an audit record")
        with self._lock:
            if self._broken:
                raise self._unwritable(self._broken)
            now = self._now()
            record = dict.fromkeys(MEMBERS) | members
            record |= {
                "seq": self.seq + 1, "time": _stamp(now), "prev": self.head, "event": event,
            }  # fmt: skip
            line = _JSON.encode(record).encode("ascii") + b"\n"
            try:
                if self.seq - self._sealed_seq >= _MOST_UNSEALED:
                    # Waited for here, too: refusals wait for no disk, and may be many at once.
                    self._fsync(self._file)
                    self._put_seal(self.seq, self.head)
                if self._size >= _SEGMENT:
                    # Waited for here, once in thousands: a segment never outlives its predecessor.
                    os.fsync(self._file)
                    fresh = self._opened()
                    self._retired.append(self._file)
                    self._file, self._size = fresh
                self._append(line)
            except OSError as exc:
                raise self._breaks(exc) from exc
            self.seq, self.head = self.seq + 1, hashlib.sha256(line[:-1]).hexdigest()
            self._count(record, now)
            return self.seq, self.head

    def sync(self, seq: int) -> None:
        """Wait until the record *seq* is on disk; AuditBroken if it cannot be known to be."""
        with self._syncing:
            if seq > self._synced:
                self._flushed()
        self.seal_if_due()

    def _flushed(self) -> tuple[int, str]:
        """
        The seq and the head that are on disk now. Whoever has `_syncing` calls it, outside of the
        critical section: nobody who decides waits for the disk.
        """
        with self._lock:
            if self._broken:
                raise self._unwritable(self._broken)
            upto, head, file = self.seq, self.head, self._file
            # Synced before; another one may still have been at it until now.
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
            written = os.write(self._file, line)
            # What is left over after a short write says why itself.
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            # Half a line must not stay: what follows would look as if it had been changed.
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
            f"audit {self._directory}: cannot be written ({why})",
            hint="nothing is signed until it can: make room, then restart the host",
            code="audit-unwritable",
        )

    def seal(self) -> None:
        """Sign the head, and tell it to the system log. Nothing if it was sealed before."""
        with self._syncing:
            self._seal()

    def seal_if_due(self) -> None:
        """Every hundred records or sixty seconds; a timer calls it, for logs that are quiet."""
        if self._seal_is_due():
            with self._syncing:
                # Another one may have done it meanwhile.
                if self._seal_is_due():
                    self._seal()

    def _seal_is_due(self) -> bool:
        # A clock that was ahead must not make the next one late for as long.
        late = abs(self._now() - self._sealed_at) >= _SECONDS
        return late or self.seq - self._sealed_seq >= _EVERY

    def _seal(self) -> None:
        if self._broken or self.seq == self._sealed_seq:
            return
        # A seal must not outlive what it seals.
        self._put_seal(*self._flushed())

    def _put_seal(self, seq: int, head: str) -> None:
        """Those up to *seq* are on disk."""
        now = self._now()
        at = _stamp(now)
        signature = self._key.sign(_sealed(seq, head, at)).hex()
        seal = {"seq": seq, "head": head, "time": at, "signature": signature}
        try:
            path = self._directory / _SEALS
            with path.open("ab") as file:
                file.write(json.dumps(seal).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if not self._sealed_seq:
                # Without its first seal a log is not believed after a crash.
                _sync_directory(self._directory)
        except OSError as exc:
            raise self._breaks(exc) from exc
        # One for more records may have been put meanwhile.
        self._sealed_seq, self._sealed_at = max(self._sealed_seq, seq), now
        _log.info("audit head %d:%s", seq, head)

    @property
    def broken(self) -> str | None:
        """Why nothing can be written, if so."""
        return self._broken

    def held(self) -> threading.RLock:
        """
        The critical section: what is decided and appended in it is one step. Never wait for the
        disk inside (`sync`, `write`): who syncs needs the section in turn.
        """
        return self._lock

    def counts(
        self, caller: str, profile: str, *, of: Literal["signed", "given", "either"] = "either"
    ) -> Counts:
        """
        What *caller* had of *profile*: signatures, what was given (a grant or a token's release),
        or whichever is more.
        """
        with self._lock:
            now = self._now()
            seen = self._windows(caller, profile, of)
            return Counts(
                minute=max((len(each.of(_MINUTE, now)) for each in seen), default=0),
                day=max((len(each.of(_DAY, now)) for each in seen), default=0),
            )

    def free_in(self, caller: str, profile: str, *, minute: int | None, day: int | None) -> float:
        """Seconds until *caller* is below both limits again."""
        with self._lock:
            now = self._now()
            waits = [1.0]
            for window in self._windows(caller, profile, "either"):
                for limit, span in ((minute, _MINUTE), (day, _DAY)):
                    each = window.of(span, now)
                    if limit == 0:
                        waits.append(span)
                    elif limit is not None and len(each) >= limit:
                        waits.append(each[-limit][0] + span - now)
            return max(waits)

    def _windows(self, caller: str, profile: str, of: str) -> list[_Window]:
        had = self._had.get((caller, profile))
        if had is None:
            return []
        if of == "signed":
            return [had.signed]
        return [had.given] if of == "given" else [had.signed, had.given]

    def _count(self, record: dict[str, Any], at: float) -> None:
        event, jti = record["event"], str(record["jti"])
        if event not in ("intent", "result", "release"):
            return
        had = self._had[str(record["caller"]), str(record["profile"])]
        grant = (record["options"] or {}).get("mode", "grant") == "grant"
        windows = [had.signed, had.given] if grant else [had.signed]
        if event == "intent":
            for each in windows:
                each.add(at, jti)
        elif event == "release":
            had.given.add(at)
        elif record["outcome"] in _NOT_ASKED:
            for each in windows:
                each.take_back(jti)

    def close(self) -> None:
        """Seal, and let another host have it; a second time changes nothing."""
        with contextlib.suppress(AuditBroken):
            self.seal()
        with self._syncing, self._lock:
            if self._broken != _CLOSED:
                self._broken = _CLOSED
                for each in (*self._retired, self._file, self._owner):
                    os.close(each)


def _drop_half_line(segment: Path) -> None:
    raw = segment.read_bytes()
    if raw and not raw.endswith(b"\n"):
        with segment.open("r+b") as file:
            file.truncate(raw.rfind(b"\n") + 1)
            os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise ConfigurationError(
            f"HSMTOLL_HOST__AUDIT_KEY {path}: cannot be read ({exc.strerror})",
            hint="openssl genpkey -algorithm ed25519 -out audit.key; it is for the host's account",
            code="audit-key",
        ) from exc
    try:
        key = serialization.load_pem_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # `from None`: the original may carry the key.
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(
            f"HSMTOLL_HOST__AUDIT_KEY {path}: not an Ed25519 private key in PEM",
            hint="openssl genpkey -algorithm ed25519 -out audit.key",
            code="audit-key",
        ) from None
    return key


def _public(given: Path | Ed25519PublicKey) -> Ed25519PublicKey:
    if isinstance(given, Ed25519PublicKey):
        return given
    try:
        key = serialization.load_pem_public_key(given.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigurationError(f"public key {given}: cannot be read as PEM") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError(f"public key {given}: not an Ed25519 key")
    return key


@dataclass(frozen=True, slots=True)
class Report:
    """
    Of a verification: *bad* names the first bad record, ``None`` if all is well. *seq* and
    *head* of the last record, *sealed* the last seq that a seal or a given head anchors,
    *open_intents* the seqs of intents without a result.
    """

    bad: str | None
    seq: int
    head: str
    sealed: int
    open_intents: tuple[int, ...]


def verify(path: Path, public_key: Path | Ed25519PublicKey, head: str | None = None) -> Report:
    """
    Read the log (its directory) and compare each line with the next, the seals and *head*.

    *head*: ``SEQ:HASH`` from a reply or the system log; without it a tail that was cut off
    after the last seal cannot show. A tail that is longer than the host leaves unsealed is bad,
    and so is a log without seals, unless nobody was ever served.
    """
    key = _public(public_key)
    # Before the seals are read: a host writes on meanwhile, and seals that when they were read.
    there = sum(each.stat().st_size for each in _segments(path))
    seals, bad_seal = _seals(path, key)
    anchors = dict(seals)
    if head is not None:
        seq, _, value = head.partition(":")
        if not seq.isdigit() or len(value) != 64:
            raise ConfigurationError("head: SEQ:HASH is expected, from a reply or the system log")
        if anchors.get(int(seq), value) != value:
            return Report(f"record {seq}: not the one of the head given", 0, _FIRST, 0, ())
        anchors[int(seq)] = value
    last, before, sealed, served, judged = 0, _FIRST, 0, False, 0
    open_intents: dict[str, int] = {}
    bad = None
    for line, after in pairwise(chain(_lines(path), (b"",))):
        bad = _wrong(line, last + 1, before, anchors, after)
        if bad is not None:
            break
        record = json.loads(line)
        last, before = record["seq"], hashlib.sha256(line[:-1]).hexdigest()
        if last in anchors:
            sealed = last
        there -= len(line)
        if there >= 0:
            judged, served = last, served or record["event"] != "start"
        if record["event"] == "intent":
            open_intents[str(record["jti"])] = last
        elif record["event"] == "result":
            open_intents.pop(str(record["jti"]), None)
    if bad is None and anchors and max(anchors) > last:
        bad = f"record {last + 1}: cut off; record {max(anchors)} is known to have been there"
    bad = bad or bad_seal
    # The host seals its start before it serves anybody.
    most = _MOST_UNSEALED if seals or not served else 0
    if bad is None and judged - sealed > most:
        bad = f"record {sealed + 1}: no checkpoint vouches for it and those after it"
    return Report(bad, last, before, sealed, tuple(open_intents.values()))


def _wrong(line: bytes, seq: int, before: str, anchors: dict[int, str], after: bytes) -> str | None:
    record = _record(line)
    if record is None:
        return f"record {seq}: changed (not an audit record)"
    if record["seq"] != seq:
        return f"record {seq}: removed or reordered (found {foreign(record['seq'])})"
    if record["prev"] != before:
        # One of two lines was changed: not this one, if what comes later vouches for it.
        own = hashlib.sha256(line[:-1]).hexdigest()
        vouched = own == anchors.get(seq) or own.encode() in after
        return f"record {seq - 1 if vouched and seq > 1 else seq}: changed"
    if anchors.get(seq, "") not in ("", hashlib.sha256(line[:-1]).hexdigest()):
        return f"record {seq}: changed (not what was sealed)"
    return None


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; ``None`` for one that the host cannot have written."""
    try:
        record = json.loads(line)
        if tuple(record) != MEMBERS or not line.endswith(b"\n"):
            return None
        aware = datetime.fromisoformat(record["time"]).tzinfo is not None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    options = {} if record["options"] is None else record["options"]
    fits = (
        aware
        and type(record["seq"]) is int
        and all(isinstance(record[name], int | None) for name in _NUMBERS)
        and all(isinstance(record[name], str | None) for name in _TEXTS)
        and record["event"] in EVENTS
        and isinstance(options, dict)
        and all(
            isinstance(each, str | None)
            for value in options.values()
            for each in (value if isinstance(value, list) else [value])
        )
    )
    return record if fits else None


def _seals(path: Path, key: Ed25519PublicKey) -> tuple[dict[int, str], str | None]:
    file = (path if path.is_dir() else path.parent) / _SEALS
    found: dict[int, str] = {}
    bad = None
    if not file.exists():
        return found, bad
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            seal = json.loads(line)
            seq, head, at = seal["seq"], seal["head"], seal["time"]
            # A seq in quotes would be sealed by the same bytes.
            key.verify(bytes.fromhex(seal["signature"]), _sealed(operator.index(seq), head, at))
        except (ValueError, KeyError, TypeError, RecursionError, InvalidSignature):
            bad = bad or f"checkpoint {number}: not signed by this audit key"
            continue
        found[seq] = head
    return found, bad


def list_records(
    path: Path,
    *,
    caller: str | None = None,
    profile: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[dict[str, Any]]:
    """
    The records of a caller or profile between two aware moments, oldest first. AuditBroken for a
    line that is none, but nothing is verified.
    """
    for number, line in enumerate(_lines(path), 1):
        record = _record(line)
        if record is None:
            raise AuditBroken(
                f"audit {path}: record {number}: changed (not an audit record)",
                hint="`hsmtoll audit verify` tells how far the log is as it was written",
                code="audit-broken",
            )
        at = datetime.fromisoformat(record["time"])
        if (
            (caller is None or record["caller"] == caller)
            and (profile is None or record["profile"] == profile)
            and (since is None or at >= since)
            and (until is None or at < until)
        ):
            yield record
