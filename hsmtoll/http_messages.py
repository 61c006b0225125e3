"""What is sent over HTTP and what comes back, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HttpResponse", "Post"]


@dataclass(frozen=True, slots=True, repr=False)
class Post:
    """A form to be posted: the *server*'s name, the URL, the fields, and the *secret* in them."""

    server: str
    url: str
    form: Mapping[str, str]
    secret: str

    def __repr__(self) -> str:
        return f"<Post {self.server} to {self.url}>"


@dataclass(frozen=True, slots=True, repr=False)
class HttpResponse:
    """What came back: status, headers with lower-case names, at most 1 MiB of body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"<HttpResponse {self.status}>"
