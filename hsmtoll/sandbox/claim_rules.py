"""
Maskinporten: times, replay, options and scopes of a grant whose signature is valid.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.sandbox import sources
from hsmtoll.sandbox.rule import Reason, Rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.sandbox.facts import TokenRequest
    from hsmtoll.sandbox.rule import RuleContext

__all__ = ["RULES", "replay_key"]

RULES: Final = Rules()
_NOT_MASKINPORTEN: Final = re.compile(r"openid|profile|offline_access|idporten:.+|krr:user/.+")


# --- time -----------------------------------------------------------------------------------


@RULES.checked_by(
    "M54",
    "exp - iat is more than 0 and at most 120 s (as observed: 180)",
    "D/O",
    sources.GRANT,
    sources.SERVER_LIMITS,
)
def _m54(request: TokenRequest, context: RuleContext) -> str | None:
    life = request.number("exp", context.now + 60) - request.number("iat", context.now)
    if life <= 0:
        return "JWT has no lifetime: exp is not after iat."
    return "JWT has too long lifetime." if life > context.settings.longest_grant else None


@RULES.checked_by("M55", "iat is at most 10 s ahead", "D/O", sources.GRANT, sources.SERVER_LIMITS)
def _m55(request: TokenRequest, context: RuleContext) -> str | None:
    ahead = request.number("iat", context.now) > context.now + 10
    return "Issue time is in the future." if ahead else None


@RULES.checked_by(
    "M56", "iat in the past is no error by itself", "O", sources.SERVER_LIMITS, kind="permits"
)
def _m56(request: TokenRequest, context: RuleContext) -> str | None:
    old = request.number("iat", context.now) < context.now - 10
    return "Issue time is too old." if old else None


@RULES.checked_by(
    "M57", "exp is at most 10 s ago", "D/O", sources.ERRORS, sources.SERVER_LIMITS, code="MP-130"
)
def _m57(request: TokenRequest, context: RuleContext) -> str | None:
    late = request.number("exp", context.now + 60) < context.now - 10
    return "JWT is expired" if late else None


@RULES.checked_by(
    "M59",
    "jti may be absent; then the whole JWT is the replay key",
    "D",
    sources.GRANT,
    kind="permits",
)
def _m59(request: TokenRequest, _: RuleContext) -> str | None:
    return "Invalid assertion. Missing claim jti" if "jti" not in request.jws.claims else None


@RULES.checked_by(
    "M58", "a grant is used once", "D/I", sources.GRANT, sources.ERRORS, code="MP-012"
)
def _m58(request: TokenRequest, context: RuleContext) -> str | None:
    used = context.state.used.get(replay_key(request), 0) >= context.now
    return "Validation of JWT (Bearer grant) failed. Grant is used before" if used else None


def replay_key(request: TokenRequest) -> str:
    """What is remembered of a grant: its jti, or the whole of it (M58, M59)."""
    jti = request.jws.claims.get("jti")
    if isinstance(jti, str) and jti:
        return f"jti {jti}"
    return f"jwt {hashlib.sha256(request.jws.text.encode()).hexdigest()}"


# --- options --------------------------------------------------------------------------------


@RULES.checked_by(
    "M70",
    "resource is an array of strings",
    "D/O",
    sources.GRANT,
    sources.AUDIENCE,
    error="invalid_request",
)
def _m70(request: TokenRequest, context: RuleContext) -> str | None:
    found = request.jws.claims.get("resource", [])
    if isinstance(found, str) and context.tolerates("resource"):
        return None
    valid = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return None if valid else "Invalid assertion. Invalid parameter value resource"


@RULES.checked_by("M71", "pid is 11 digits", "D", sources.PERSON, error="invalid_request")
def _m71(request: TokenRequest, _: RuleContext) -> str | None:
    pid = request.jws.claims.get("pid")
    valid = pid is None or (isinstance(pid, str) and re.fullmatch(r"\d{11}", pid, re.ASCII))
    return None if valid else "Invalid assertion. Invalid parameter value pid"


@RULES.checked_by(
    "M72",
    "consumer_org names another organisation, and iss_onbehalfof is absent",
    "D",
    sources.ERRORS,
    error="invalid_request",
)
def _m72(request: TokenRequest, context: RuleContext) -> str | None:
    consumer, client = request.jws.claims.get("consumer_org"), context.client(request)
    if consumer is not None and "iss_onbehalfof" in request.jws.claims:
        return "Invalid assertion. consumer_org and iss_onbehalfof exclude each other"
    own = client.org_no if client else None
    if consumer is not None and consumer == own:
        return (
            "Validation of JWT claim failed: The combination consumer_org in claim and "
            "delegation scope on client is invalid"
        )
    return None


@RULES.checked_by(
    "M73",
    "authorization_details are of a known type, with known and good members",
    "D",
    sources.SYSTEM_USER,
    sources.ERRORS,
)
def _m73(request: TokenRequest, _: RuleContext) -> Reason | None:
    found = request.jws.claims.get("authorization_details", [])
    members = {
        "urn:altinn:systemuser": {"type", "systemuser_org", "externalRef"},
        "urn:altinn:consent": {"type", "id", "from"},
    }
    if not isinstance(found, list):
        return _bad_details("Invalid authorization details values")
    for one in found:
        kind = one.get("type") if isinstance(one, dict) else None
        if not isinstance(kind, str) or kind not in members:
            return _bad_details("Unknown authorization details type", "MP-301")
        if set(one) - members[kind]:
            return _bad_details("Unknown fields in the authorization details", "MP-302")
        if not _good_details(one):
            return _bad_details("Invalid authorization details values")
    return None


def _bad_details(text: str, code: str = "MP-303") -> Reason:
    values = "invalid_altinn_customer_configuration"
    return Reason(
        text, error=values if code == "MP-303" else "invalid_authorization_details", code=code
    )


def _good_details(one: dict[str, Any]) -> bool:
    if one["type"] == "urn:altinn:consent":
        return bool(one.get("id") and one.get("from"))
    org = one.get("systemuser_org")
    return (
        isinstance(org, dict)
        and org.get("authority") == "iso6523-actorid-upis"
        and bool(re.fullmatch(r"0192:\d{9}", str(org.get("ID"))))
    )


# --- scopes ---------------------------------------------------------------------------------


def _bad_scope(
    request: TokenRequest, context: RuleContext, bad: Callable[[str], bool]
) -> str | None:
    """The scope that fails the request: any bad one (M68), else only where none is good."""
    found = [scope for scope in request.scopes if bad(scope)]
    if not found or (not context.on("M68") and len(found) < len(request.scopes)):
        return None
    return found[0]


@RULES.checked_by(
    "M64",
    "the scope is for this integration type",
    "D",
    sources.ERRORS,
    error="invalid_scope",
    code="MP-201",
)
def _m64(request: TokenRequest, context: RuleContext) -> str | None:
    if not context.norwegian(request):
        return None
    bad = _bad_scope(request, context, lambda one: bool(_NOT_MASKINPORTEN.fullmatch(one)))
    return bad and f"Token request contains scopes not allowed for maskinporten, {bad}"


@RULES.checked_by(
    "M66",
    "an eSeal requests only scopes that are enabled for eSeals",
    "D/I",
    sources.ESEALS,
    error="invalid_scope",
    code="MP-200",
)
def _m66(request: TokenRequest, context: RuleContext) -> str | None:
    if context.norwegian(request):
        return None
    bad = _bad_scope(request, context, lambda one: one not in context.state.eseal_scopes)
    return bad and f"Token request contains invalid scopes for client, {bad}"


@RULES.checked_by(
    "M67",
    "a Norwegian client does not ask for toll:eu/",
    "D/I",
    sources.INTEGRATION,
    error="invalid_scope",
    code="MP-200",
)
def _m67(request: TokenRequest, context: RuleContext) -> str | None:
    if not context.norwegian(request):
        return None
    bad = _bad_scope(request, context, lambda one: one.startswith("toll:eu/"))
    return bad and f"Token request contains invalid scopes for client, {bad}"


@RULES.checked_by(
    "M63", "the scope is on the client", "D/O", sources.ERRORS, error="invalid_scope", code="MP-200"
)
def _m63(request: TokenRequest, context: RuleContext) -> str | None:
    client = context.client(request)
    if client is None or not context.norwegian(request):
        return None

    def missing(one: str) -> bool:
        elsewhere = one.startswith("toll:eu/") or _NOT_MASKINPORTEN.fullmatch(one)
        return one not in client.scopes and not elsewhere

    bad = _bad_scope(request, context, missing)
    return bad and f"Token request contains invalid scopes for client, {bad}"


@RULES.checked_by(
    "M65",
    "the organisation has been granted the scope, or it was delegated",
    "D/O",
    sources.ERRORS,
    status=403,
    error="forbidden",
    code="MP-250",
)
def _m65(request: TokenRequest, context: RuleContext) -> Reason | str | None:
    own, consumer = context.organisation(request), request.jws.claims.get("consumer_org")
    client = context.client(request)

    def refused(one: str) -> bool:
        if consumer is not None:
            return (str(consumer), own, one) not in context.state.delegations
        allowed = context.state.allowed.get(own)
        if allowed is None and client is not None:
            allowed = set(client.granted) if client.granted is not None else None
        return allowed is not None and one not in allowed

    bad = _bad_scope(request, context, refused)
    if bad and consumer is not None:
        text = f"Consumer {consumer} has not delegated access to the scope {bad} to supplier {own}"
        return Reason(text, code="MP-251")
    return bad and f"Consumer has not been granted access to the scope {bad}"


RULES.describes("M68", "one bad scope fails the whole request", "D", sources.GRANT)
