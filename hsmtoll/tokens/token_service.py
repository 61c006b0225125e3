"""
Customs tokens for requests: from memory, from the store, or by a renewal.

Both clients, the httpx.Auth classes and the background refresher get their tokens here. Caching and
waiting are in cache, the renewal itself in renewal.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hsmtoll import apis
from hsmtoll.errors import ConfigurationError, UsageError, sanitized
from hsmtoll.fork import after_fork
from hsmtoll.token import (
    NO_REQUIREMENTS,
    AccessToken,
    TokenRequest,
    TokenRequirements,
    details_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from hsmtoll.apis import Identity
    from hsmtoll.clock import Clock, Skew
    from hsmtoll.tokens.cache import Cache, Renewer
    from hsmtoll.tokens.exchange import Endpoints
    from hsmtoll.transport import HttpClient

__all__ = ["Counts", "TokenService"]

#: Seconds. A 401 for a younger token has another cause than its age; a new token would not help.
_YOUNG: Final = 30.0


@dataclass(slots=True, weakref_slot=True)
class Counts:
    """
    Counters. *signatures*: number spent. *requests*: to the token endpoints, by server and
    outcome (a status, or the code of the error without one); *ended* is called after each of them,
    with its seconds. *not_after*: end of validity of the certificate that signed last.
    """

    signatures: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    not_after: datetime | None = None
    ended: Callable[[str, str, float], object] = lambda *_: None
    guard: threading.Lock = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._start_afresh()
        after_fork(self._start_afresh)

    def _start_afresh(self) -> None:
        # In a forked child the thread that held the guard does not exist.
        self.guard = threading.Lock()


class TokenService:
    """
    The tokens of one set of settings. *renewal* and *http_client* are created on first use: a token
    found in the store needs neither a signer nor the libraries behind it.
    """

    def __init__(
        self,
        renewal: Callable[[], Renewer],
        *,
        endpoints: Endpoints,
        http_client: Callable[[], HttpClient],
        cache: Cache,
        clock: Clock,
        skew: Skew,
        counts: Counts,
        family: Identity,
        default: TokenRequest | None = None,
        pin_state: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.endpoints = endpoints
        self.cache = cache
        self.clock = clock
        self.skew = skew
        self.counts = counts
        self.family = family
        self.pin_state = pin_state
        self._renewal = renewal
        self._http_client = http_client
        self._default = default
        self._requests: dict[str | None, TokenRequest] = {}

    @property
    def http_client(self) -> HttpClient:
        """The HTTP client for the token endpoints and Customs."""
        return self._http_client()

    def request(
        self,
        scope: str | None,
        *,
        consumer_org: str | None = None,
        resource: Sequence[str] | str | None = None,
        authorization_details: object = None,
    ) -> TokenRequest:
        """
        The request for an API or a scope, or the default; ConfigurationError if there is none.

        *consumer_org* and *resource* override the settings; ``""`` and ``()`` mean none.
        *authorization_details* as for `token.details_text`. UsageError for invalid values.
        """
        plain = consumer_org is None and resource is None and authorization_details is None
        if plain and (known := self._requests.get(scope)) is not None:
            return known
        default = self._default or TokenRequest("")
        word = scope if scope is not None else default.scope
        if not word:
            raise ConfigurationError(
                "HSMTOLL_SCOPE: required where no API or scope is named",
                hint="set it to an API of `hsmtoll apis`, such as road",
                code="setting-missing",
            )
        request = default._replace(scope=apis.scope_of(word, self.family))
        if plain:
            self._requests[scope] = request
            return request
        if consumer_org is not None:
            request = request._replace(consumer_org=_organisation(consumer_org))
        if resource is not None:
            request = request._replace(resource=_resources(resource))
        return request._replace(authorization_details=details_text(authorization_details))

    def requirements(self, min_life: float, *, renew: bool) -> TokenRequirements:
        """Require a lifetime of *min_life* seconds at least; with *renew*, a new token."""
        if not renew and not min_life:
            return NO_REQUIREMENTS
        return TokenRequirements(min_life, since=self.clock.now() if renew else None)

    def token(
        self, request: TokenRequest, requirements: TokenRequirements = NO_REQUIREMENTS
    ) -> AccessToken:
        """
        A token from memory, the store, or a renewal, waiting HSMTOLL_DEADLINE at most. Raises as
        `Cache.get`.
        """
        return self.cache.get(request, self._renewal, requirements)

    async def atoken(
        self, request: TokenRequest, requirements: TokenRequirements = NO_REQUIREMENTS
    ) -> AccessToken:
        """As token, for tasks: a token in memory is returned at once, waiting blocks no thread."""
        return await self.cache.aget(request, self._renewal, requirements)

    def worth_renewing(self, value: str, request: TokenRequest) -> bool:
        """
        Whether to renew after a 401 for the token *value*.

        False if it is younger than 30 s: then the 401 has another cause. True if another caller
        has renewed it already: the new token is used, without a signature.
        """
        held = self.cache.unexpired_in_memory(request)
        if held is None or held.value != value:
            return True
        return held.lifetime - held.remaining(self.clock.now()) >= _YOUNG


def _organisation(given: str) -> str | None:
    """The claim consumer_org; ``None`` for an empty one. UsageError unless nine digits."""
    if given and not (len(given) == 9 and given.isascii() and given.isdigit()):
        raise UsageError(
            f"consumer_org {sanitized(given)}: nine digits are expected",
            hint="the Norwegian organisation number of whom it is for; another country's has none",
        )
    return given or None


def _resources(given: Sequence[str] | str) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else tuple(given)
    wrong = next((each for each in listed if not each.isprintable() or " " in each), None)
    if wrong is not None:
        raise UsageError(f"resource {sanitized(wrong)}: a URI without white space is expected")
    return tuple(each for each in listed if each)
