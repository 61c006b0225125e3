"""The audit log shows what was done to it, and counts what was had."""

from __future__ import annotations

import concurrent.futures
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

from hsmtoll.errors import AuditBroken
from hsmtoll.host.audit import Audit, _seals, _wrong, list_records, verify
from hsmtoll.host.policy import Counts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY = Ed25519PrivateKey.generate()
NOW = 1_790_000_000.0


def audit_in(place: Path, key: Ed25519PrivateKey = KEY, now: float = NOW) -> Audit:
    file = place / "audit.key"
    file.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    return Audit(place / "log", file, now=lambda: now)


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
    assert (report.bad, report.seq, report.sealed, report.open_intents) == (None, 3, 3, (2,))


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
    seals.write_bytes(whole + whole.replace(old, new, 1))
    bad = verify(tmp_path / "log", KEY.public_key()).bad
    assert bad == "checkpoint 2: not signed by this audit key"
    seals.write_bytes(whole + whole)
    assert verify(tmp_path / "log", KEY.public_key()).bad is None


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
    assert bad == "record 1: no checkpoint vouches for it and those after it"
    with pytest.raises(AuditBroken, match="record 1: no checkpoint"):
        audit_in(tmp_path)
    # Each line has the hash of the one before: whoever noted the last head needs no other.
    assert verify(tmp_path / "log", KEY.public_key(), noted).bad is None


def test_a_host_that_ended_before_its_first_checkpoint_served_nobody_and_goes_on(
    tmp_path: Path,
) -> None:
    for seq in (1, 2):
        audit = audit_in(tmp_path)
        assert audit.write("start")[0] == seq
        killed(audit)
    assert verify(tmp_path / "log", KEY.public_key()).bad is None
    audit = audit_in(tmp_path)
    intents(audit, 1)
    killed(audit)
    assert str(verify(tmp_path / "log", KEY.public_key()).bad).startswith("record 1:")


def test_a_tail_is_believed_as_far_as_a_host_leaves_it_unsealed(tmp_path: Path) -> None:
    audit = audit_in(tmp_path)
    audit.write("start")
    audit.seal()
    # Nobody waits for the disk with them, so nothing seals them on the way.
    for _ in range(1000):
        audit.append("refused", caller="uid:1")
    seals = tmp_path / "log" / "checkpoints.jsonl"
    (first,) = seals.read_bytes().splitlines(keepends=True)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 1001, 1)
    audit.append("refused", caller="uid:1")
    killed(audit)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 1002, 1001)

    seals.write_bytes(first)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.sealed, str(report.bad)[:25]) == (1, "record 2: no checkpoint v")
    with pytest.raises(AuditBroken, match="record 2: no checkpoint"):
        audit_in(tmp_path)


def test_what_is_written_while_a_log_is_read_is_not_missed_a_checkpoint_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audit_in(tmp_path)
    intents(audit, 2)
    audit.seal()

    def busy(*told: Any) -> str | None:
        while audit.seq < 2000:
            audit.append("refused", caller="uid:1")
        return _wrong(*told)

    monkeypatch.setattr("hsmtoll.host.audit._wrong", busy)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq) == (None, 2)
    assert verify(tmp_path / "log", KEY.public_key()).seq == 2000
    audit.close()


@pytest.mark.parametrize("first", [True, False])
def test_however_long_its_checkpoints_take_to_read_a_log_that_grows_meanwhile_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, first: bool
) -> None:
    audit = audit_in(tmp_path)
    audit.write("start")
    if not first:
        audit.seal()

    def slow(*told: Any) -> Any:
        read = _seals(*told)
        audit.seal()
        # Of a log of years there are ten thousands, each with a signature to be checked.
        for number in range(1500):
            audit.append("intent", caller="uid:1", jti=str(number))
        return read

    monkeypatch.setattr("hsmtoll.host.audit._seals", slow)
    report = verify(tmp_path / "log", KEY.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, 1501, 0 if first else 1)
    killed(audit)
    # What was there before they were read had to be sealed by then.
    monkeypatch.setattr("hsmtoll.host.audit._seals", lambda *_: ({}, None))
    bad = verify(tmp_path / "log", KEY.public_key()).bad
    assert bad == "record 1: no checkpoint vouches for it and those after it"


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
from hsmtoll.errors import AuditBroken
from hsmtoll.host.audit import Audit
audit = Audit(Path(sys.argv[1]), Path(sys.argv[2]), now=lambda: 1.79e9)
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


@pytest.mark.parametrize(("limit", "said"), [(1000, "broken at"), (100_000, "")])
def test_a_full_disk_breaks_the_audit_and_leaves_whole_lines(
    tmp_path: Path, limit: int, said: str
) -> None:
    log = tmp_path / "log"
    audit_in(tmp_path).close()
    argv = [sys.executable, "-c", _FULL, str(log), str(tmp_path / "audit.key"), str(limit)]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert told.startswith(said)
    # Once broken it stays so: no later record slips in behind the gap.
    assert bool(said) == told.endswith("broken at 4\n")
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
    assert len(closed) == len(set(closed)) == 2
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

    audit = Audit(tmp_path / "log", tmp_path / "audit.key", now=lambda: NOW, fsync=counted)
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
    audit = Audit(tmp_path / "log", tmp_path / "audit.key", now=lambda: at[0])
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
        return Audit(tmp_path / "log", tmp_path / "audit.key", now=lambda: at[0])

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
    audit = Audit(tmp_path / "log", tmp_path / "audit.key", now=lambda: at[0])
    seals = tmp_path / "log" / "checkpoints.jsonl"
    for moment, sealed in ((at[0], 0), (NOW, 1), (NOW + 59.0, 1), (NOW + 61.0, 2)):
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
