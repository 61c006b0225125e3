"""
Sequences of requests to Customs as generators, written once for threads and tasks.

A generator yields what to send or how long to wait, and receives the responses. `run_conversation`
and `arun_conversation` drive it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from hsmtoll.errors import HsmTollError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping

__all__ = [
    "Conversation",
    "NoResponse",
    "Outcome",
    "Receipt",
    "Send",
    "Wait",
    "arun_conversation",
    "run_conversation",
]


@dataclass(frozen=True, slots=True)
class Send:
    """One request; *json* is a message, *content* with *media* anything else."""

    method: str
    path: str
    content: bytes | None = None
    media: str = "application/json"


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds to let pass."""

    seconds: float


class NoResponse(Exception):
    """
    No whole answer came to a request. *unsent*: nothing of it was sent, for certain.

    The text says why; *code* and *hint* as in an error of ours.
    """

    def __init__(
        self, why: str, *, code: str = "unreachable", hint: str | None = None, unsent: bool = False
    ) -> None:
        super().__init__(why)
        self.code = code
        self.hint = hint
        self.unsent = unsent


#: What a conversation is told after each step: an answer, why none came, or nothing.
Outcome = httpx.Response | NoResponse | HsmTollError | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """
    What became of a submission or an upload.

    *request_id* is Customs' (the client's own for presentation), *mrn* the 18 characters by
    which it can be changed and deleted, *body* the whole last answer.
    """

    request_id: str | None
    mrn: str | None
    body: Mapping[str, Any]


if TYPE_CHECKING:
    Conversation = Generator[Send | Wait, Outcome, Receipt]


def run_conversation(
    conversation: Conversation,
    ask: Callable[..., httpx.Response],
    origin: str,
    sleep: Callable[[float], None],
) -> Receipt:
    """Hold a conversation; *ask* is one request to *origin* with its answer."""
    outcome: Outcome = None
    try:
        while True:
            step = conversation.send(outcome)
            if isinstance(step, Wait):
                sleep(step.seconds)
                outcome = None
                continue
            try:
                outcome = ask(step.method, origin + step.path, **_sent(step))
            except (NoResponse, HsmTollError) as exc:
                outcome = exc
    except StopIteration as end:
        receipt: Receipt = end.value
        return receipt


async def arun_conversation(
    conversation: Conversation,
    ask: Callable[..., Awaitable[httpx.Response]],
    origin: str,
    sleep: Callable[[float], Awaitable[None]],
) -> Receipt:
    """As spoken, for tasks."""
    outcome: Outcome = None
    try:
        while True:
            step = conversation.send(outcome)
            if isinstance(step, Wait):
                await sleep(step.seconds)
                outcome = None
                continue
            try:
                outcome = await ask(step.method, origin + step.path, **_sent(step))
            except (NoResponse, HsmTollError) as exc:
                outcome = exc
    except StopIteration as end:
        receipt: Receipt = end.value
        return receipt


def _sent(step: Send) -> dict[str, Any]:
    if step.content is None:
        return {}
    return {"content": step.content, "headers": {"content-type": step.media}}
