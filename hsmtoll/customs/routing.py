"""
The routing feed, and the file with the position up to which it was processed.
"""

from __future__ import annotations

import http
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import httpx

from hsmtoll import apis, files
from hsmtoll.customs.conversation import NoResponse, Outcome, Send
from hsmtoll.customs.errors import status_error
from hsmtoll.customs.limits import asend_with_deadline, send_with_deadline
from hsmtoll.errors import NetworkError, UsageError, sanitized
from hsmtoll.jsonio import read_lenient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from hsmtoll.apis import Api
    from hsmtoll.transport import HttpClient

    Batch = tuple[Any, ...]
    Feed = Generator[Send | Batch, Outcome, None]

__all__ = ["Marker", "arouting", "marker_of", "routing"]

#: A UUID is documented; any other text must still be safe in a query and in a file.
_MARKER = re.compile(r"[\x21-\x7e]{1,256}")


class Marker:
    """
    The position in a routing feed: the id of the last processed signal, kept in a file (0600).
    Without a *path* nothing is kept, and the feed starts from the beginning.

    The file is written after the caller has processed a batch (C24): a program that is killed
    before that gets the batch again.
    """

    def __init__(self, path: Path | str | None) -> None:
        self._path = None if path is None else Path(path)

    def read(self) -> str | None:
        """The id, or ``None`` at the beginning. UsageError for a file without a valid id."""
        if self._path is None:
            return None
        try:
            text = self._path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise self._unusable(exc) from exc
        if text and not _MARKER.fullmatch(text):
            raise self._unusable(None)
        return text or None

    def write(self, marker: str) -> None:
        """
        Write *marker* to the disk, atomically and synchronised. UsageError if it cannot be written.
        """
        if self._path is None:
            return
        try:
            files.replace(self._path, marker.encode("ascii"))
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _unusable(self, exc: Exception | None) -> UsageError:
        why = (isinstance(exc, OSError) and exc.strerror) or "not the id of a signal"
        return UsageError(
            f"marker {sanitized(self._path)}: it cannot be used ({why})",
            hint="a file of this program's own; without it the feed begins anew",
        )


def marker_of(signal: Any) -> str | None:
    """The id of one signal, which serves as marker; ``None`` if it has no valid one."""
    result = signal.get("routingResult") if isinstance(signal, dict) else None
    marker = result.get("id") if isinstance(result, dict) else None
    return marker if isinstance(marker, str) and _MARKER.fullmatch(marker) else None


def routing(
    client: httpx.Client,
    level: str,
    marker: Marker,
    *,
    now: Callable[[], float],
    http_client: HttpClient,
) -> Iterator[Batch]:
    """
    Batches of routing signals after *marker*, at most 1,000 each, until the feed is empty.

    At-least-once delivery: the marker is saved when the next batch is asked for. The deadline of
    *http_client* applies to each request. Raises what a call raises, UsageError for an unusable
    marker, NetworkError for a response that is not a feed.
    """
    feed = _feed(level, marker, now)
    outcome: Outcome = None
    while (step := _next(feed, outcome)) is not None:
        outcome = None
        if isinstance(step, Send):
            try:
                outcome = send_with_deadline(
                    client, step.method, step.path, http_client=http_client
                )
            except NoResponse as exc:
                outcome = exc
        else:
            yield step


async def arouting(
    client: httpx.AsyncClient,
    level: str,
    marker: Marker,
    *,
    now: Callable[[], float],
    http_client: HttpClient,
) -> AsyncIterator[Batch]:
    """As routing, for tasks."""
    feed = _feed(level, marker, now)
    outcome: Outcome = None
    while (step := _next(feed, outcome)) is not None:
        outcome = None
        if isinstance(step, Send):
            try:
                outcome = await asend_with_deadline(
                    client, step.method, step.path, http_client=http_client
                )
            except NoResponse as exc:
                outcome = exc
        else:
            yield step


def _feed(level: str, marker: Marker, now: Callable[[], float]) -> Feed:
    """Yields each request, to be answered with its outcome, and each batch."""
    api = apis.named("routing")
    at = marker.read()
    while True:
        query = f"?{urlencode({'marker': at})}" if at else ""
        outcome = yield Send("GET", f"/{level}{query}")
        if isinstance(outcome, NoResponse):
            raise _no_response_error(api, outcome) from outcome
        if not isinstance(outcome, httpx.Response):
            raise TypeError("a request has no outcome")
        signals, last = _batch(outcome, api, at, now())
        if last is None:
            return
        yield signals
        marker.write(last)
        at = last


def _next(feed: Feed, outcome: Outcome) -> Send | Batch | None:
    """The next step of *feed*; None at its end."""
    try:
        return feed.send(outcome)
    except StopIteration:
        return None


def _batch(
    response: httpx.Response, api: Api, at: str | None, now: float
) -> tuple[Batch, str | None]:
    """
    The signals after *at*, and the marker of the last one; no signals and ``None`` at the end.

    Only an empty list is the end of the feed; any other response without signals is an error.
    """
    error = status_error(response, api, now=now)
    if error is not None:
        raise error
    signals = read_lenient(response.content)
    if response.status_code != http.HTTPStatus.OK or not isinstance(signals, list):
        raise _feed_error(api, f"{response.status_code}, and no list of signals")
    if not signals:
        return (), None
    marker = marker_of(signals[-1])
    if marker is None:
        raise _feed_error(api, "a signal without routingResult.id")
    if marker == at:
        raise _feed_error(api, "the same batch again")
    return tuple(signals), marker


def _feed_error(api: Api, why: str) -> NetworkError:
    return NetworkError(
        f"API {api.name}: {why}",
        hint="a proxy or gateway may have answered; what came before is taken, ask again later",
        code="feed",
        retryable=True,
    )


def _no_response_error(api: Api, exc: NoResponse) -> NetworkError:
    return NetworkError(
        f"API {api.name}: no answer came ({exc})",
        hint=f"what came before is taken; it is safe to ask again\n{exc.hint or ''}".rstrip(),
        code=exc.code,
        retryable=True,
    )
