"""
Background refresh for long-running programs: no caller waits, and many processes do not renew at
the same time.

The cache decides whether a token is renewed; this thread only asks for it in time.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final, Self

from hsmtoll.backoff import jitter
from hsmtoll.errors import HsmTollError
from hsmtoll.token import TokenRequirements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hsmtoll.token import TokenRequest
    from hsmtoll.tokens.token_service import TokenService

__all__ = ["BackgroundRefresher"]

_log = logging.getLogger("hsmtoll.client")

#: Seconds between two checks of the clocks, so that a resumed machine renews soon.
_POLL_INTERVAL: Final = 10.0

#: Multiples of the stale margin; each thread picks one at random, so that renewals spread out.
_EARLY: Final = (1.05, 1.25)


class BackgroundRefresher:
    """
    A thread that keeps the tokens of some requests fresh until `stop`, or the end of its ``with``.

    *due* and *done* count renewals. A failed renewal is logged and tried again after a pause.
    """

    def __init__(self, token_service: TokenService, requests: Sequence[TokenRequest]) -> None:
        self.due = 0
        self.done = 0
        self._token_service = token_service
        self._early = {request: jitter(*_EARLY) for request in requests}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hsmtoll-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; a renewal in progress is completed and its token cached."""
        self._ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        wait = 0.0
        while not self._ended.wait(wait):
            wait = min(self._refresh_if_due(request) for request in list(self._early))

    def _refresh_if_due(self, request: TokenRequest) -> float:
        """Renew the token if it is due; returns the seconds until the next check."""
        token_service = self._token_service
        held = token_service.cache.unexpired_in_memory(request)
        if held is not None:
            before = held.margin * self._early[request]
            spare = held.remaining(token_service.clock.now()) - before
            if spare > 0:
                return min(spare, _POLL_INTERVAL)
        self.due += 1
        try:
            # A new random value each time, so that two programs do not stay synchronised.
            self._early[request] = jitter(*_EARLY)
            min_life = min(held.lifetime - 1.0, before) if held else 0.0
            token_service.token(request, TokenRequirements(min_life=max(0.0, min_life)))
        except Exception as exc:  # noqa: BLE001 - the next attempt may succeed
            # The text of an exception that is not ours may contain a secret.
            reason = exc if isinstance(exc, HsmTollError) else type(exc).__name__
            _log.warning("renewal ahead of time failed: %s", reason)
            return _POLL_INTERVAL * jitter(0.5, 1.0)
        self.done += 1
        return 0.2
