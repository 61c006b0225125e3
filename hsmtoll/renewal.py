"""
The one renewal: sign, Maskinporten, Customs; written once, synchronously, for both clients.

Every attempt starts at the grant (new jti, new signature), within a budget of signatures.
Who waits for it and what is kept is decided in cache; PKCS#11 and the environment never enter.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from hsmtoll import apis, exchange
from hsmtoll.clock import offset_of, retry_after
from hsmtoll.errors import (
    ClockError,
    ConfigurationError,
    ExchangeRefused,
    HsmTollError,
    UsageError,
    foreign,
)
from hsmtoll.remembered import Remembered
from hsmtoll.stores import name_of
from hsmtoll.tokens import ANY, AccessToken, TokenRequest, Wish, details_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hsmtoll.apis import Identity
    from hsmtoll.budget import Budget
    from hsmtoll.cache import Cache, Flight
    from hsmtoll.clock import Clock, Skew
    from hsmtoll.exchange import Answer, Endpoints, Issued, Post
    from hsmtoll.signer import Signer
    from hsmtoll.wire import Wire

__all__ = ["Engine"]

_log = logging.getLogger("hsmtoll.client")

#: Seconds. A 401 on a younger token is not about its age, and a new one would change nothing.
_YOUNG: Final = 30.0

#: Seconds. A longer Retry-After is not slept through: it is the caller's to decide about.
_LONGEST_SLEEP: Final = 10.0

#: Refusals that a new grant may cure, tried once more and no oftener (PROTOCOL C08).
_ONCE: Final = ("MP-012", "MP-130", "issued-in-future")


class Engine:
    """
    A request in, a living Customs token out.

    *selector* is the hash of all settings that select key, identity and endpoints; with the
    identity itself and the request it is the key of the store (DESIGN 4.10).
    """

    def __init__(
        self,
        signer: Callable[[], Signer],
        *,
        endpoints: Endpoints,
        wire: Callable[[], Wire],
        cache: Cache,
        budget: Budget,
        clock: Clock,
        skew: Skew,
        selector: str,
        family: Identity,
        per_request: int = 2,
        default: TokenRequest | None = None,
        identity_file: Path | None = None,
    ) -> None:
        self.endpoints = endpoints
        self.cache = cache
        self.clock = clock
        self.skew = skew
        self.family = family
        self.signatures = 0
        #: Legs by name and outcome: a status, or the code of what went wrong before one.
        self.legs: Counter[tuple[str, str]] = Counter()
        self._signer = signer
        self._wire = wire
        self._budget = budget
        self._selector = selector
        self._per_request = per_request
        self._default = default
        # Who signs, learned at first contact, so that a warm start needs no device.
        self._identity = Remembered(identity_file)
        self._requests: dict[str | None, TokenRequest] = {}
        self._counting = threading.Lock()

    @cached_property
    def signer(self) -> Signer:
        """Who signs; made when a token has to be."""
        return self._signer()

    @cached_property
    def wire(self) -> Wire:
        """How the legs travel; made when the first one does."""
        return self._wire()

    def request(
        self,
        scope: str | None,
        *,
        consumer_org: str | None = None,
        resource: Sequence[str] | str | None = None,
        authorization_details: object = None,
    ) -> TokenRequest:
        """
        What is asked for: an API or a scope, or the default; ConfigurationError without one.

        *consumer_org* and *resource* win over the settings; ``""`` and ``()`` are none.
        *authorization_details* as `tokens.details_text` takes it. UsageError for bad values.
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

    def token(self, request: TokenRequest, wish: Wish = ANY) -> AccessToken:
        """From memory, the store, or a renewal. Raises what the renewal raises."""
        held = self.cache.held(request) if wish is ANY else None
        return held or self.cache.get(request, _Renewal(self, request), wish)

    async def atoken(self, request: TokenRequest, wish: Wish = ANY) -> AccessToken:
        """As token; what is held is given at once, and waiting holds no thread."""
        held = self.cache.held(request) if wish is ANY else None
        return held or await self.cache.aget(request, _Renewal(self, request), wish)

    def key(self, request: TokenRequest) -> str:
        """The key of the store; the device is asked who it is if nobody knows yet."""
        identity = self._identity.read() or self._met()
        consumer, details = f"for {request.consumer_org}", request.authorization_details
        return name_of(
            self._selector,
            identity,
            request.scope,
            *request.resource,
            consumer,
            f"details {details}",
        )

    def _met(self) -> str:
        """Who will sign; remembered if that is certain before it has signed."""
        from hsmtoll.signer import Elsewhere  # noqa: PLC0415 - it is there if anything signs

        identity = self.signer.identity()
        if not isinstance(self.signer, Elsewhere):
            self._identity.write(identity)
        return identity

    def _shown(self) -> None:
        """Remember who signed, where only that showed it."""
        from hsmtoll.signer import Elsewhere  # noqa: PLC0415 - see above

        signer = self.signer
        if isinstance(signer, Elsewhere) and (identity := signer.shown()) is not None:
            self._identity.write(identity)

    def renewed(self, request: TokenRequest, flight: Flight) -> AccessToken:
        """A new token, in as many attempts as the budget of a request allows."""
        for attempt in range(1, self._per_request + 1):
            try:
                return self._attempt(request, flight)
            except HsmTollError as exc:
                if exc.code in _ONCE and attempt > 1:
                    exc.retryable = False
                # A new certificate that is not taken yet: the older one may still be.
                if self._has_another(exc.code):
                    exc.retryable = True
                pause = _pause(exc, attempt)
                if pause is None or attempt == self._per_request:
                    raise
                _log.info("attempt %d of %d failed: %s", attempt, self._per_request, exc)
            self.clock.sleep(pause)
        raise AssertionError  # the loop returns or raises

    def _has_another(self, code: str | None) -> bool:
        from hsmtoll.signer import SecondChoice  # noqa: PLC0415 - it is there if anything signed

        signer = self.signer
        return code is not None and isinstance(signer, SecondChoice) and signer.refused(code)

    def _attempt(self, request: TokenRequest, flight: Flight) -> AccessToken:
        """One grant, new from the ground: jti, signature, both legs (PROTOCOL C06, C12)."""
        from hsmtoll.signer import Elsewhere, TokenSource  # noqa: PLC0415 - see above

        signer = self.signer
        if isinstance(signer, TokenSource):
            flight.doing = "the signing host"
            asked = self.clock.now()
            given = signer.issued(request)
            self._shown()
            return AccessToken(given.value, request.scope, asked, given.expires_in)
        flight.doing = "the signing host" if isinstance(signer, Elsewhere) else "signing"
        identity = self._met()
        # What is in the way of sending is found before a signature is spent.
        for url in (self.endpoints.token, self.endpoints.customs):
            self.wire.options(url)
        try:
            assertion = self._budget.assertion(signer, request, identity=identity)
        except HsmTollError as exc:
            self._count(1 if exc.signed else 0)
            raise
        self._count(1)
        self._shown()
        asked = self.clock.now()
        flight.doing = "Maskinporten"
        subject = self.granted(assertion)
        if request.scope == apis.SELF_TEST_SCOPE:
            raise self.self_test()
        flight.doing = "Customs"
        issued = self.exchanged(subject)
        lifetime = min(issued.expires_in, subject.expires_in)
        return AccessToken(issued.value, request.scope, asked, lifetime)

    def _count(self, signatures: int) -> None:
        with self._counting:
            self.signatures += signatures

    @staticmethod
    def self_test() -> ExchangeRefused:
        """Where a grant for the self-test's scope ends: it worked, and opens nothing at Customs."""
        return ExchangeRefused(
            f"{apis.SELF_TEST_SCOPE}: Maskinporten granted it; stopped before the exchange",
            hint="this scope is a self-test and opens nothing at Customs: "
            "the key, its certificates and Maskinporten work together",
            code="self-test",
        )

    def granted(self, assertion: str) -> Issued:
        """Leg one; the answer's Date teaches the skew, which may call for another attempt."""
        from hsmtoll import jws  # noqa: PLC0415 - a token at hand needs no grant

        claims = jws.read_unverified(assertion)[1]
        named, scope = claims.get("jti"), str(claims.get("scope", ""))
        jti = named if isinstance(named, str) else None
        post = exchange.grant_post(self.endpoints, assertion)
        sent = self.clock.now()

        def read(answer: Answer) -> Issued:
            offset = offset_of(answer.headers, sent=sent, received=self.clock.now())
            learned = offset is not None and self._learn(offset)
            try:
                return exchange.read_subject(answer, post, jti=jti, scope=scope)
            except HsmTollError as exc:
                if offset is not None and (isinstance(exc, ClockError) or exc.code == "MP-130"):
                    self.skew.check(offset)
                if isinstance(exc, ClockError):
                    exc.retryable = learned
                raise

        return self._leg(post, read, jti=jti)

    def exchanged(self, subject: Issued) -> Issued:
        """Leg two."""
        post = exchange.exchange_post(self.endpoints, subject)
        return self._leg(post, lambda answer: exchange.read_issued(answer, post))

    def _learn(self, offset: float) -> bool:
        if not self.skew.learn(offset):
            return False
        if self.skew.seconds:
            side = "behind" if offset > 0 else "ahead of"
            _log.warning(
                "clock: this machine is %.0f s %s Maskinporten; grants are corrected until it "
                "is synchronised",
                abs(offset),
                side,
            )
        else:
            _log.info("clock: this machine and Maskinporten agree again")
        return True

    def _leg(
        self, post: Post, read: Callable[[Answer], Issued], *, jti: str | None = None
    ) -> Issued:
        """One leg, and the one line of the log that tells of it."""
        began = self.clock.now()
        outcome, trace = "failed", "-"
        try:
            answer = self.wire.post(post)
            outcome = str(answer.status)
            ids = (answer.headers.get(name) for name in ("x-correlationid", "x-request-id"))
            said = next((each for each in ids if each), "-")
            try:
                issued = read(answer)
            except HsmTollError as exc:
                trace = exc.trace_id or exc.correlation_id or foreign(said, post.secret)
                if exc.retryable:
                    now = self.clock.now().wall
                    exc.retry_after = retry_after(answer.headers, now=now)
                raise
            # The log tells an id of theirs, and never a token that stands in its place.
            trace = foreign(said, post.secret, issued.value)
            return issued
        except HsmTollError as exc:
            outcome = outcome if outcome != "failed" else exc.code
            raise
        finally:
            with self._counting:
                self.legs[post.leg, outcome] += 1
            _log.info(
                "leg=%s host=%s status=%s ms=%.0f jti=%s trace=%s",
                post.leg,
                urlsplit(post.url).hostname,
                outcome,
                (self.clock.now().boot - began.boot) * 1000,
                jti or "-",
                trace,
            )

    def worth_renewing(self, value: str, request: TokenRequest) -> bool:
        """
        Whether a 401 on the token *value* calls for a new one.

        Not if it is younger than 30 s: then the API says no to something else (DESIGN 4.13).
        If another caller has renewed it already, the new one is used, and costs nothing.
        """
        held = self.cache.living(request)
        if held is None or held.value != value:
            return True
        return held.lifetime - held.remaining(self.clock.now()) >= _YOUNG


class _Renewal:
    """One request's source of tokens, as the cache asks for it."""

    __slots__ = ("_engine", "_request")

    def __init__(self, engine: Engine, request: TokenRequest) -> None:
        self._engine = engine
        self._request = request

    def key(self) -> str:
        """Of the store."""
        return self._engine.key(self._request)

    def fetch(self, flight: Flight) -> AccessToken:
        """A new token."""
        return self._engine.renewed(self._request, flight)


def _organisation(given: str) -> str | None:
    """*given* as the claim; ``None`` for an empty one."""
    if given and not (len(given) == 9 and given.isascii() and given.isdigit()):
        raise UsageError(
            f"consumer_org {foreign(given)}: nine digits are expected",
            hint="the Norwegian organisation number of whom it is for; another country's has none",
        )
    return given or None


def _resources(given: Sequence[str] | str) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else tuple(given)
    wrong = next((each for each in listed if not each.isprintable() or " " in each), None)
    if wrong is not None:
        raise UsageError(f"resource {foreign(wrong)}: a URI without white space is expected")
    return tuple(each for each in listed if each)


def _pause(exc: HsmTollError, attempt: int) -> float | None:
    """Seconds before the next attempt; None where there is to be none."""
    if not exc.retryable:
        return None
    if exc.retry_after is not None:
        jitter = random.uniform(0, 0.5)  # noqa: S311 - spreads callers, keeps no secret
        return exc.retry_after + jitter if exc.retry_after <= _LONGEST_SLEEP else None
    jitter = random.uniform(0, 1.0)  # noqa: S311 - as above
    return min(5.0, 0.5 * 2.0 ** (attempt - 1) + jitter)
