"""
The two token requests and their responses: grant → access token → Customs token.

Values only: no network, no retries, no clock. Sources: RFC 7523, RFC 8693,
https://docs.digdir.no/docs/Maskinporten/ and https://toll.github.io.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import (
    ClockError,
    ExchangeRefused,
    GrantRefused,
    HsmTollError,
    NetworkError,
    ScopeNotGranted,
    TryAgainLater,
    sanitized,
)
from hsmtoll.http_messages import Post
from hsmtoll.jsonio import read_lenient
from hsmtoll.tokens import mp_codes

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.http_messages import HttpResponse

__all__ = [
    "PROD",
    "TEST",
    "Endpoints",
    "Issued",
    "exchange_post",
    "grant_post",
    "read_issued",
    "read_subject",
]

#: RFC 7523 section 8.1.
JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"

#: RFC 6750 section 2.1, b64token: the syntax of a bearer token.
_BEARER = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
#: Characters of a bearer token; servers accept headers of about 8 kB.
_LONGEST_BEARER: Final = 16 * 1024

_TRACE = re.compile(r"\((?:trace_id|correlation id): {0,8}([0-9A-Za-z-]{8,64})\)$")
#: Characters of an error text that are searched: matching longer texts could take very long.
_MAX_ERROR_TEXT: Final = 2000
_MP = re.compile(r"MP-\d{3}")
_LONGEST: Final = 86_400


@dataclass(frozen=True, slots=True)
class Endpoints:
    """*issuer*: the grant's ``aud``, byte for byte. *token*: URL. *customs*: origin."""

    issuer: str
    token: str
    customs: str


TEST: Final = Endpoints(
    "https://test.maskinporten.no/",
    "https://test.maskinporten.no/token",
    "https://api-test.toll.no",
)
PROD: Final = Endpoints(
    "https://maskinporten.no/", "https://maskinporten.no/token", "https://api.toll.no"
)


@dataclass(frozen=True, slots=True, repr=False)
class Issued:
    """A bearer token and its lifetime in seconds; the repr hides the token."""

    value: str
    expires_in: int

    def __repr__(self) -> str:
        return f"<Issued for {self.expires_in} s>"


def grant_post(endpoints: Endpoints, assertion: str) -> Post:
    """
    The request for Maskinporten's token (RFC 7523 section 2.1), without client authentication.
    """
    form = {"grant_type": JWT_BEARER, "assertion": assertion}
    return Post("Maskinporten", endpoints.token, form, assertion)


def exchange_post(endpoints: Endpoints, subject: Issued) -> Post:
    """The token exchange at Customs, which expects short names instead of RFC 8693's URNs (T02)."""
    form = {
        "grant_type": "token-exchange",
        "subject_token_type": "access_token",
        "subject_token": subject.value,
    }
    url = f"{endpoints.customs}/api/access/external/oauth/token"
    return Post("Customs", url, form, subject.value)


def read_subject(
    answer: HttpResponse,
    post: Post,
    *,
    jti: str | None = None,
    scope: str = "",
    retried: bool = False,
    corrected: bool = False,
    rejected: Callable[[str], bool] = lambda _: False,
    wait: float | None = None,
) -> Issued:
    """
    Read Maskinporten's response: the subject token of the exchange. *scope*: the requested scopes,
    separated by spaces. *wait*: the response's Retry-After in seconds.

    Retryable refusals: none if the grant was *retried* already; one about time, if this response
    *corrected* the clock; one about the certificate, if *rejected*, called with the code, returns
    that there is another certificate to try.

    If the response names scopes, they must include all requested ones; if it names none, all are
    granted (RFC 6749 section 5.1). Raises GrantRefused or ScopeNotGranted with the MP code, its
    meaning, who must act and the trace id; ClockError if the time is wrong; TryAgainLater for 429
    and NetworkError for 5xx, both retryable.
    """
    if answer.status == 200:
        return _issued(answer, post, GrantRefused, scope)
    _raise_for_trouble(answer, post, jti, wait)
    raise _refused(
        answer,
        post,
        jti,
        again=not retried,
        corrected=corrected,
        rejected=rejected,
        wait=wait,
    )


def read_issued(answer: HttpResponse, post: Post, *, wait: float | None = None) -> Issued:
    """
    Read Customs' response: the Customs token; *wait* as for `read_subject`.

    ``issued_token_type`` is not checked (C15). Raises ExchangeRefused, TryAgainLater for 429,
    NetworkError for 5xx.
    """
    if answer.status == 200:
        return _issued(answer, post, ExchangeRefused)
    _raise_for_trouble(answer, post, None, wait)
    error_text = _error_text(answer, read_lenient(answer.body))
    text = sanitized(error_text, post.secret) or "no reason given"
    scope = "not authorized to request scope" in error_text.lower()
    raise ExchangeRefused(
        f"exchange at Customs: {answer.status}, {text}",
        hint=(
            "check that the scope is of the right family, that the organisation is registered for "
            "Digitoll and that the integration has the scope; then ask Customs (digitoll@toll.no)"
            if scope
            else "Customs did not take Maskinporten's token; check HSMTOLL_ENVIRONMENT, then ask "
            "Customs (digitoll@toll.no) with the correlation id"
        ),
        code="scope-not-authorized" if scope else "exchange-refused",
        who="customs",
        correlation_id=_correlation(answer, post.secret),
    )


def _issued(answer: HttpResponse, post: Post, error: type[HsmTollError], scope: str = "") -> Issued:
    read = read_lenient(answer.body)
    body = read if isinstance(read, dict) else {}
    value, seconds, kind = (body.get(k) for k in ("access_token", "expires_in", "token_type"))

    def unusable(why: str) -> HsmTollError:
        error_text = str(value or "")
        return error(
            f"{post.server} answered 200, but {why}",
            hint="a proxy or gateway may have answered: check HSMTOLL_PROXY and the endpoints",
            code="answer-unusable",
            # The token in this response may be valid, so it must be redacted.
            correlation_id=_correlation(answer, post.secret, error_text)
            if len(error_text) <= _LONGEST_BEARER
            else None,
        )

    if not isinstance(read, dict):
        raise unusable("not with a JSON object")
    if not isinstance(value, str) or not _BEARER.fullmatch(value):
        raise unusable("access_token is not a bearer token (RFC 6750)")
    if len(value) > _LONGEST_BEARER:
        raise unusable(f"access_token has more than {_LONGEST_BEARER} characters")
    if type(seconds) is not int or not 1 <= seconds <= _LONGEST:
        raise unusable(f"expires_in is not a whole number of seconds in 1…{_LONGEST}")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise unusable("token_type is not Bearer")
    granted = body.get("scope", scope) if scope else ""
    if not isinstance(granted, str):
        raise unusable("scope is not a string")
    if missing := set(scope.split()).difference(granted.split()):
        raise ScopeNotGranted(
            f"{post.server} granted fewer scopes than requested, without "
            f"{sanitized(' '.join(missing))}",
            hint=mp_codes.REFUSALS["MP-200"].do,
            code="scope-narrowed",
            who="you",
        )
    return Issued(value, seconds)


def _raise_for_trouble(
    answer: HttpResponse, post: Post, jti: str | None, wait: float | None
) -> None:
    where = f"{post.server} answered {answer.status}"
    correlation = _correlation(answer, post.secret)
    if answer.status == 429:
        raise TryAgainLater(
            f"{where}: too many requests",
            hint="wait, and make all programs share one cache (HSMTOLL_CACHE)",
            code="throttled",
            scope="service",
            jti=jti,
            correlation_id=correlation,
            retryable=True,
            retry_after=wait,
        )
    if answer.status >= 500:
        raise NetworkError(
            f"{where}: an error of the server",
            hint="try again later; outages seldom exceed five minutes, see status.digdir.no",
            code="server-error",
            jti=jti,
            correlation_id=correlation,
            retryable=True,
            retry_after=wait,
        )
    if 300 <= answer.status < 400 or answer.status < 200:
        raise NetworkError(
            f"{where}: a redirect, which is not followed with a secret",
            hint="a proxy or gateway may have answered: check HSMTOLL_PROXY and the endpoints",
            code="redirect",
            jti=jti,
            correlation_id=correlation,
        )


def _refused(
    answer: HttpResponse,
    post: Post,
    jti: str | None,
    *,
    again: bool,
    corrected: bool,
    rejected: Callable[[str], bool],
    wait: float | None,
) -> HsmTollError:
    read = read_lenient(answer.body)
    error_text = _error_text(answer, read)
    uri = read.get("error_uri") if isinstance(read, dict) else None
    code_match = (
        _MP.search(uri[-_MAX_ERROR_TEXT:].rsplit("/", 1)[-1]) if isinstance(uri, str) else None
    )
    code = code_match[0] if code_match else None
    trace = _TRACE.search(error_text)
    trace_id = sanitized(trace[1], post.secret) if trace else None
    text = sanitized(_TRACE.sub("", error_text).rstrip(), post.secret) or "no reason given"
    row = mp_codes.refusal(code, error_text)
    code = code or (row.code if row else "") or None
    error: type[HsmTollError] = ScopeNotGranted if row and row.scope else GrantRefused
    if any(part in error_text.lower() for part in mp_codes.ISSUED_IN_FUTURE):
        return ClockError(
            f"Maskinporten refused the grant: {text}",
            hint="this machine's clock runs fast: synchronise it (NTP)",
            code="issued-in-future",
            who="you",
            trace_id=trace_id,
            jti=jti,
            retryable=again and corrected,
            retry_after=wait if again and corrected else None,
        )
    certificate = row is not None and row.certificate
    another = certificate and rejected(code or "")
    retryable = another or (again and row is not None and row.retry)
    meaning = f"Meaning: {row.meaning}. " if row else ""
    lines = [f"{meaning}To do: {row.do}"] if row else []
    who = row.who if row else "you"
    lines.append(f"who must act: {who}")
    if row and row.doctor:
        lines.append("run `hsmtoll doctor`: it looks for the cause")
    return error(
        f"Maskinporten refused the grant: {answer.status}{f', {code}' if code else ''}, {text}",
        hint="\n".join(lines),
        code=code or "grant-refused",
        who=who,
        trace_id=trace_id,
        jti=jti,
        retryable=retryable,
        retry_after=wait if retryable else None,
        scope="certificate" if certificate else None,
    )


def _error_text(answer: HttpResponse, body: Any) -> str:
    if not isinstance(body, dict):
        # An HTML page adds nothing to the status.
        text = answer.body[:_MAX_ERROR_TEXT].decode("utf-8", "replace").strip()
        return "" if text.startswith("<") else text
    parts = (body.get("error"), body.get("error_description"))
    return ": ".join(
        part[:_MAX_ERROR_TEXT] for part in parts if isinstance(part, str) and part
    ).strip()


def _correlation(answer: HttpResponse, *secrets: str) -> str | None:
    error_text = answer.headers.get("x-correlationid") or answer.headers.get("x-request-id")
    return sanitized(error_text, *secrets) if error_text else None
