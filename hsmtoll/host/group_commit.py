"""
Group commit: one fsync of the audit serves every request whose records were appended before it.

    request: append, synced ──► wait ─────────────► go on
    thread:                     fsync ──► fsync ──► …
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from hsmtoll.errors import HsmTollError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.host.audit import Audit

__all__ = ["GroupCommit"]


class GroupCommit:
    """
    Syncs the audit in one thread, for the coroutines of one event loop. Requests that arrive
    during a sync share the next one.
    """

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._thread = ThreadPoolExecutor(1, "hsmtoll-audit")
        self._waiting: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None

    async def write(self, event: str, **members: Any) -> None:
        """Append one record and wait until it is on disk. AuditBroken if that fails."""
        self._audit.append(event, **members)
        await self.synced()

    async def synced(self) -> None:
        """Wait until all records appended so far are on disk. AuditBroken if that fails."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync())
        await future

    async def _sync(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            failure: Exception | None = None
            try:
                await self.in_thread(self._audit.sync, self._audit.seq)
            except HsmTollError as exc:
                failure = exc
            for future in waiting:
                # Cancelled waiters are already done.
                if not future.done():
                    future.set_exception(failure) if failure else future.set_result(None)
        self._syncing = None

    async def in_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function*, which may wait for the disk, in the audit's thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
