"""
Maskinporten: answers, token request, header, claims, and who sends the grant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hsmtoll.sandbox import jose, sources
from hsmtoll.sandbox.rule import CLIENT_FAILED, FORM, Reason, Rules

if TYPE_CHECKING:
    from hsmtoll.sandbox.facts import TokenRequest
    from hsmtoll.sandbox.rule import RuleContext

__all__ = ["RULES"]

RULES: Final = Rules()
JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_YEAR: Final = 365 * 86_400
_OPTIONS: Final = ("resource", "pid", "consumer_org", "iss_onbehalfof", "authorization_details")
_CLAIMS: Final = frozenset(("aud", "iss", "scope", "iat", "exp", "jti", *_OPTIONS))


# --- the answers of Maskinporten ------------------------------------------------------------

RULES.describes(
    "M01",
    "metadata has the seven members; the issuer ends in a slash",
    "O",
    sources.METADATA,
    "RFC 8414 section 3.2",
)
RULES.describes(
    "M02",
    "/jwk returns RSA keys with kid, n, e, x5c; x5c[0] holds the same key",
    "D/O",
    sources.ESEALS,
    "RFC 7517 section 4.7",
)
RULES.describes("M03", "/health answers 200", "D", sources.WHAT_IS)
RULES.describes(
    "M08",
    "every error has error, error_description with trace_id, and error_uri",
    "D/O",
    sources.ERRORS,
    "RFC 6749 section 5.2",
)
RULES.describes(
    "M09",
    "no-store and application/json on success and error",
    "O",
    sources.CLIENT_CODE,
    "RFC 6749 section 5.1",
)
RULES.describes(
    "M80", "200 with exactly access_token, token_type, expires_in, scope", "D", sources.TOKENS
)
RULES.describes("M81", "expires_in = exp - iat - 1", "O", sources.CLIENT_CODE)
RULES.describes(
    "M82", "lifetimes are configurable per scope; the lowest wins", "D/O", sources.SCOPES
)
RULES.describes(
    "M83",
    "token header only kid and alg; RS256; kid is in /jwk",
    "D/O",
    sources.TOKENS,
    sources.CLIENT_CODE,
)
RULES.describes(
    "M84",
    "the documented claims; no sub, no nbf; aud only with resource",
    "D/O",
    sources.TOKENS,
    sources.AUDIENCE,
)
RULES.describes(
    "M85",
    "Norwegian consumer.ID is 0192: and the number; client_amr by the kind of proof",
    "D",
    sources.TOKENS,
)
RULES.describes("M86", "eSeal consumer.ID verbatim; names copied when present", "D", sources.ESEALS)
RULES.describes(
    "M87",
    "eSeal client_id is eidas- and the serial; client_amr by QCStatements",
    "D/I",
    sources.ESEALS,
    sources.TOKENS,
)
RULES.describes(
    "M88", "eSeal consumer.authority in the spelling of the settings", "D", sources.ESEALS
)
RULES.describes("M89", "Maskinporten fails as a test asks: status, delay, broken answer", "I")


# --- the token request ----------------------------------------------------------------------


@RULES.checked_by(
    "M04",
    "/token accepts only POST",
    "I",
    "RFC 6749 section 3.2",
    status=405,
    error="invalid_request",
)
def _m04(request: TokenRequest, _: RuleContext) -> str | None:
    return None if request.method == "POST" else "Method not allowed"


@RULES.checked_by(
    "M05",
    "the body is form-urlencoded",
    "I",
    sources.TOKENS,
    "RFC 6749 section 4.5",
    status=415,
    error="invalid_request",
)
def _m05(request: TokenRequest, _: RuleContext) -> str | None:
    return None if request.media_type == FORM else "Unsupported Content-Type"


@RULES.checked_by(
    "M10",
    "no client authentication; an Authorization header is ignored",
    "D/I",
    sources.TOKENS,
    kind="permits",
)
def _m10(request: TokenRequest, _: RuleContext) -> str | None:
    return "Client authentication is not used here" if request.authorization else None


@RULES.checked_by(
    "M06",
    "grant_type is RFC 7523's",
    "I",
    sources.TOKENS,
    "RFC 6749 section 5.2",
    error="unsupported_grant_type",
)
def _m06(request: TokenRequest, _: RuleContext) -> Reason | str | None:
    found = request.form.get("grant_type")
    if not found:
        return Reason("Unsupported grant_type (missing)", error="invalid_request")
    return None if found == JWT_BEARER else f"Unsupported grant_type {found}"


@RULES.checked_by(
    "M07",
    "assertion is a compact JWS of JSON objects",
    "D/I",
    sources.ERRORS,
    "RFC 7515 section 3.1",
    error="invalid_request",
    code="MP-011",
)
def _m07(request: TokenRequest, _: RuleContext) -> str | None:
    return "Invalid assertion. Invalid parameter value" if request.jws.malformed else None


# --- the header -----------------------------------------------------------------------------


@RULES.checked_by(
    "M37",
    "the header has alg, kid or x5c, and perhaps typ JWT, which no page forbids",
    "D/O",
    sources.GRANT,
)
def _m37(request: TokenRequest, _: RuleContext) -> str | None:
    extra = set(request.jws.header) - {"alg", "kid", "x5c"}
    if request.jws.header.get("typ") == "JWT":
        extra -= {"typ"}
    return f"Invalid assertion. Unknown header {sorted(extra)}" if extra else None


@RULES.checked_by("M20", "alg is RS256, RS384 or RS512", "D/I", sources.GRANT)
def _m20(request: TokenRequest, _: RuleContext) -> str | None:
    alg = request.jws.header.get("alg")
    return None if isinstance(alg, str) and alg in jose.HASHES else "Invalid assertion. Invalid alg"


@RULES.checked_by("M21", "kid or x5c is there", "D", sources.GRANT)
def _m21(request: TokenRequest, context: RuleContext) -> str | None:
    if {"kid", "x5c"} & set(request.jws.header):
        return None
    client = context.client(request)
    if client and client.keys:
        return f"{CLIENT_FAILED} {_NEEDS_KID}"
    return "Invalid assertion. Neither kid nor x5c in the JWT header"


_NEEDS_KID: Final = (
    "Invalid JWT. The client requires pre-registered jwk and no key identifier (kid) provided"
)


@RULES.checked_by("M22", "not both kid and x5c", "I")
def _m22(request: TokenRequest, _: RuleContext) -> str | None:
    both = {"kid", "x5c"} <= set(request.jws.header)
    return "Invalid assertion. Both kid and x5c in the JWT header" if both else None


@RULES.checked_by(
    "M23",
    "x5c is an array of strings",
    "D",
    sources.ERRORS,
    "RFC 7515 section 4.1.6",
    code="MP-123",
)
def _m23(request: TokenRequest, _: RuleContext) -> str | None:
    return _x5c(request, "shape")


@RULES.checked_by(
    "M24",
    "x5c entries are standard base64 of DER",
    "D/I",
    "RFC 7515 section 4.1.6",
    "RFC 4648 section 3.3",
    code="MP-123",
)
def _m24(request: TokenRequest, _: RuleContext) -> str | None:
    return _x5c(request, "entry")


def _x5c(request: TokenRequest, kind: str) -> str | None:
    wrong = request.x5c_fault and request.x5c_fault.startswith(kind)
    return f"{CLIENT_FAILED} Invalid JWT header x5c" if wrong else None


# --- the claims, as far as they can be judged without knowing who asks -----------------------


@RULES.checked_by(
    "M50",
    "aud, iss, scope, iat, exp are there",
    "D/I",
    sources.GRANT,
    error="invalid_request",
    code="MP-011",
)
def _m50(request: TokenRequest, _: RuleContext) -> str | None:
    needed = ("aud", "iss", "scope", "iat", "exp")
    missing = [name for name in needed if request.jws.claims.get(name) in (None, "", [])]
    if "scope" in missing and isinstance(request.jws.claims.get("scope"), str):
        missing.remove("scope")
    return f"Invalid assertion. Missing claim {', '.join(missing)}" if missing else None


@RULES.checked_by(
    "M53", "no claims beside the documented ones", "D", sources.GRANT, error="invalid_request"
)
def _m53(request: TokenRequest, context: RuleContext) -> str | None:
    extra = set(request.jws.claims) - _CLAIMS
    if context.tolerates("nbf"):
        extra -= {"nbf"}
    return f"Invalid assertion. Unknown claim {sorted(extra)}" if extra else None


@RULES.checked_by(
    "M60",
    "iat and exp are JSON integers, in seconds",
    "I",
    "RFC 7519 section 2",
    error="invalid_request",
    code="MP-011",
)
def _m60(request: TokenRequest, _: RuleContext) -> str | None:
    for name in ("iat", "exp"):
        found = request.jws.claims.get(name)
        if name in request.jws.claims and (type(found) is not int or found > 99_999_999_999):
            return f"Invalid assertion. Invalid parameter value {name}"
    return None


@RULES.checked_by(
    "M69",
    "scope is split on white space and not empty",
    "D/I",
    sources.GRANT,
    error="invalid_request",
    code="MP-011",
)
def _m69(request: TokenRequest, _: RuleContext) -> str | None:
    empty = "scope" in request.jws.claims and not request.scopes
    return "Invalid assertion. Invalid parameter value scope" if empty else None


@RULES.checked_by(
    "M52", "aud is a single value, not an array", "D/I", sources.TOKENS, code="MP-110"
)
def _m52(request: TokenRequest, context: RuleContext) -> str | None:
    aud = request.jws.claims.get("aud")
    if not isinstance(aud, list) or (context.tolerates("aud-list") and len(aud) == 1):
        return None
    return f"{CLIENT_FAILED} Invalid JWT claim aud"


@RULES.checked_by("M51", "aud is the issuer, byte for byte", "D", sources.TOKENS, code="MP-110")
def _m51(request: TokenRequest, context: RuleContext) -> str | None:
    aud = request.jws.claims.get("aud", context.issuer)
    audiences = aud if isinstance(aud, list) else [aud]
    return None if context.issuer in audiences else f"{CLIENT_FAILED} Invalid JWT claim aud"


# --- who asks -------------------------------------------------------------------------------


@RULES.checked_by(
    "M61",
    "iss is a registered client; an eSeal's is any string",
    "D",
    sources.ERRORS,
    sources.ESEALS,
    code="MP-100",
)
def _m61(request: TokenRequest, context: RuleContext) -> str | None:
    iss = request.jws.claims.get("iss", "-")
    if not isinstance(iss, str):
        return f"{CLIENT_FAILED} Invalid iss"
    if context.norwegian(request) and context.client(request) is None:
        return f"{CLIENT_FAILED} Client not found"
    return None


@RULES.checked_by("M40", "a client registered for keys uses kid", "D/O", sources.GRANT)
def _m40(request: TokenRequest, context: RuleContext) -> str | None:
    client, header = context.client(request), request.jws.header
    if client and client.keys and "x5c" in header and "kid" not in header:
        return f"{CLIENT_FAILED} {_NEEDS_KID}"
    return None


@RULES.checked_by("M38", "kid is one of the client's", "O", sources.CLIENT_CODE)
def _m38(request: TokenRequest, context: RuleContext) -> str | None:
    kid, client = request.jws.header.get("kid"), context.client(request)
    if "kid" not in request.jws.header:
        return None
    if client and isinstance(kid, str) and kid in client.keys:
        return None
    return f"{CLIENT_FAILED} Unknown key identifier (kid) for client."


@RULES.checked_by(
    "M39", "the registered key was posted less than a year ago", "D", sources.ERRORS, code="MP-121"
)
def _m39(request: TokenRequest, context: RuleContext) -> str | None:
    kid, client = request.jws.header.get("kid"), context.client(request)
    known = client.keys.get(kid) if client and isinstance(kid, str) else None
    return f"{CLIENT_FAILED} Expired key" if known and context.now - known[1] > _YEAR else None
