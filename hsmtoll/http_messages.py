"""What is sent over HTTP and what comes back, as values; and the JSON in an answer, bounded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Answer", "Post", "read_json"]

#: Lists and objects that an answer may have, and bytes for each one beyond: what they cost in time
#: and memory is a hundred times what their two bytes show.
_MOST_VALUES: Final = 20_000
_BYTES_EACH: Final = 32


@dataclass(frozen=True, slots=True, repr=False)
class Post:
    """One form to be posted: the *leg*'s name, the URL, the fields (one of them is secret)."""

    leg: str
    url: str
    form: Mapping[str, str]
    secret: str

    def __repr__(self) -> str:
        return f"<Post {self.leg} to {self.url}>"


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """What came back: status, headers with lower-case names, at most 1 MiB of body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"<Answer {self.status}>"


def read_json(body: bytes) -> Any:
    """The value in an answer; ``None`` for what is no JSON, or has more values than an answer."""
    if body.count(b"[") + body.count(b"{") > _MOST_VALUES + len(body) // _BYTES_EACH:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
