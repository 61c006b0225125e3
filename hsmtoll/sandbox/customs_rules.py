"""
Customs: the exchange of tokens and the APIs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from hsmtoll.sandbox import jose, sources
from hsmtoll.sandbox.messages import answered, synchronous_errors, unpack_upload
from hsmtoll.sandbox.rule import FORM, Reason, Rules
from hsmtoll.sandbox.state import CUSTOMS_SCOPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hsmtoll.sandbox.facts import Call, TokenRequest
    from hsmtoll.sandbox.rule import RuleContext

__all__ = ["INTERNAL", "RULES"]

RULES: Final = Rules()


# --- the exchange at Customs ----------------------------------------------------------------

RULES.describes(
    "T06",
    "issued_token_type, access_token, token_type, expires_in; no scope",
    "D",
    sources.INTEGRATION,
)
RULES.describes(
    "T07",
    "exp of the subject token; expires_in is what remains, less one",
    "O",
    sources.CLIENT_CODE,
)
RULES.describes(
    "T08", "RS512, no kid; iss, sub, iat, exp, scope with internal names", "O", sources.CLIENT_CODE
)


@RULES.checked_by(
    "T01",
    "POST, form-urlencoded, the three parameters",
    "D",
    sources.INTEGRATION,
    stage="exchange",
    error="invalid_request",
)
def _t01(request: TokenRequest, _: RuleContext) -> str | None:
    if request.method != "POST" or request.media_type != FORM:
        return "POST a form"
    known = {"grant_type", "subject_token_type", "subject_token"}
    wrong = sorted(known ^ set(request.form))
    return f"missing or unknown parameter {', '.join(wrong)}" if wrong else None


@RULES.checked_by(
    "T02",
    "grant_type and subject_token_type are bare words, not the URNs of RFC 8693",
    "D/I",
    sources.INTEGRATION,
    "RFC 8693 section 2.1",
    stage="exchange",
    error="unsupported_grant_type",
)
def _t02(request: TokenRequest, _: RuleContext) -> str | None:
    expected = {"grant_type": "token-exchange", "subject_token_type": "access_token"}
    wrong = [name for name, word in expected.items() if request.form.get(name, word) != word]
    return f"unsupported {', '.join(wrong)}" if wrong else None


@RULES.checked_by(
    "T03",
    "a Maskinporten token of the same environment",
    "I",
    "RFC 8693 section 2.1",
    stage="exchange",
    status=401,
)
def _t03(request: TokenRequest, context: RuleContext) -> Reason | None:
    jws = request.jws
    key = context.maskinporten_keys.get(str(jws.header.get("kid")))
    alg = str(jws.header.get("alg"))
    if key is None or alg not in jose.HASHES or jws.claims.get("iss") != context.issuer:
        return _unusable("subject_token is not a token of this environment's Maskinporten", context)
    valid = jose.verified(alg, key, jws.data, jws.signature)
    return None if valid else _unusable("subject_token has an invalid signature", context)


def _unusable(text: str, context: RuleContext) -> Reason:
    """RFC 6750 has invalid_token with 401, RFC 6749 invalid_grant with 400."""
    status = context.settings.invalid_subject_status
    return Reason(text, status, "invalid_token" if status == 401 else "invalid_grant")


@RULES.checked_by(
    "T09",
    "the subject token has not expired",
    "I",
    "RFC 8693 section 2.1",
    stage="exchange",
    status=401,
)
def _t09(request: TokenRequest, context: RuleContext) -> Reason | None:
    unexpired = request.number("exp", 0) >= context.now + 2
    return None if unexpired else _unusable("subject_token has expired", context)


@RULES.checked_by(
    "T04",
    "the scope is one of Customs'",
    "D",
    sources.INTEGRATION,
    stage="exchange",
    status=403,
    error="invalid_scope",
)
def _t04(request: TokenRequest, _: RuleContext) -> str | None:
    if set(request.scopes) & CUSTOMS_SCOPES:
        return None
    return f"Not authorized to request scope {' '.join(request.scopes)}"


@RULES.checked_by(
    "T05",
    "the organisation is registered for the scope",
    "D",
    sources.INTEGRATION,
    stage="exchange",
    status=403,
    error="invalid_scope",
)
def _t05(request: TokenRequest, context: RuleContext) -> str | None:
    org = request.consumer
    denied = [one for one in request.scopes if (org, one) in context.state.customs_denied]
    return f"Not authorized to request scope {denied[0]}" if denied else None


@RULES.checked_by(
    "F2", "a token is exchanged only once (a switch: not documented)", "I", stage="exchange"
)
def _f2(request: TokenRequest, context: RuleContext) -> str | None:
    again = not context.settings.exchange_twice and request.jws.text in context.state.exchanged
    return "subject_token was exchanged before" if again else None


# --- the APIs of Customs --------------------------------------------------------------------

RULES.describes(
    "T12", "test-auth of road answers 200, empty", "D/I", sources.INTEGRATION, sources.ROAD_2022
)
RULES.describes("T13", "202 with a new requestId each time", "D", sources.SYNCHRONOUS)
RULES.describes(
    "T16", "validation-status is 404 for a while; then 2xx", "D/O", sources.ASYNCHRONOUS
)
RULES.describes("T17", "SUCCESS has an 18-character mrn, FAILURE a list", "D", sources.ASYNCHRONOUS)
RULES.describes(
    "T23", "routing: newer than the marker, 1000 at most, own items", "D", sources.ROUTING
)
RULES.describes(
    "T25",
    "the playground's data behaves as its pages list it",
    "D",
    sources.EXAMPLES,
    sources.PRESENTATION,
)
RULES.describes(
    "T26", "every response has X-CorrelationID and x-request-id", "O", sources.CLIENT_CODE
)
RULES.describes("T27", "Customs fails as a test asks: status, delay, broken answer", "I")


@RULES.checked_by(
    "T10", "an unexpired Customs token", "O/I", sources.ROAD_2022, stage="call", status=401
)
def _t10(call: Call, context: RuleContext) -> str | None:
    claims = call.claims
    if claims is None or call.bearer in context.state.dead_tokens:
        return "no valid token"
    return None if claims.get("exp", 0) > context.now else "expired"


@RULES.checked_by(
    "T19", "a path of this API, with its method", "I", sources.QUERIES, stage="call", status=404
)
def _t19(call: Call, _: RuleContext) -> str | None:
    return "no such path" if call.route is None or call.other_base else None


@RULES.checked_by(
    "T11", "the token's scope covers the API", "O/I", sources.ROAD_2022, stage="call", status=403
)
def _t11(call: Call, _: RuleContext) -> str | None:
    scopes = str((call.claims or {}).get("scope", "")).split()
    needed = INTERNAL[call.route.scope] if call.route and call.route.scope else ""
    return None if not needed or needed in scopes else "insufficient scope"


#: Kinds of calls that carry a message.
_MESSAGES: Final = frozenset(("submit", "change", "relation", "present", "arrive"))


@RULES.checked_by(
    "T14",
    "the documented Content-Type",
    "O",
    sources.ROAD_2022,
    sources.RELATION,
    stage="call",
    status=415,
)
def _t14(call: Call, _: RuleContext) -> str | None:
    kind = call.route.kind if call.route else ""
    wanted = {"upload": "multipart/form-data"}.get(kind, "application/json")
    if kind not in {*_MESSAGES, "upload"}:
        return None
    if call.method == "DELETE" and not call.body:
        return None
    return None if call.media_type == wanted else "unsupported media type"


@RULES.checked_by(
    "T21", "DELETE carries a JSON body", "O/I", sources.ROAD_2022, sources.RELATION, stage="call"
)
def _t21(call: Call, _: RuleContext) -> str | None:
    if call.route is None or call.method != "DELETE" or call.message() is not None:
        return None
    return _errors([{"field": "body", "error": "must not be null"}])


@RULES.checked_by(
    "T15",
    "required members are present and have the documented form",
    "D",
    sources.SYNCHRONOUS,
    stage="call",
)
def _t15(call: Call, _: RuleContext) -> str | None:
    if call.route is None or call.route.kind not in _MESSAGES:
        return None
    message = call.message()
    if message is None:
        if call.method == "DELETE":
            return None
        return _errors([{"field": "body", "error": "must be a JSON object"}])
    where = call.route
    found = synchronous_errors(where.kind, where.level, call.method, message, where.mode)
    return _errors(found) if found else None


@RULES.checked_by(
    "T20",
    "PUT and DELETE name an MRN issued earlier",
    "D",
    sources.CHANGES,
    stage="call",
    status=404,
)
def _t20(call: Call, context: RuleContext) -> str | None:
    if call.route is None or call.route.kind != "change":
        return None
    known = context.state.documents.get(call.mrn or "")
    mine = known and (known.org, known.level) == (call.org, call.route.level)
    return None if mine else "no such MRN"


@RULES.checked_by(
    "T22",
    "the client chooses the requestId of a presentation, a new one each time",
    "D",
    sources.PRESENTATION,
    stage="call",
)
def _t22(call: Call, context: RuleContext) -> str | None:
    if call.route is None or call.route.kind != "present":
        return None
    key = (call.org, str((call.message() or {}).get("requestId")))
    again = key in context.state.presentations
    return _errors([{"field": "requestId", "error": "is already in use"}]) if again else None


@RULES.checked_by(
    "T18", "a requestId is visible to its own organisation only", "I", stage="call", status=404
)
def _t18(call: Call, context: RuleContext) -> str | None:
    if call.route is None or call.route.kind != "validation-status":
        return None
    found = context.state.submissions.get(call.route.refs[0])
    return "not yours" if found and found.org != call.org else None


@RULES.checked_by(
    "T24", "an upload has the documented form and size", "D/I", sources.UPLOAD, stage="call"
)
def _t24(call: Call, _: RuleContext) -> str | None:
    if call.route is None or call.route.kind != "upload":
        return None
    problem = unpack_upload(call.route.refs[0], call.body).problem
    return _errors([{"field": problem[0], "error": problem[1]}]) if problem else None


def _errors(found: list[dict[str, str]]) -> str:
    return json.dumps(answered(found))


#: The Customs token's names of the scopes. Road's was observed in 2023; the others are ours.
INTERNAL: Final[Mapping[str, str]] = {
    "movement/road/v2": "datautveksling.kjoeretoeyPaaVei.registrering",
    "movement/air": "datautveksling.fly.registrering",
    "movement/rail": "datautveksling.tog.registrering",
    "movement/maritime": "datautveksling.skip.registrering",
    "movement/entry": "datautveksling.fremlegging.registrering",
    "goodsdeclaration/document.write": "datautveksling.dokument.registrering",
    "declaration.feed": "datautveksling.deklarasjon.lesing",
    "movement/maritimessnn": "datautveksling.skip.kystverket",
}
