"""The audit log shows what was done to it, and counts what was had."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.errors import AuditBroken, ConfigurationError
from hsmtoll.host.audit import Audit
from hsmtoll.host.audit_log import (
    _Run,
    _wrong,
    checkpoints_of,
    list_records,
    segments_of,
    verify,
)
from hsmtoll.host.policy import Counts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY = Ed25519PrivateKey.generate()
NOW = 1_790_000_000.0


def audit_in(
    place: Path,
    key: Ed25519PrivateKey = KEY,
    now: float | Callable[[], float] = NOW,
    fsync: Callable[[int], None] = os.fsync,
    noted: str = "noted",
) -> Audit:
    file = place / "audit.key"
    file.touch(0o600)
    file.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    clock = now if callable(now) else lambda: now
    return Audit(place / "log", file, now=clock, noted=place / noted, fsync=fsync)


def intents(audit: Audit, count: int, caller: str = "uid:1") -> None:
    for number in range(count):
        audit.write("intent", caller=caller, profile="acme", jti=f"{caller}-{number}")


def filled(place: Path) -> Path:
    audit = audit_in(place)
    intents(audit, 6)
    audit.close()
    return next((place / "log").glob("audit-*"))


def test_an_untouched_log_is_right_and_names_intents_without_result(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 2)
    seq, head = audit.write("result", caller="uid:1", profile="acme", jti="uid:1-0")
    audit.close()
    report = verify(tmp_path / "log", KEY.public_key(), f"{seq}:{head}")
    assert (report.bad, report.seq, report.sealed) == (None, 3, 3)
    assert list(report.open_intents.values()) == [2]
    assert f"head {seq}:{head}" in report.described()


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize(
    "harm",
    [
        lambda lines, at: [*lines[:at], lines[at].replace(b"acme", b"evil"), *lines[at + 1 :]],
        lambda lines, at: [*lines[:at], lines[at].replace(b'v":"', b'v":"f'), *lines[at + 1 :]],
        lambda lines, at: [*lines[:at], *lines[at + 1 :]],
        lambda lines, at: [*lines[:at], *lines[at + 1 :], lines[at]] if at < 5 else lines[::-1],
        lambda lines, at: lines[:at],
    ],
    ids=["flip", "flip-prev", "delete", "reorder", "truncate"],
)
def test_each_record_that_is_harmed_is_found_and_named(
    tmp_path: Path, at: int, harm: Callable[[list[bytes], int], list[bytes]]
) -> None:
    segment = filled(tmp_path)
    lines = segment.read_bytes().splitlines(keepends=True)
    harmed = harm(lines, at)
    first = next(
        (n for n, pair in enumerate(zip(lines, harmed, strict=False)) if pair[0] != pair[1]), at
    )
    segment.write_bytes(b"".join(harmed))
    assert str(verify(tmp_path / "log", KEY.public_key()).bad).startswith(f"record {first + 1}:")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"event":"intent"', b'"event":[]'),
        (b'"event":"intent"', b'"event":null'),
        (b"+00:00", b""),
        (b'"time":"', b'"time":"x'),
        (b'"options":null', b'"options":[]'),
        (b'"options":null', b'"options":{"mode":' + b"[" * 400 + b"]" * 400 + b"}"),
        (b'"options":null', b'"options":' + b"[" * 100_000),
        (b'"seq":3', b'"seq":null'),
        (b'"caller":"uid:1"', b'"caller":{}'),
        (b'{"seq"', b'{"sec"'),
        (b"{", b"[] {"),
    ],
)
def test_a_line_that_no_host_wrote_is_named_by_those_who_read_it(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    segment = filled(tmp_path)
    assert len(list(list_records(tmp_path / "log"))) == 6
    lines = segment.read_bytes().splitlines(keepends=True)
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new, 1)
    segment.write_bytes(b"".join(lines))
    assert str(verify(tmp_path / "log", KEY.public_key()).bad).startswith("record 3: changed")
    with pytest.raises(AuditBroken, match="record 3: changed"):
        list(list_records(tmp_path / "log", since=datetime.fromtimestamp(0, UTC)))


def test_a_record_is_as_long_as_a_request_makes_it_and_no_longer(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    audit.write("intent", options={"resource": ["\u00e9" * 16_000]})
    with pytest.raises(ValueError, match="longer than a record"):
        audit.write("intent", options={"resource": ["\u00e9" * 32_000]})
    audit.write("result")
    audit.close()
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 2, 2)
    segment = next((tmp_path / "log").glob("audit-*"))
    segment.write_bytes(segment.read_bytes().replace(b"\\u00e9", b"\\u00e9" * 2))
    assert str(verify(tmp_path / "log", KEY.public_key()).bad).startswith("record 1: changed")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"{", b"[" * 100_000),
        (b"{", b"[] {"),
        # Sealed by the same bytes, and yet no number.
        (b'"seq": 6', b'"seq": "6"'),
    ],
    ids=["deep", "list", "text"],
)
def test_a_checkpoint_that_no_host_wrote_is_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    filled(tmp_path)
    seals = tmp_path / "log" / "checkpoints.jsonl"
    whole = seals.read_bytes()
    assert old in whole
    assert verify(tmp_path / "log", KEY.public_key()).bad is None
    seals.write_bytes(whole + whole.replace(old, new, 1))
    bad = verify(tmp_path / "log", KEY.public_key()).bad
    assert bad == "checkpoints.jsonl: checkpoint 2: not signed by this audit key"
    seals.write_bytes(whole + whole)
    bad = verify(tmp_path / "log", KEY.public_key()).bad
    assert bad == "checkpoints.jsonl: checkpoint 2: the one before it is missing"


def test_a_log_sealed_anew_with_another_key_fails(tmp_path: Path) -> None:
    audit = audit_in(tmp_path, Ed25519PrivateKey.generate())
    intents(audit, 3)
    audit.close()
    assert "key" in str(verify(tmp_path / "log", KEY.public_key()).bad)


def test_a_rewritten_whole_fails_against_a_head_that_was_noted(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 3, caller="uid:2")
    noted = f"{audit.seq}:{audit.head}"
    audit.close()
    (tmp_path / "new").mkdir()
    filled(tmp_path / "new")
    assert verify(tmp_path / "log", KEY.public_key(), noted).bad is None
    assert verify(tmp_path / "new" / "log", KEY.public_key(), noted).bad is not None


def killed(audit: Audit) -> None:
    """It ends, and seals nothing more."""
    with mock.patch.object(audit, "seal"):
        audit.close()


def test_a_log_whose_checkpoints_are_gone_is_neither_believed_nor_gone_on_with(
    tmp_path: Path,
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 6)
    noted = f"{audit.seq}:{audit.head}"
    audit.close()
    (tmp_path / "log" / "checkpoints.jsonl").unlink()
    bad = verify(tmp_path / "log", KEY.public_key()).bad
    assert bad == "record 1: no checkpoint covers it and the records after it"
    with pytest.raises(AuditBroken, match="the checkpoint of record 6, which was noted"):
        audit_in(tmp_path)
    with pytest.raises(AuditBroken, match="record 1: no checkpoint"):
        audit_in(tmp_path, noted="a state that was lost")
    # Each line has the hash of the one before: whoever noted the last head needs no other.
    assert verify(tmp_path / "log", KEY.public_key(), noted).bad is None


def test_a_host_that_ended_before_its_first_checkpoint_served_nobody_and_goes_on(
    tmp_path: Path,
) -> None:
    audit = audit_in(tmp_path)
    audit.write("start")
    killed(audit)
    assert verify(tmp_path / "log", KEY.public_key()).bad is None
    audit = audit_in(tmp_path)
    assert audit.write("start")[0] == 2
    killed(audit)
    assert verify(tmp_path / "log", KEY.public_key()).bad is None
    other = tmp_path / "other"
    other.mkdir()
    audit = audit_in(other)
    intents(audit, 1)
    killed(audit)
    assert str(verify(other / "log", KEY.public_key()).bad).startswith("record 1:")


def test_a_host_leaves_no_more_unsealed_than_is_believed(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    audit.write("start")
    audit.seal()
    # Nobody waits for the disk with refusals, so nothing seals them on the way.
    for unsealed in range(1, 101):
        audit.append("refused", caller="uid:1")
        report = verify(tmp_path / "log", KEY.public_key())
        assert (report.bad, report.seq - report.sealed) == (None, unsealed)
    audit.append("refused", caller="uid:1")
    killed(audit)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 102, 101)

    # The later seal is dropped: a host would not have left as many.
    seals = tmp_path / "log" / "checkpoints.jsonl"
    seals.write_bytes(seals.read_bytes().splitlines(keepends=True)[0])
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.sealed, str(report.bad)[:25]) == (1, "record 2: no checkpoint c")
    with pytest.raises(AuditBroken, match="record 2: no checkpoint"):
        audit_in(tmp_path, noted="a state that was lost")


def test_a_host_leaves_nothing_unsealed_for_longer_than_is_believed(tmp_path: Path) -> None:
    at = [NOW]
    audit = audit_in(tmp_path, now=lambda: at[0])
    audit.write("start")
    audit.seal()
    # A machine that slept, or a clock that was set, between two records.
    for step in (59.0, 3600.0, -7200.0, 1.0):
        audit.append("refused", caller="uid:1")
        at[0] += step
        audit.append("refused", caller="uid:1")
        assert verify(tmp_path / "log", KEY.public_key()).bad is None
        at[0] += 61.0
    killed(audit)
    assert verify(tmp_path / "log", KEY.public_key()).bad is None


def rewritten(log: Path, *, kept: int, old: bytes = b"uid:1", new: bytes = b"uid:9") -> None:
    """What somebody without the key can do: keep *kept* checkpoints, rewrite all behind them."""
    (segment,) = segments_of(log)
    seals = checkpoints_of(segment)
    first = seals.read_bytes().splitlines(keepends=True)[:kept]
    seals.write_bytes(b"".join(first))
    sealed = json.loads(first[-1])["seq"]
    lines = segment.read_bytes().splitlines()
    for at in range(sealed, len(lines)):
        record = json.loads(lines[at].replace(old, new))
        record["prev"] = hashlib.sha256(lines[at - 1]).hexdigest()
        lines[at] = json.dumps(record, separators=(",", ":")).encode()
    segment.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize(("records", "seconds"), [(101, 0.0), (3, 121.0)])
def test_a_tail_that_is_rewritten_is_bad_where_no_host_leaves_one_as_long(
    tmp_path: Path, records: int, seconds: float
) -> None:
    at = [NOW]
    audit = audit_in(tmp_path, now=lambda: at[0])
    audit.write("start")
    audit.seal()
    for number in range(records):
        audit.write("intent", caller="uid:1", profile="acme", jti=str(number))
        at[0] += seconds / (records - 1)
    audit.close()
    rewritten(tmp_path / "log", kept=1)
    assert str(verify(tmp_path / "log", KEY.public_key()).bad).startswith("record 2: no checkpoint")
    with pytest.raises(AuditBroken, match="record 2"):
        audit_in(tmp_path, noted="a state that was lost")


def test_a_short_tail_that_is_rewritten_is_called_unsealed_and_never_vouched_for(
    tmp_path: Path,
) -> None:
    audit = audit_in(tmp_path)
    audit.write("start")
    audit.seal()
    intents(audit, 6)
    audit.close()
    rewritten(tmp_path / "log", kept=1)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.sealed) == (None, 1)
    assert any(
        line.startswith("6 more, up to 7, have no checkpoint") for line in report.described()
    )

    # The host knows better, by what it noted outside of the log.
    with pytest.raises(AuditBroken, match="record 7"):
        audit_in(tmp_path)
    # Without that it goes on, and says for ever that it found them so.
    audit = audit_in(tmp_path, noted="a state that was lost")
    intents(audit, 2)
    audit.close()
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.sealed, report.unverified) == (None, 9, [(2, 7)])
    assert any(line.startswith("records 2 to 7 of these") for line in report.described())


def test_no_checkpoint_can_be_left_out(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    for _ in range(3):
        intents(audit, 2)
        audit.seal()
    audit.close()
    seals = tmp_path / "log" / "checkpoints.jsonl"
    lines = seals.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    for left in (lines[1:], [lines[0], lines[2]], lines[::-1]):
        seals.write_bytes(b"".join(left))
        assert "the one before it is missing" in str(verify(tmp_path / "log", KEY.public_key()).bad)
    seals.write_bytes(b"".join(lines))
    assert verify(tmp_path / "log", KEY.public_key()).bad is None


def test_a_log_that_was_put_back_to_an_earlier_day_is_not_gone_on_with(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 3)
    audit.seal()
    before = {each: each.read_bytes() for each in (tmp_path / "log").glob("*.jsonl")}
    intents(audit, 3)
    audit.close()
    for each, raw in before.items():
        each.write_bytes(raw)
    assert verify(tmp_path / "log", KEY.public_key()).bad is None
    with pytest.raises(AuditBroken, match="record 4: cut off; record 6 is known"):
        audit_in(tmp_path)
    for each in before:
        each.unlink()
    with pytest.raises(AuditBroken, match="record 6, which was noted, is not there"):
        audit_in(tmp_path)


@pytest.mark.parametrize("noted", [b"", b"[]", b"{", b'{"seq":"x","head":"y"}', b"[" * 100_000])
def test_a_note_that_cannot_be_read_starts_no_host(tmp_path: Path, noted: bytes) -> None:
    filled(tmp_path)
    audit_in(tmp_path).close()
    (tmp_path / "noted").write_bytes(noted)
    with pytest.raises(AuditBroken, match="cannot be read"):
        audit_in(tmp_path)


def segmented(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A log of four segments, a day between each."""
    at = [NOW]
    audit = audit_in(place, now=lambda: at[0])
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr("hsmtoll.host.audit._SEGMENT", 1)
            intents(audit, 1)
        intents(audit, 4)
        at[0] += 2 * 86_400.0
    audit.close()
    segments = segments_of(place / "log")
    assert len(segments) == 4
    return segments


def test_old_segments_may_be_moved_away_and_each_run_is_verified_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = segmented(tmp_path, monkeypatch)
    log, key = tmp_path / "log", KEY.public_key()
    whole = verify(log, key)
    assert (whole.bad, whole.after, whole.seq, whole.sealed) == (None, 0, 20, 20)
    middle = verify(segments[1:3], key)
    assert (middle.bad, middle.after, middle.sealed) == (None, 5, 15)
    assert "records up to 5 are in older segments and were not read" in middle.described()
    later = verify(log, key, since=datetime.fromtimestamp(NOW + 5 * 86_400.0, UTC))
    assert (later.bad, later.after, later.sealed) == (None, 10, 20)
    assert "missing" in str(verify([segments[0], segments[2]], key).bad) or "removed" in str(
        verify([segments[0], segments[2]], key).bad
    )
    for each in segments[:2]:
        checkpoints_of(each).unlink()
        each.unlink()
    assert verify(log, key).after == 10
    audit = audit_in(tmp_path, now=NOW + 8 * 86_400.0)
    assert audit.write("start")[0] == 21
    audit.close()
    assert verify(log, key).bad is None


def test_a_start_reads_the_last_day_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segmented(tmp_path, monkeypatch)
    read: list[int] = []
    real = verify

    def counted(*args: Any, seen: Any, **more: Any) -> Any:
        def both(record: dict[str, Any]) -> None:
            read.append(record["seq"])
            seen(record)

        return real(*args, seen=both, **more)

    monkeypatch.setattr("hsmtoll.host.audit.verify", counted)
    audit = audit_in(tmp_path, now=NOW + 6 * 86_400.0 + 60.0)
    # The day began while the third segment was written.
    assert read == list(range(11, 21))
    assert audit.counts("uid:1", "acme").day == 5
    audit.close()
    # What it has not read is no part of what it vouches for by that: the seal before is.
    raw = segments[0].read_bytes()
    segments[0].write_bytes(raw.replace(b"acme", b"evil", 1))
    assert verify(tmp_path / "log", KEY.public_key()).bad == "record 1: changed"
    segments[3].write_bytes(segments[3].read_bytes().replace(b"acme", b"evil", 1))
    with pytest.raises(AuditBroken, match="record 16: changed"):
        audit_in(tmp_path, now=NOW + 6 * 86_400.0 + 60.0)


@pytest.mark.parametrize("step", ["replace", "sync_directory"])
def test_a_host_that_is_killed_between_two_segments_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 5)
    audit.seal()
    monkeypatch.setattr("hsmtoll.host.audit._SEGMENT", 1)

    def gone(*_: Any, **__: Any) -> None:
        raise OSError(5, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(f"hsmtoll.files.{step}", gone)
        with pytest.raises(AuditBroken):
            intents(audit, 1)
    killed(audit)
    audit = audit_in(tmp_path)
    intents(audit, 2)
    audit.close()
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 7, 7)


def test_what_is_written_while_a_log_is_read_is_not_missed_a_checkpoint_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 2)
    audit.seal()

    def busy(*args: Any, **around: Any) -> str | None:
        while audit.seq < 2000:
            audit.append("refused", caller="uid:1")
        return _wrong(*args, **around)

    monkeypatch.setattr("hsmtoll.host.audit_log._wrong", busy)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq) == (None, 2)
    assert verify(tmp_path / "log", KEY.public_key()).seq == 2000
    audit.close()


def test_however_long_its_checkpoints_take_to_read_a_log_that_grows_meanwhile_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audit_in(tmp_path)
    audit.write("start")
    audit.seal()
    real = _Run._checkpoints

    def slow(self: _Run, file: Path) -> Any:
        read = real(self, file)
        # Of a log of years there are ten thousands, each with a signature to be checked.
        for number in range(1500):
            audit.append("intent", caller="uid:1", jti=str(number))
        return read

    monkeypatch.setattr(_Run, "_checkpoints", slow)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 1501, 1)
    killed(audit)


@pytest.mark.parametrize("head", ["\u00b2:" + "0" * 64, "1:x", ":", "9" * 5000 + ":" + "0" * 64])
def test_a_head_that_is_none_is_an_error_of_who_gave_it(tmp_path: Path, head: str) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigurationError, match="SEQ:HASH"):
        verify(tmp_path / "log", KEY.public_key(), head)


def test_an_empty_directory_is_no_log(tmp_path: Path) -> None:
    assert verify(tmp_path, KEY.public_key()).bad == "no records are there"


def test_a_restart_forgets_no_quota_and_a_day_does(tmp_path: Path) -> None:
    filled(tmp_path)
    for later, day in ((30.0, 6), (90_000.0, 0)):
        audit = audit_in(tmp_path, now=NOW + later)
        assert audit.counts("uid:1", "acme").day == day
        assert audit.counts("uid:2", "acme").day == 0
        audit.close()


def test_half_a_line_of_a_crash_is_dropped_and_the_log_goes_on(tmp_path: Path) -> None:
    segment = filled(tmp_path)
    with segment.open("ab") as file:
        file.write(b'{"seq":7,')
    audit = audit_in(tmp_path)
    assert audit.write("stop")[0] == 7
    audit.close()


_FULL = """
import resource, signal, sys
from pathlib import Path
from hsmtoll.errors import AuditBroken, ConfigurationError
from hsmtoll.host.audit import Audit
audit = Audit(
    Path(sys.argv[1]), Path(sys.argv[2]), now=lambda: 1.79e9, noted=Path(sys.argv[2] + ".noted")
)
audit.write("start")
audit.seal()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
for number in range(5):
    try:
        audit.write("intent", caller="uid:1", profile="acme", jti=str(number))
    except AuditBroken:
        print("broken at", number)
"""


@pytest.mark.parametrize(("limit", "message"), [(1000, "broken at"), (100_000, "")])
def test_a_full_disk_breaks_the_audit_and_leaves_whole_lines(
    tmp_path: Path, limit: int, message: str
) -> None:
    log = tmp_path / "log"
    audit_in(tmp_path).close()
    argv = [sys.executable, "-c", _FULL, str(log), str(tmp_path / "audit.key"), str(limit)]
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert output.startswith(message)
    # Once broken it stays so: no later record slips in behind the gap.
    assert bool(message) == output.endswith("broken at 4\n")
    assert verify(log, KEY.public_key()).bad is None


def test_a_new_segment_that_cannot_be_made_breaks_the_audit_and_it_ends_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 2)
    audit.seal()
    monkeypatch.setattr("hsmtoll.host.audit._SEGMENT", 1)
    # The directory of the next segment is not there.
    (tmp_path / "log").rename(tmp_path / "away")
    with pytest.raises(AuditBroken):
        audit.append("stop")
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    audit.close()
    audit.close()
    monkeypatch.undo()
    assert len(closed) == len(set(closed)) == 3
    for each in closed:
        os.close(each)
    assert verify(tmp_path / "away", KEY.public_key()).bad is None


def test_only_the_records_of_a_caller_are_listed(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 2)
    intents(audit, 3, caller="uid:2")
    audit.close()
    assert len(list(list_records(tmp_path / "log", caller="uid:2"))) == 3
    assert not list(list_records(tmp_path / "log", profile="other"))


def test_a_crowd_writes_one_chain_and_waits_for_few_syncs(tmp_path: Path) -> None:
    audit_in(tmp_path).close()
    synced = []

    def counted(descriptor: int) -> None:
        # A disk that takes its time: those who come meanwhile share the next one.
        time.sleep(0.05)
        synced.append(descriptor)
        os.fsync(descriptor)

    audit = audit_in(tmp_path, fsync=counted)
    start = threading.Barrier(40)

    def one(number: int) -> tuple[int, str]:
        start.wait()
        return audit.write("intent", caller="uid:1", profile="acme", jti=str(number))

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        heads = list(pool.map(one, range(40)))
    assert sorted(seq for seq, _ in heads) == list(range(1, 41))
    assert len(synced) < 40
    assert audit.counts("uid:1", "acme").day == 40
    audit.close()
    for seq, head in heads:
        assert verify(tmp_path / "log", KEY.public_key(), f"{seq}:{head}").bad is None


@pytest.mark.parametrize(
    ("outcome", "costs"),
    [
        ("device-down", 0),
        ("device-busy", 0),
        ("busy", 0),
        ("stopped", 0),
        ("device-error", 1),
        ("device-hung", 1),
        ("signed", 1),
    ],
)
def test_a_device_that_was_not_asked_costs_no_quota_and_one_that_was_does(
    tmp_path: Path, outcome: str, costs: int
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 3)
    audit.write("result", caller="uid:1", profile="acme", jti="uid:1-1", outcome=outcome)
    counts = audit.counts("uid:1", "acme")
    assert (counts.minute, counts.day) == (2 + costs, 2 + costs)
    audit.close()
    again = audit_in(tmp_path)
    assert again.counts("uid:1", "acme").day == 2 + costs
    again.close()


def test_what_was_had_leaves_the_minute_and_then_the_day(tmp_path: Path) -> None:
    at = [NOW]
    audit_in(tmp_path).close()
    audit = audit_in(tmp_path, now=lambda: at[0])
    for number in range(4):
        audit.append("intent", caller="uid:1", profile="acme", jti=str(number))
        at[0] += 20.0
    # 80 s after the first: those of 0 and 20 s are a minute old.
    assert audit.counts("uid:1", "acme") == Counts(minute=2, day=4)
    assert audit.free_in("uid:1", "acme", minute=2, day=None) == 20
    assert audit.free_in("uid:1", "acme", minute=None, day=4) == 86_400 - 80
    # One that is taken back leaves both.
    audit.append("result", caller="uid:1", profile="acme", jti="3", outcome="busy")
    assert audit.counts("uid:1", "acme") == Counts(minute=1, day=3)
    at[0] = NOW + 86_400.0 + 30.0
    assert audit.counts("uid:1", "acme") == Counts(minute=0, day=1)
    audit.close()


def test_a_clock_that_was_ahead_makes_no_quota_last_longer(tmp_path: Path) -> None:
    at = [NOW + 30 * 86_400.0]
    audit_in(tmp_path).close()

    def opened() -> Audit:
        return audit_in(tmp_path, now=lambda: at[0])

    audit = opened()
    audit.write("intent", caller="uid:1", profile="acme", jti="0")
    at[0] = NOW
    assert audit.counts("uid:1", "acme") == Counts(minute=1, day=1)
    assert audit.free_in("uid:1", "acme", minute=1, day=None) == 60
    audit.write("stop", outcome="resumed")
    at[0] += 30.0
    audit.write("intent", caller="uid:2", profile="acme", jti="1")
    at[0] += 31.0
    assert audit.counts("uid:1", "acme") == Counts(minute=0, day=1)
    assert audit.counts("uid:2", "acme") == Counts(minute=1, day=1)
    audit.close()

    # A restart reads the same times again: what follows a record came later, whatever they say.
    at[0] = NOW + 62.0
    audit = opened()
    assert audit.counts("uid:1", "acme") == Counts(minute=0, day=1)
    assert audit.counts("uid:2", "acme") == Counts(minute=1, day=1)
    audit.close()


def test_a_quiet_log_is_sealed_by_the_clock_even_after_that_was_set_back(tmp_path: Path) -> None:
    at = [NOW + 86_400.0]
    audit_in(tmp_path).close()
    audit = audit_in(tmp_path, now=lambda: at[0])
    seals = tmp_path / "log" / "checkpoints.jsonl"
    for moment, sealed in ((at[0], 0), (NOW, 1), (NOW + 29.0, 1), (NOW + 31.0, 2)):
        at[0] = moment
        audit.write("refused", caller="uid:1")
        assert len(seals.read_text().splitlines() if seals.exists() else []) == sealed
    audit.close()


def test_a_token_needs_a_signature_and_a_release_and_counts_once(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    audit.write("intent", caller="uid:1", profile="acme", jti="a", options={"mode": "token"})
    assert audit.counts("uid:1", "acme", of="given").day == 0
    audit.write("release", caller="uid:1", profile="acme")
    kinds: tuple[Literal["signed", "given", "either"], ...] = ("signed", "given", "either")
    for of in kinds:
        assert audit.counts("uid:1", "acme", of=of).minute == 1
    assert 59 < audit.free_in("uid:1", "acme", minute=1, day=None) <= 60
    assert audit.free_in("uid:1", "acme", minute=2, day=None) == 1
    audit.close()


# ---------------------------------------------------------------------- what can be done to files


def in_segments(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A log of a host that has ended, in four segments at least."""
    monkeypatch.setattr("hsmtoll.host.audit._SEGMENT", 6000)
    audit = audit_in(place)
    audit.write("start")
    audit.seal()
    intents(audit, 60)
    audit.close()
    segments = segments_of(place / "log")
    assert len(segments) >= 4
    return segments


def swapped(segments: list[Path]) -> None:
    for one, other in (segments[:2], [checkpoints_of(each) for each in segments[:2]]):
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)


def renamed(segments: list[Path]) -> None:
    last = segments[-1]
    later = last.with_name("audit-000000000999.jsonl")
    checkpoints_of(last).rename(checkpoints_of(later))
    last.rename(later)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def stray(segments: list[Path], *, carried: int) -> None:
    """An empty segment of a later number, with the last checkpoint of segment *carried*."""
    fresh = segments[-1].with_name("audit-000000000999.jsonl")
    fresh.touch()
    last = checkpoints_of(segments[carried]).read_bytes().splitlines(keepends=True)[-1]
    checkpoints_of(fresh).write_bytes(last)


_HARMS: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "two segments change places": (swapped, "checkpoint 1: the one before it is missing"),
    "a segment has another name": (renamed, "not at the beginning of audit-000000000999.jsonl"),
    "a segment is there twice": (
        lambda each: each[0].with_name("audit-1.jsonl").write_bytes(each[0].read_bytes()),
        "checkpoint 1: the one before it is missing",
    ),
    "a segment of another number": (
        lambda each: stray(each, carried=-1),
        "not at the beginning of audit-000000000999.jsonl",
    ),
    "a segment with an older checkpoint": (
        lambda each: stray(each, carried=0),
        "removed, or checkpoints of the segment before it",
    ),
    "a segment that is none": (
        lambda each: each[0].with_name("audit-new.jsonl").touch(),
        "not a segment of an audit log",
    ),
    "a link to the last segment": (lambda each: linked(each[-1]), "not a file"),
    "a link to an older segment": (lambda each: linked(each[1]), "not a file"),
    "a link to checkpoints": (lambda each: linked(checkpoints_of(each[-1])), "not a file"),
    "a pipe for a segment": (lambda each: piped(each[-1]), "not a file"),
    "a pipe for checkpoints": (lambda each: piped(checkpoints_of(each[-1])), "not a file"),
    "a directory for a segment": (
        lambda each: each[0].with_name("audit-000000000999.jsonl").mkdir(),
        "not a file",
    ),
    "half a line in the middle": (
        lambda each: each[1].write_bytes(each[1].read_bytes() + b'{"seq":'),
        "not at the beginning of",
    ),
    "a blank line at the end": (
        lambda each: each[-1].write_bytes(each[-1].read_bytes() + b"\n"),
        "changed (not an audit record)",
    ),
    "a sealed record of which half is there": (
        lambda each: each[-1].write_bytes(each[-1].read_bytes()[:-20]),
        "cut off; record 61 is known",
    ),
}


@pytest.mark.parametrize("harm", _HARMS)
def test_a_log_whose_files_were_touched_is_neither_right_nor_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    segments = in_segments(tmp_path, monkeypatch)
    log = tmp_path / "log"
    assert verify(log, KEY.public_key()).bad is None
    touch, message = _HARMS[harm]
    touch(segments)
    kept = {each: each.lstat().st_size for each in log.iterdir()}
    try:
        found = str(verify(log, KEY.public_key()).bad)
    except (AuditBroken, ConfigurationError) as exc:
        found = str(exc)
    assert message in found
    with pytest.raises((AuditBroken, ConfigurationError)) as caught:
        audit_in(tmp_path)
    assert message in str(caught.value)
    # It is evidence from now on: a start that is refused changes nothing.
    assert {each: each.lstat().st_size for each in log.iterdir()} == kept


@pytest.mark.parametrize("rest", [b'{"seq":', b"\0" * 4096], ids=["half", "zeros"])
def test_half_a_line_at_the_end_is_said_and_gone_on_from(tmp_path: Path, rest: bytes) -> None:
    segment = filled(tmp_path)
    segment.write_bytes(segment.read_bytes() + rest)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed, report.half_line) == (None, 6, 6, True)
    assert any("in the middle of a record" in line for line in report.described())
    assert len(list(list_records(tmp_path / "log"))) == 6
    audit = audit_in(tmp_path)
    assert audit.write("start")[0] == 7
    audit.close()
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.half_line) == (None, 7, False)


@pytest.mark.parametrize(
    "touch",
    [
        lambda segment: segment.write_bytes(segment.read_bytes()[:-1]),
        lambda segment: segment.write_bytes(b""),
        lambda segment: segment.write_bytes(segment.read_bytes() + b"x"),
        lambda segment: segment.rename(segment.with_name("audit.1")),
        lambda segment: segment.unlink(),
        lambda segment: (
            segment.with_name("new").write_bytes(segment.read_bytes()),
            segment.with_name("new").replace(segment),
        ),
    ],
    ids=["cut", "emptied", "grown", "moved", "removed", "replaced"],
)
def test_a_host_signs_nothing_more_once_another_one_touched_its_segment(
    tmp_path: Path, touch: Callable[[Path], object]
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 3)
    audit.seal()
    intents(audit, 1)
    checkpoints = (tmp_path / "log" / "checkpoints.jsonl").read_bytes()
    touch(next((tmp_path / "log").glob("audit-*")))
    for _ in range(2):
        with pytest.raises(AuditBroken, match="cannot be written"):
            intents(audit, 1)
    audit.close()
    assert (tmp_path / "log" / "checkpoints.jsonl").read_bytes() == checkpoints


def test_a_host_without_its_note_goes_on_and_warns_that_records_may_be_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    audit_in(tmp_path).close()
    assert "no note" not in caplog.text
    (tmp_path / "noted").unlink()
    audit_in(tmp_path).close()
    assert "records may have been cut off" in caplog.text
