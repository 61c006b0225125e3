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
    """A request; *content* is the body, of type *media*."""

    method: str
    path: str
    content: bytes | None = None
    media: str = "application/json"


@dataclass(frozen=True, slots=True)
class Wait:
    """A pause, in seconds."""

    seconds: float


class NoResponse(Exception):
    """
    No complete response to a request. *unsent*: certainly nothing of the request was sent.

    The text is the reason; *code* and *hint* as for HsmTollError.
    """

    def __init__(
        self, why: str, *, code: str = "unreachable", hint: str | None = None, unsent: bool = False
    ) -> None:
        super().__init__(why)
        self.code = code
        self.hint = hint
        self.unsent = unsent


#: The value sent into the generator after each step: a response, an error, or None after a pause.
Outcome = httpx.Response | NoResponse | HsmTollError | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """
    The result of a submission or an upload.

    *request_id*: assigned by Customs (by the client for presentation). *mrn*: movement reference
    number, 18 characters, needed to change or delete it. *body*: the last response as JSON.
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
    """Run the generator; *ask* sends one request to *origin* and returns the response."""
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
    """As run_conversation, for tasks."""
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
