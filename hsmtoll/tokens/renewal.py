"""
Token renewal: rate limit, signed grant, Maskinporten, Customs.

Every attempt starts with a new grant (new jti, new signature), within the rate limit. Waiting and
caching are in cache; PKCS#11 and the environment variables are not used here.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

from hsmtoll import apis
from hsmtoll.backoff import delay, jitter
from hsmtoll.clock import offset_of, retry_after
from hsmtoll.errors import ClockError, ExchangeRefused, HsmTollError, sanitized
from hsmtoll.signing.signer import new_jti
from hsmtoll.token import AccessToken
from hsmtoll.tokens import exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.clock import Clock, Skew
    from hsmtoll.http_messages import HttpResponse, Post
    from hsmtoll.remembered import PersistedText
    from hsmtoll.signing.grant import SignedGrant
    from hsmtoll.signing.signer import Signer
    from hsmtoll.token import ClockReading, TokenRequest
    from hsmtoll.tokens.exchange import Endpoints, Issued
    from hsmtoll.tokens.rate_limit import RateLimit
    from hsmtoll.tokens.single_flight import PendingRenewal
    from hsmtoll.tokens.token_service import Counts
    from hsmtoll.transport import HttpClient

__all__ = ["Renewal", "pause_after", "with_retries"]

_T = TypeVar("_T")

_log = logging.getLogger("hsmtoll.client")

#: Seconds. With a longer Retry-After the error is raised at once: the caller decides.
_LONGEST_SLEEP: Final = 10.0
#: Seconds. The longest pause without a Retry-After.
_LONGEST_PAUSE: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """
    Everything that a renewal needs. *signing* names the phase in which *signer* signs, for
    time-outs. *selector* and *remembered* as for `Cache`: signatures are counted per signer, and
    per selector while the signer is unknown. *per_request*: maximum signatures for one request.
    """

    signer: Signer
    endpoints: Endpoints
    http_client: HttpClient
    rate_limit: RateLimit
    clock: Clock
    skew: Skew
    selector: str
    remembered: PersistedText
    counts: Counts
    per_request: int = 2
    signing: str = "signing"

    def known_identity(self) -> str | None:
        """As `Signer.known_identity`."""
        return self.signer.known_identity()

    def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
        """Obtain a new token. Each attempt has a new grant."""

        def attempt(number: int) -> AccessToken:
            self._check_connections()
            pending.phase = self.signing
            grant = self.sign(request)
            pending.identity = grant.identity
            asked = self.clock.now()
            pending.phase = "Maskinporten"
            subject = self._granted(grant, retried=number > 1)
            if request.scope == apis.SELF_TEST_SCOPE:
                raise _self_test()
            pending.phase = "Customs"
            issued = self._exchanged(subject)
            lifetime = min(issued.expires_in, subject.expires_in)
            return AccessToken(issued.value, request.scope, asked, lifetime)

        return with_retries(attempt, attempts=self.per_request, clock=self.clock)

    def sign(self, request: TokenRequest) -> SignedGrant:
        """One grant, within the rate limit. Raises TryAgainLater (``budget``) and as `Signer`."""
        identity = self.remembered.read() or self.signer.known_identity()
        counted = identity or self.selector
        self.rate_limit.acquire(counted)
        try:
            grant = self.signer.sign(request, jti=new_jti())
        except HsmTollError as exc:
            if exc.signed:
                self._count()
            else:
                self.rate_limit.give_back(counted)
            raise
        self._count()
        self.counts.not_after = grant.not_after
        if identity is None:
            self.rate_limit.record(grant.identity)
        return grant

    def _count(self) -> None:
        with self.counts.guard:
            self.counts.signatures += 1

    def _check_connections(self) -> None:
        """Raise errors in proxy and TLS settings before a signature is spent."""
        for url in (self.endpoints.token, self.endpoints.customs):
            self.http_client.options(url)

    def _granted(self, grant: SignedGrant, *, retried: bool) -> Issued:
        """
        Maskinporten's token. The response's Date corrects this machine's clock. If Maskinporten
        rejects the certificate, the signer is notified and may use an older one.
        """
        post = exchange.grant_post(self.endpoints, grant.assertion)
        with self._logged_request(post, grant.jti) as logged:
            logged.answer = answer = self.http_client.post(post)
            now = self.clock.now()
            offset = offset_of(answer.headers, sent=logged.began, received=now)
            corrected = offset is not None and self._corrected(offset)
            try:
                logged.issued = exchange.read_subject(
                    answer,
                    post,
                    jti=grant.jti or None,
                    scope=grant.scope,
                    retried=retried,
                    corrected=corrected,
                    rejected=partial(self.signer.rejected, grant),
                    wait=retry_after(answer.headers, now=now.wall),
                )
            except HsmTollError as exc:
                if offset is not None and (isinstance(exc, ClockError) or exc.code == "MP-130"):
                    self.skew.check(offset)
                raise
            return logged.issued

    def _exchanged(self, subject: Issued) -> Issued:
        """Customs' token."""
        post = exchange.exchange_post(self.endpoints, subject)
        with self._logged_request(post, None) as logged:
            logged.answer = answer = self.http_client.post(post)
            wait = retry_after(answer.headers, now=self.clock.now().wall)
            logged.issued = exchange.read_issued(answer, post, wait=wait)
            return logged.issued

    def _corrected(self, offset: float) -> bool:
        """Whether *offset* (seconds) changed the correction of this machine's clock."""
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

    @contextmanager
    def _logged_request(self, post: Post, jti: str | None) -> Iterator[_LoggedRequest]:
        """Count one request with its response, and log one line about it."""
        logged = _LoggedRequest(self.clock.now())
        outcome, trace = "failed", "-"
        try:
            yield logged
            trace = logged.trace(post)
        except HsmTollError as exc:
            outcome = exc.code
            trace = exc.trace_id or exc.correlation_id or logged.trace(post)
            raise
        finally:
            if logged.answer is not None:
                outcome = str(logged.answer.status)
            seconds = self.clock.now().boot - logged.began.boot
            with self.counts.guard:
                self.counts.requests[post.server, outcome] += 1
            self.counts.ended(post.server, outcome, seconds)
            _log.info(
                "server=%s host=%s status=%s ms=%.0f jti=%s trace=%s",
                post.server,
                urlsplit(post.url).hostname,
                outcome,
                seconds * 1000,
                jti or "-",
                trace,
                extra={"event": "token-request", "jti": jti, "trace": trace.strip("-")},
            )


@dataclass(slots=True)
class _LoggedRequest:
    """The result of one request, sent at *began*."""

    began: ClockReading
    answer: HttpResponse | None = None
    issued: Issued | None = None

    def trace(self, post: Post) -> str:
        """The server's request id, with any token in it redacted."""
        headers = self.answer.headers if self.answer is not None else {}
        ids = (headers.get(name) for name in ("x-correlationid", "x-request-id"))
        secrets = (post.secret, self.issued.value) if self.issued is not None else (post.secret,)
        return sanitized(next((each for each in ids if each), "-"), *secrets)


def _self_test() -> ExchangeRefused:
    """The result of a self-test: Maskinporten accepted the grant, Customs has nothing for it."""
    return ExchangeRefused(
        f"{apis.SELF_TEST_SCOPE}: Maskinporten granted it; stopped before the exchange",
        hint="this scope is a self-test and opens nothing at Customs: "
        "the key, its certificates and Maskinporten work together",
        code="self-test",
    )


def with_retries(attempt: Callable[[int], _T], *, attempts: int, clock: Clock) -> _T:
    """
    The result of *attempt*, which is called with 1, 2, … and repeated after a pause while its error
    is retryable, at most *attempts* times.
    """
    for number in range(1, attempts):
        try:
            return attempt(number)
        except HsmTollError as exc:
            pause = pause_after(exc, number)
            if pause is None:
                raise
            _log.info("attempt %d of %d failed: %s", number, attempts, exc)
        clock.sleep(pause)
    return attempt(attempts)


def pause_after(exc: HsmTollError, attempt: int) -> float | None:
    """
    Seconds to wait after *attempt* (1, 2, …) failed with *exc*; ``None`` if it is not repeated.
    """
    if not exc.retryable:
        return None
    if exc.retry_after is not None:
        return exc.retry_after + jitter(0, 0.5) if exc.retry_after <= _LONGEST_SLEEP else None
    return min(delay(attempt, first=0.5, longest=_LONGEST_PAUSE) + jitter(0, 1.0), _LONGEST_PAUSE)
