"""
The audit log on disk: the format of its records and checkpoints, and their verification.

A *segment* is ``audit-N.jsonl``, N the number of its first record, one JSON object a line; each
record holds the SHA-256 of the line before. Beside it lie its *checkpoints*: ``checkpoints.jsonl``
of the first segment, ``checkpoints-N.jsonl`` of a later one. A checkpoint is the head (number and
hash of the last record) signed with the audit key; it holds the hash of the checkpoint before, so
that none can be left out. The first line of ``checkpoints-N.jsonl`` is the last checkpoint of the
segment before: a run of segments is verified without those that were moved away.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hsmtoll.errors import AuditBroken, ConfigurationError, sanitized
from hsmtoll.jsonio import read_strict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "EVENTS", "FIRST", "LONGEST_LINE", "MAX_UNSEALED", "MAX_UNSEALED_SECONDS", "MEMBERS",
    "Checkpoint", "Report", "checkpoints_of", "list_records", "segments_of", "segments_since",
    "sha256", "stamp", "verify",
]  # fmt: skip

# fmt: off
MEMBERS: Final = (
    "seq", "time", "prev", "event", "caller", "profile", "scope", "options", "jti", "iat", "exp",
    "cert_sha256", "assertion_sha256", "token_sha256", "policy_sha256", "outcome",
)
# fmt: on
EVENTS: Final = frozenset(
    {"intent", "result", "release", "refused", "policy", "certificate", "start", "stop"}
)
_NUMBERS: Final = frozenset({"seq", "iat", "exp"})
_TEXTS: Final = frozenset(MEMBERS) - _NUMBERS - {"options"}

#: The hash before the first record, and before the first checkpoint.
FIRST: Final = "0" * 64

#: Records, and their age in seconds, that a host leaves at most after its last checkpoint, however
#: it ends. A longer tail was not written by a host.
MAX_UNSEALED: Final = 100
MAX_UNSEALED_SECONDS: Final = 120.0

#: Bytes of a record. Its options come from a request of 16 KiB, and JSON escapes triple them.
LONGEST_LINE: Final = 128 * 1024
#: Bytes of a checkpoint; they have some 400.
_LONGEST_CHECKPOINT: Final = 1024


def sha256(line: bytes) -> str:
    """SHA-256 (hex) of a line without its line feed."""
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def stamp(now: float) -> str:
    """The `time` of a record; *now* in seconds since the epoch."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")


def segments_of(path: Path) -> list[Path]:
    """
    The segments in a directory, oldest first, or the one segment that *path* is. AuditBroken if a
    segment or its checkpoints are not a regular file.
    """
    segments = sorted(path.glob("audit-*.jsonl")) if path.is_dir() else [path]
    for each in segments:
        for file in (each, checkpoints_of(each)):
            if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
                raise AuditBroken(
                    f"audit {sanitized(file)}: not a file",
                    hint="a log has regular files only, no links: find out who put it there",
                    code="audit-broken",
                )
    return segments


def checkpoints_of(segment: Path) -> Path:
    """The file with the checkpoints of *segment*."""
    first = _first(segment)
    return segment.with_name(
        "checkpoints.jsonl" if first == 1 else f"checkpoints-{first:012d}.jsonl"
    )


def _first(segment: Path) -> int:
    number = segment.stem.removeprefix("audit-")
    if not (number.isascii() and number.isdecimal()):
        raise ConfigurationError(
            f"audit {sanitized(segment)}: not a segment of an audit log",
            hint="give its directory, or files audit-N.jsonl with their checkpoints beside them",
            code="audit-path",
        )
    return int(number)


def segments_since(segments: Sequence[Path], since: datetime | None) -> list[Path]:
    """The segments from the last one that begins before *since*; all without *since*."""
    if since is None:
        return list(segments)
    at = len(segments)
    while at > 0:
        at -= 1
        with segments[at].open("rb") as file:
            record = _record(file.readline(LONGEST_LINE))
        if record is not None and datetime.fromisoformat(record["time"]) < since:
            break
    return list(segments[at:])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    The head at *time*, to be signed: record *seq* with the SHA-256 *head*. *prev* is the SHA-256
    of the checkpoint before. *unverified*: the first and last record that the host found without a
    checkpoint when it started; the checkpoint does not cover them.
    """

    seq: int
    head: str
    time: str
    prev: str
    unverified: tuple[int, int] | None = None

    def line(self, key: Ed25519PrivateKey) -> bytes:
        """The signed line, as it is written."""
        members = {
            "seq": self.seq, "head": self.head, "time": self.time, "prev": self.prev,
            "unverified": self.unverified, "signature": key.sign(self._payload()).hex(),
        }  # fmt: skip
        return json.dumps(members).encode("ascii") + b"\n"

    @staticmethod
    def read(line: bytes, key: Ed25519PublicKey) -> Checkpoint:
        """Read a line. ValueError unless *key* has signed it."""
        not_ours = "not signed by this audit key"
        if len(line) > _LONGEST_CHECKPOINT:
            raise ValueError(not_ours)
        try:
            members = read_strict(line)
            signature = bytes.fromhex(members.pop("signature"))
            span = members.pop("unverified")
            read = Checkpoint(**members, unverified=span and (span[0], span[1]))
            key.verify(signature, read._payload())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError,
                InvalidSignature) as exc:  # fmt: skip
            raise ValueError(not_ours) from exc
        # A number written as a string has the same signed bytes.
        if not all(type(each) is int for each in (read.seq, *(read.unverified or ()))):
            raise ValueError(not_ours)
        return read

    def _payload(self) -> bytes:
        span = "{}-{}".format(*self.unverified) if self.unverified else "-"
        lines = ("hsmtoll audit checkpoint", self.seq, self.head, self.time, self.prev, span)
        return "".join(f"{each}\n" for each in lines).encode()


@dataclass(slots=True)
class Report:
    """
    The result of a verification. *bad* names the first bad record or checkpoint, ``None`` if there
    is none; the rest is as of that record. *after*: the record before the first one that was read,
    0 at the log's beginning. *seq*, *head*: of the last record. *sealed*: the last record that a
    checkpoint or the given head covers; *unverified*: spans before it that none covers.
    *checkpoint*: the last one; *checkpoint_sha256*: its hash. *half_line*: the log ends in the
    middle of a record. *open_intents*: records of intents without a result.
    """

    bad: str | None = None
    after: int = 0
    seq: int = 0
    head: str = FIRST
    sealed: int = 0
    unverified: list[tuple[int, int]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    checkpoint_sha256: str = FIRST
    half_line: bool = False
    open_intents: dict[str, int] = field(default_factory=dict)

    def described(self) -> list[str]:
        """The result in sentences, one a line: which records checkpoints cover, and which not."""
        lines = []
        if self.after:
            lines.append(f"records up to {self.after} are in older segments and were not read")
        if self.sealed > self.after:
            lines.append(
                f"records {self.after + 1} to {self.sealed}: unchanged, covered by checkpoints"
            )
        lines += [
            f"records {first} to {last} of these had no checkpoint when the host started:"
            " their hashes fit, but no checkpoint covers them"
            for first, last in self.unverified
        ]
        if self.seq > self.sealed:
            lines.append(
                f"{self.seq - self.sealed} more, up to {self.seq}, have no checkpoint yet:"
                " their hashes fit, but no checkpoint covers them"
            )
        if self.half_line:
            lines.append("the log ends in the middle of a record, as after a kill of the host")
        lines.append(f"head {self.seq}:{self.head}")
        lines += [f"intent without a result: record {seq}" for seq in self.open_intents.values()]
        return lines


def verify(
    path: Path | Sequence[Path],
    public_key: Path | Ed25519PublicKey,
    head: str | None = None,
    *,
    since: datetime | None = None,
    seen: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Report:
    """
    Verify the chain of records, the checkpoints and *head*.

    *path*: a directory, or consecutive segments. *head*: ``SEQ:HASH`` from a reply or the system
    log; without it, a log that was cut off at an earlier checkpoint is not detected. *since*: begin
    with the segment that has that time. *seen* is called with each verified record. A log is bad
    if more records follow the last checkpoint than a host leaves, and if it has no checkpoint,
    unless nobody was ever served.

    ConfigurationError for a key or a head that cannot be read, OSError for files.
    """
    given = [path] if isinstance(path, Path) else path
    segments = sorted((each for one in given for each in segments_of(one)), key=lambda p: p.name)
    run = _Run(_public(public_key), _head(head), seen)
    if not segments:
        run.report.bad = "no records are there"
        return run.report
    for segment in segments_since(segments, since):
        run.segment(segment)
        if run.report.bad is not None:
            return run.report
    run.end()
    return run.report


class _Run:
    """Verifies consecutive segments, and collects the report."""

    def __init__(
        self,
        key: Ed25519PublicKey,
        given: tuple[int, str] | None,
        seen: Callable[[dict[str, Any]], None],
    ) -> None:
        self.report = Report()
        self._key = key
        self._given = given
        self._seen = seen
        self._begun = False
        self._served = False
        # Number and time: of the first record after the last checkpoint, and of the last record
        # that was there before the checkpoints were read.
        self._tail: tuple[int, float] | None = None
        self._judged: tuple[int, float] = (0, 0.0)

    def segment(self, segment: Path) -> None:
        """Verify the checkpoints of *segment*, then its records."""
        # Before the checkpoints are read: a running host goes on writing.
        there = segment.stat().st_size
        heads = self._checkpoints(checkpoints_of(segment))
        if self.report.bad is None and (
            self.report.half_line or _first(segment) != self.report.seq + 1
        ):
            self.report.bad = (
                f"record {self.report.seq + 1}: not at the beginning of {segment.name}"
            )
        if self.report.bad is not None:
            return
        if self._given is not None:
            seq, value = self._given
            if heads.get(seq, value) != value:
                self.report.bad = f"record {seq}: not the one of the head given"
                return
            heads[seq] = value
        for line, following in pairwise(chain(_lines(segment), (b"",))):
            there -= len(line)
            if not following and not line.endswith(b"\n"):
                self.report.half_line = True
            elif not self._record(line, following, heads, judged=there >= 0):
                return
        known = max(
            (seq for seq in heads if self._given is None or seq != self._given[0]), default=0
        )
        if known > self.report.seq:
            self.report.bad = (
                f"record {self.report.seq + 1}: cut off; record {known} is known to have been there"
            )

    def _checkpoints(self, file: Path) -> dict[int, str]:
        """Verify the checkpoints in *file*; returns their heads by record number."""
        report = self.report
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        heads: dict[int, str] = {}
        carried = file.name != "checkpoints.jsonl"
        if carried and not lines:
            report.bad = f"{file.name}: missing: the records before these cannot be verified"
        for number, line in enumerate(lines, 1):
            try:
                read = Checkpoint.read(line, self._key)
            except ValueError as exc:
                report.bad = f"{file.name}: checkpoint {number}: {exc}"
                break
            if carried and number == 1:
                if self._begun and sha256(line) != report.checkpoint_sha256:
                    report.bad = (
                        f"record {report.seq + 1}: removed, or checkpoints of the segment before it"
                    )
                    break
                if not self._begun:
                    report.after = report.seq = report.sealed = read.seq
                    report.head = read.head
            else:
                if read.prev != report.checkpoint_sha256:
                    report.bad = f"{file.name}: checkpoint {number}: the one before it is missing"
                    break
                heads[read.seq] = read.head
                if read.unverified is not None:
                    report.unverified.append(read.unverified)
            report.checkpoint, report.checkpoint_sha256 = read, sha256(line)
        self._begun = True
        return heads

    def _record(
        self, line: bytes, following: bytes, heads: dict[int, str], *, judged: bool
    ) -> bool:
        report = self.report
        record = _record(line)
        seq = report.seq + 1
        report.bad = _wrong(record, line, seq, before=report.head, heads=heads, following=following)
        if report.bad is not None or record is None:
            return False
        report.seq, report.head = seq, sha256(line)
        at = datetime.fromisoformat(record["time"]).timestamp()
        if seq in heads:
            report.sealed, self._tail = seq, None
        elif self._tail is None:
            self._tail = (seq, at)
        if judged:
            self._judged = (seq, at)
            self._served = self._served or record["event"] != "start"
        if record["event"] == "intent":
            report.open_intents[str(record["jti"])] = seq
        elif record["event"] == "result":
            report.open_intents.pop(str(record["jti"]), None)
        self._seen(record)
        return True

    def end(self) -> None:
        """Verify that nothing was cut off, and that the tail is short enough."""
        report = self.report
        if self._given is not None:
            seq, _ = self._given
            if seq > report.seq:
                report.bad = (
                    f"record {report.seq + 1}: cut off; record {seq} is known to have been there"
                )
                return
        if self._tail is None or self._judged[0] < self._tail[0]:
            return
        (first, began), (last, ended) = self._tail, self._judged
        # The host writes a checkpoint of its start before it serves anybody.
        most = MAX_UNSEALED if report.checkpoint or not self._served else 0
        if last - first + 1 > most or abs(ended - began) > MAX_UNSEALED_SECONDS:
            report.bad = f"record {first}: no checkpoint covers it and the records after it"


def _wrong(
    record: dict[str, Any] | None,
    line: bytes,
    seq: int,
    *,
    before: str,
    heads: dict[int, str],
    following: bytes,
) -> str | None:
    if record is None:
        return f"record {seq}: changed (not an audit record)"
    if record["seq"] != seq:
        return f"record {seq}: removed or reordered (found {sanitized(record['seq'])})"
    own = sha256(line)
    if record["prev"] != before:
        # This line or the one before was changed: not this one if its hash is in the next line
        # or in a checkpoint.
        confirmed = own == heads.get(seq) or own.encode() in following
        return f"record {seq - 1 if confirmed and seq > 1 else seq}: changed"
    if heads.get(seq, own) != own:
        return f"record {seq}: changed (not what was sealed)"
    return None


def list_records(
    path: Path,
    *,
    caller: str | None = None,
    profile: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[dict[str, Any]]:
    """
    The records of a caller or profile between two aware times, oldest first. AuditBroken for a line
    that is not a record; nothing else is verified.
    """
    segments = segments_since(segments_of(path), since)
    for segment in segments:
        for number, line in enumerate(_lines(segment), _first(segment)):
            record = _record(line)
            if record is None and segment == segments[-1] and not line.endswith(b"\n"):
                # A partial line, as a killed host leaves it.
                return
            if record is None:
                raise AuditBroken(
                    f"audit {sanitized(segment)}: record {number}: changed (not an audit record)",
                    hint="`hsmtoll audit verify` reports how far the log is unchanged",
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


def _lines(segment: Path) -> Iterator[bytes]:
    # Up to its present size: a running host could keep its reader busy for ever.
    left = segment.stat().st_size
    with segment.open("rb") as file:
        while left > 0 and (line := file.readline(LONGEST_LINE)):
            left -= len(line)
            yield line


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; ``None`` for one that the host cannot have written."""
    try:
        record = read_strict(line)
        if tuple(record) != MEMBERS or not line.endswith(b"\n"):
            return None
        aware = datetime.fromisoformat(record["time"]).tzinfo is not None
    except (ValueError, TypeError, KeyError):
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


def _head(given: str | None) -> tuple[int, str] | None:
    if given is None:
        return None
    seq, _, value = given.partition(":")
    if not (seq.isascii() and seq.isdecimal() and len(seq) < 16 and len(value) == 64):
        raise ConfigurationError(
            f"head {sanitized(given)}: SEQ:HASH is expected, from a reply or the system log",
            code="audit-head",
        )
    return int(seq), value


def _public(given: Path | Ed25519PublicKey) -> Ed25519PublicKey:
    if isinstance(given, Ed25519PublicKey):
        return given
    try:
        key = serialization.load_pem_public_key(given.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigurationError(
            f"public key {sanitized(given)}: cannot be read as PEM", code="audit-key"
        ) from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError(
            f"public key {sanitized(given)}: not an Ed25519 key", code="audit-key"
        )
    return key
