"""The event loop of asyncio, or an error that says what to use instead."""

from __future__ import annotations

import asyncio

from hsmtoll.errors import UsageError

__all__ = ["running_loop", "shielded"]


def running_loop() -> asyncio.AbstractEventLoop:
    """The loop that runs the caller; UsageError under another library for tasks, such as trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise UsageError(
            "waiting for a token: no event loop of asyncio runs here",
            hint="call it in a task of asyncio; under trio, use hsmtoll.connect() and "
            "trio.to_thread.run_sync",
            code="no-event-loop",
        ) from None


async def shielded(future: asyncio.Future[None]) -> None:
    """Wait for a future that several tasks share: one task that is cancelled does not end it."""
    await asyncio.shield(future)
