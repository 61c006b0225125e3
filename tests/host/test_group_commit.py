"""Group commit: nothing follows from a record before it is on disk, and one sync serves a crowd."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.errors import AuditBroken
from hsmtoll.host.audit import Audit
from hsmtoll.host.group_commit import GroupCommit

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

PATIENCE = 30.0


class Disk:
    """An audit on a disk that waits until it may, counts its syncs, and can fail."""

    def __init__(self, folder: Path) -> None:
        self.may = threading.Event()
        self.may.set()
        self.begun = threading.Event()
        self.syncs = 0
        self.broken = False
        key = folder / "key"
        key.touch(0o600)
        key.write_bytes(
            Ed25519PrivateKey.generate().private_bytes(
                s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
            )
        )
        self.audit = Audit(
            folder / "log", key, now=lambda: 0.0, noted=folder / "noted", fsync=self._fsync
        )

    def _fsync(self, descriptor: int) -> None:
        self.begun.set()
        assert self.may.wait(PATIENCE)
        self.syncs += 1
        if self.broken:
            raise OSError(28, "No space left on device")
        os.fsync(descriptor)

    async def at_it(self) -> None:
        """Until a sync is under way."""
        assert await asyncio.to_thread(self.begun.wait, PATIENCE)

    async def recorded(self, commit: GroupCommit) -> int:
        """A record's seq, once it is on disk."""
        seq, _ = self.audit.append("intent", caller="uid:1", profile="acme", jti="j")
        await commit.synced()
        return seq


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def run(disk: Disk, work: Coroutine[None, None, None], commit: GroupCommit) -> None:
    try:
        asyncio.run(work)
    finally:
        disk.may.set()
        commit.close()
        disk.audit.close()


def test_those_who_come_during_a_sync_share_the_next_one_in_their_order(disk: Disk) -> None:
    commit, done = GroupCommit(disk.audit), list[int]()

    async def one() -> None:
        done.append(await disk.recorded(commit))

    async def work() -> None:
        disk.may.clear()
        first = asyncio.create_task(one())
        await disk.at_it()
        crowd = [asyncio.create_task(one()) for _ in range(20)]
        await asyncio.sleep(0.05)
        # All were appended, and nobody goes on before the disk has the first.
        assert (disk.audit.seq, done) == (21, [])
        disk.may.set()
        await asyncio.gather(first, *crowd)
        assert done == list(range(1, 22))
        assert disk.syncs == 2
        # One by one, each has a sync of its own.
        await one()
        await one()
        assert disk.syncs == 4

    run(disk, work(), commit)


def test_where_the_disk_fails_nobody_goes_on(disk: Disk) -> None:
    commit = GroupCommit(disk.audit)

    async def work() -> None:
        disk.broken = True
        crowd = [asyncio.create_task(disk.recorded(commit)) for _ in range(5)]
        results = await asyncio.gather(*crowd, return_exceptions=True)
        assert [type(each) for each in results] == [AuditBroken] * 5
        with pytest.raises(AuditBroken):
            await disk.recorded(commit)

    run(disk, work(), commit)


def test_one_who_is_cancelled_keeps_nobody_else_from_going_on(disk: Disk) -> None:
    commit = GroupCommit(disk.audit)

    async def work() -> None:
        disk.may.clear()
        crowd = [asyncio.create_task(disk.recorded(commit)) for _ in range(3)]
        await disk.at_it()
        crowd[0].cancel()
        await asyncio.sleep(0)
        disk.may.set()
        results = await asyncio.gather(*crowd, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == [2, 3]

    run(disk, work(), commit)
