"""On a disk that is full, and really so: nothing is lost, and no half of anything stays."""

from __future__ import annotations

import errno
import json
import subprocess
from typing import TYPE_CHECKING, Self

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.errors import AuditBroken, PinNotTried
from hsmtoll.host.audit import Audit
from hsmtoll.host.audit_log import segments_of, verify
from hsmtoll.hsm.pin import Pin
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from hsmtoll.tokens.stores import FileStore, name_of
from tests.kit.accounts import NEEDS_NAMESPACES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs_root

PLACE = TokenUser("Maker", "X1", "0042", "lab")
WRONG = Pin("4711-canary", source="SETTING")
KEY = name_of("a key")
NOW = 1_790_000_000.0


class Disk:
    """A file system of half a MiB at *at*; while it is entered, not a byte of it is free."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self._filler = at / "filler"

    def __enter__(self) -> Self:
        with self._filler.open("wb", buffering=0) as file:
            size = 4096
            while size:
                try:
                    file.write(b"x" * size)
                except OSError as exc:
                    if exc.errno != errno.ENOSPC:
                        raise
                    size //= 2
        return self

    def __exit__(self, *exc: object) -> None:
        self._filler.unlink()

    def names(self) -> set[str]:
        """Of the files that are there, but for the filler."""
        return {str(each.relative_to(self.at)) for each in self.at.rglob("*")} - {"filler"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    at = tmp_path / "small"
    at.mkdir()
    options = ("-o", "size=512k,mode=0700")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "none", at], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(NEEDS_NAMESPACES)
    yield Disk(at)
    subprocess.run(["umount", "--lazy", at], check=True)


def test_no_pin_is_tried_that_could_not_be_remembered(disk: Disk) -> None:
    pin_log = PinLog(disk.at / "state")
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(WRONG, count_low=False)
        pin_record.refuse(WRONG)
    known = disk.names()
    other = Pin("another", source="SETTING")
    with disk:
        with pytest.raises(PinNotTried) as caught, pin_log.held(PLACE) as pin_record:
            pin_record.intend(other, count_low=False)
        assert (caught.value.code, caught.value.exit_code) == ("ledger", 21)
        assert "No space left on device" in str(caught.value)
        assert disk.names() == known
        # What was refused before is refused still.
        with pytest.raises(PinNotTried) as caught, pin_log.held(PLACE) as pin_record:
            pin_record.intend(WRONG, count_low=False)
        assert caught.value.code == "pin-refused"
    # With room again it is tried.
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(other, count_low=False)
        pin_record.accept(other)


def test_a_pin_whose_refusal_could_not_be_written_down_is_not_known_to_be_right(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    pin_log = PinLog(disk.at / "state")
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(WRONG, count_low=False)
        known = disk.names()
        with disk:
            pin_record.refuse(WRONG)
            assert disk.names() == known
    assert "refused, which cannot be recorded (No space left on device)" in caplog.text
    assert pin_log.refusals(PLACE) == (0, 1)
    # The device counts a wrong one, and the intent is there: it is not tried again.
    with pytest.raises(PinNotTried) as caught, pin_log.held(PLACE) as pin_record:
        pin_record.intend(WRONG, count_low=True)
    assert caught.value.code == "pin-unresolved"


def test_the_first_pin_of_a_machine_whose_disk_is_full_is_not_tried(disk: Disk) -> None:
    with (
        disk,
        pytest.raises(PinNotTried) as caught,
        PinLog(disk.at / "state").held(PLACE) as pin_record,
    ):
        pin_record.intend(WRONG, count_low=False)
    assert caught.value.code == "ledger"
    with PinLog(disk.at / "state").held(PLACE) as pin_record:
        pin_record.intend(WRONG, count_low=False)


def opened(disk: Disk, key: Ed25519PrivateKey, *, log: Path | None = None) -> Audit:
    file = disk.at.parent / "audit.key"
    file.touch(0o600)
    form = s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
    file.write_bytes(key.private_bytes(*form))
    where = log or disk.at / "log"
    # The note lies on that disk as well, as where state and log are below /var/lib.
    return Audit(where, file, now=lambda: NOW, noted=disk.at / "noted")


def records_in(log: Path) -> list[str]:
    lines = b"".join(each.read_bytes() for each in segments_of(log)).splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return [json.loads(line)["jti"] for line in lines]


def write_until_it_breaks(audit: Audit, acknowledged: list[str]) -> None:
    for number in range(1000):
        audit.write("intent", caller="uid:1", profile="acme", jti=f"{number}")
        acknowledged.append(f"{number}")


def test_what_the_audit_acknowledged_is_there_and_nothing_of_what_it_did_not(disk: Disk) -> None:
    key = Ed25519PrivateKey.generate()
    audit = opened(disk, key)
    audit.write("start")
    audit.seal()
    acknowledged: list[str] = []
    before = disk.names()
    with disk:
        # What is left of its last page takes some records still.
        with pytest.raises(AuditBroken) as caught:
            write_until_it_breaks(audit, acknowledged)
        assert (caught.value.code, caught.value.exit_code) == ("audit-unwritable", 91)
        assert "No space left on device" in str(caught.value)
        assert disk.names() == before
        # It stays so, although there may be room for a shorter one.
        with pytest.raises(AuditBroken):
            audit.write("stop")
        audit.close()
        assert records_in(disk.at / "log")[1:] == acknowledged
        assert verify(disk.at / "log", key.public_key()).bad is None
        # A host that is started now says so, and changes nothing.
        if acknowledged:
            with pytest.raises(AuditBroken, match="No space left on device"):
                opened(disk, key)
        assert records_in(disk.at / "log")[1:] == acknowledged
    audit = opened(disk, key)
    assert audit.write("start")[0] == len(acknowledged) + 2
    audit.close()
    report = verify(disk.at / "log", key.public_key())
    assert (report.bad, report.seq, report.sealed) == (None, *[len(acknowledged) + 2] * 2)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_made_by_the_next_start(disk: Disk) -> None:
    key = Ed25519PrivateKey.generate()
    log = disk.at.parent / "elsewhere"
    audit = opened(disk, key, log=log)
    audit.write("start")
    audit.seal()
    noted = (disk.at / "noted").read_bytes()
    # The log has room, the note of its checkpoints has none.
    with disk:
        audit.write("intent", jti="1")
        with pytest.raises(AuditBroken, match="No space left on device"):
            audit.seal()
        with pytest.raises(AuditBroken):
            audit.write("intent", jti="2")
        audit.close()
        assert disk.names() == {"noted"}
        assert (disk.at / "noted").read_bytes() == noted
    audit = opened(disk, key, log=log)
    assert audit.write("intent", jti="2")[0] == 3
    audit.close()
    assert verify(log, key.public_key()).sealed == 3


def test_a_token_that_cannot_be_kept_is_a_miss_and_the_old_one_stays(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(disk.at / "cache")
    store.put(KEY, b"old" * 1000, ttl=100)
    known = disk.names()
    with disk:
        store.put(KEY, b"new" * 1000, ttl=100)
        store.put(name_of("another"), b"new", ttl=100)
        assert "could not be stored (No space left on device)" in caplog.text
        with store.lock(KEY, timeout=1.0) as held:
            assert held
        assert disk.names() - known <= {f"cache/{KEY}.lock"}
        kept = store.get(KEY)
        assert kept is not None
        assert kept.value == b"old" * 1000
        assert store.get(name_of("another")) is None
    store.put(KEY, b"new" * 1000, ttl=100)
    kept = store.get(KEY)
    assert kept is not None
    assert kept.value == b"new" * 1000
