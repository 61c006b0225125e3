"""
Maskinporten and Customs as functions from request to reply; `server` has sockets and faults.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import string
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hsmtoll.sandbox import jose, messages, playground, statuses
from hsmtoll.sandbox.facts import Call, Jws, TokenRequest, route
from hsmtoll.sandbox.issue import access_claims, customs_claims, grant_answer
from hsmtoll.sandbox.keys import signing_key
from hsmtoll.sandbox.rules import Refusal, RuleContext, refuse, replay_key
from hsmtoll.sandbox.state import Document, Received, State, Submission

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cryptography.hazmat.primitives.asymmetric import rsa

    from hsmtoll.sandbox.settings import Settings

__all__ = ["EXCHANGE", "Reply", "Request", "Services", "json_reply"]

EXCHANGE: Final = "/api/access/external/oauth/token"
_METADATA: Final = "/.well-known/oauth-authorization-server"
_MRN_CHARS: Final = string.ascii_uppercase + string.digits
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request. Header names are lower case; *target* is path and query."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        """Without the query."""
        return urlsplit(self.target).path

    @property
    def media_type(self) -> str:
        """Content-Type without parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def form(self) -> dict[str, str]:
        """The urlencoded body; of a repeated member the last."""
        return dict(parse_qsl(self.body.decode("utf-8", "replace"), keep_blank_values=True))


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response, and its entry in the log of received requests."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    received: Received | None = None


def json_reply(status: int, content: object, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply with a JSON body."""
    body = json.dumps(content).encode()
    return Reply(status, body, {"Content-Type": "application/json", **(headers or {})})


class Services:
    """Maskinporten and Customs over one state. Their origins are set once the ports are known."""

    def __init__(self, settings: Settings, state: State, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.state = state
        self.issuer = ""
        self.customs = ""
        self.offset: Callable[[str], float] = lambda _: 0.0
        self._clock = clock
        self._rotations = 0
        self._published: dict[str, tuple[rsa.RSAPrivateKey, list[str]]] = {}
        self._customs_key = signing_key("customs", 2048)
        self.rotate()

    def now(self, endpoint: str) -> float:
        """The time of this service, faults included."""
        return self._clock() + self.offset(endpoint)

    def rotate(self) -> None:
        """Change Maskinporten's signing key; the earlier one stays published."""
        # Two keys in turn: generating more would take seconds and test nothing new.
        key = signing_key(f"maskinporten-{self._rotations % 2}", self.settings.signing_bits)
        self._rotations += 1
        public = key.public_key()
        members = json.dumps(jose.jwk(public), sort_keys=True).encode()
        kid = jose.encode(hashlib.sha256(members).digest())
        self._published.pop(kid, None)
        self._published[kid] = key, _own_chain(key)

    def context(self, endpoint: str) -> RuleContext:
        """The context in which rules are evaluated."""
        keys = {kid: key.public_key() for kid, (key, _) in self._published.items()}
        return RuleContext(self.state, self.settings, self.issuer, self.now(endpoint), keys)

    # --- Maskinporten -----------------------------------------------------------------------

    def maskinporten(self, request: Request) -> Reply:
        """Answers one request to the issuer's host."""
        context = self.context("token")
        match request.path:
            case "/token":
                return self._token(request, context)
            case "/jwk":
                return json_reply(200, {"keys": self._keys(context)})
            case "/health" if context.on("M03"):
                return json_reply(200, {"status": "UP"})
            case path if path == _METADATA:
                return json_reply(200, self._metadata(context))
        return json_reply(404, {"error": "not_found"})

    def _metadata(self, context: RuleContext) -> dict[str, Any]:
        host = self.issuer.rstrip("/")
        return {
            "issuer": self.issuer if context.on("M01") else host,
            "token_endpoint": f"{host}/token",
            "jwks_uri": f"{host}/jwk",
            "token_endpoint_auth_methods_supported": ["private_key_jwt"],
            "grant_types_supported": ["urn:ietf:params:oauth:grant-type:jwt-bearer"],
            "token_endpoint_auth_signing_alg_values_supported": ["RS256", "RS384", "RS512"],
            "authorization_details_types_supported": [
                "urn:altinn:systemuser",
                "urn:altinn:consent",
            ],
        }

    def _keys(self, context: RuleContext) -> list[dict[str, Any]]:
        return [
            {"kid": kid, **jose.jwk(key.public_key())}
            | ({"x5c": chain} if context.on("M02") else {})
            for kid, (key, chain) in self._published.items()
        ]

    def _token(self, request: Request, context: RuleContext) -> Reply:
        asked = TokenRequest.read(
            request.method,
            request.media_type,
            request.form(),
            member="assertion",
            authorization="authorization" in request.headers,
        )
        refusal = refuse("grant", asked, context)
        if refusal is None or refusal.rule.id in _AFTER_REPLAY:
            self.state.forget_used(context.now)
            until = max(asked.number("exp", context.now), context.now) + 10
            self.state.used[replay_key(asked)] = until
        reply = self._refused(refusal, context) if refusal else self._granted(asked, context)
        if context.on("M09"):
            kept = {"Cache-Control": "no-cache, no-store, max-age=0, must-revalidate"}
            reply = replace(reply, headers={**reply.headers, **kept, "Pragma": "no-cache"})
        else:
            reply = replace(reply, headers={"Content-Type": "text/plain"})
        return replace(reply, received=_seen("grant", request, reply, asked, refusal))

    def _granted(self, asked: TokenRequest, context: RuleContext) -> Reply:
        claims = access_claims(asked, context)
        kid, (key, _) = list(self._published.items())[-1]
        header = {"kid": kid, "alg": "RS256"} | ({} if context.on("M83") else {"typ": "JWT"})
        return json_reply(200, grant_answer(jose.compact(header, claims, key), claims, context))

    def _refused(self, refusal: Refusal, context: RuleContext) -> Reply:
        trace = f" (trace_id: {secrets.token_hex(16)})" if context.on("M08") else ""
        error = {"error": refusal.error, "error_description": f"{refusal.description}{trace}"}
        if refusal.code and context.on("M08"):
            error["error_uri"] = f"{self.issuer}errors/{refusal.code}"
        headers = {"Allow": "POST"} if refusal.status == 405 else {}
        return json_reply(refusal.status, error, headers)

    # --- Customs ----------------------------------------------------------------------------

    def customs_api(self, request: Request) -> Reply:
        """Answers one request to Customs' host."""
        if request.path == EXCHANGE:
            return self._exchange(request, self.context("exchange"))
        return self._call(request, self.context("api"))

    def _exchange(self, request: Request, context: RuleContext) -> Reply:
        asked = TokenRequest.read(
            request.method,
            request.media_type,
            request.form(),
            member="subject_token",
        )
        refusal = refuse("exchange", asked, context)
        if refusal:
            error = {"error": refusal.error, "error_description": refusal.description}
            reply = json_reply(refusal.status, error)
        else:
            self.state.exchanged.add(asked.jws.text)
            claims = customs_claims(asked, context, self.customs)
            header = {"alg": "RS512"} | ({} if context.on("T08") else {"kid": "customs"})
            token = jose.compact(header, claims, self._customs_key)
            # Tokens have no jti: two of the same second are identical, so un-revoke a new one.
            self.state.dead_tokens.discard(token)
            answer: dict[str, Any] = {
                "issued_token_type": "access_token",
                "access_token": token,
                "token_type": "Bearer",
                "expires_in": max(claims["exp"] - claims["iat"] - 1, 1),
            }
            if not context.on("T06"):
                answer["scope"] = claims["scope"]
            reply = json_reply(200, answer)
        return replace(reply, received=_seen("exchange", request, reply, asked, refusal))

    def _call(self, request: Request, context: RuleContext) -> Reply:
        call = self._read(request)
        refusal = refuse("call", call, context)
        if refusal:
            body = refusal.description.encode() if refusal.status == 400 else b""
            headers = {"Content-Type": "application/json"} if body else {}
            reply = Reply(refusal.status, body, headers)
        else:
            reply = self._answer(call, context)
        rule = refusal.rule.id if refusal else None
        seen = Received(
            "call",
            request.method,
            request.target,
            reply.status,
            claims=call.claims,
            refused_by=rule,
            headers=_safe(request.headers),
            body=request.body,
        )
        return replace(reply, received=seen)

    def _read(self, request: Request) -> Call:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        claims = self._own(bearer) if scheme.lower() == "bearer" else None
        parts = urlsplit(request.target)
        found = route(request.method, parts.path)
        # T19: the same words below the other base (submission and query) are another path.
        other = False
        if found is None and "/status/" in parts.path:
            found = route(request.method, parts.path.replace("/status/", "/", 1))
            other = found is not None
        elif found is None:
            segments = parts.path.split("/")
            with_status = "/".join((*segments[:4], "status", *segments[4:]))
            found = route(request.method, with_status)
            other = found is not None
        query = dict(parse_qsl(parts.query))
        return Call(
            request.method,
            parts.path,
            request.media_type,
            request.body,
            query,
            claims,
            bearer,
            found,
            other_base=other,
        )

    def _own(self, bearer: str) -> Mapping[str, Any] | None:
        """The claims of a token that this Customs has issued; None for any other."""
        jws = Jws.read(bearer)
        if jws.malformed or jws.header.get("alg") != "RS512":
            return None
        key = self._customs_key.public_key()
        return jws.claims if jose.verified("RS512", key, jws.data, jws.signature) else None

    def _answer(self, call: Call, context: RuleContext) -> Reply:  # noqa: PLR0911 -- a table of endpoints
        if call.route is None:
            return Reply(404)
        match call.route.kind:
            case "test-auth":
                return Reply(200 if context.on("T12") else 404)
            case "submit" | "change" | "relation" | "arrive":
                return self._submitted(call, context)
            case "validation-status":
                return self._validation(call.route.refs[0], context)
            case "descendants" | "documents" | "document" | "receptacle" | "entry":
                return self._queried(call)
            case "present":
                return self._presented(call, context)
            case "presentations":
                return self._presentations(call, context)
            case "routing":
                return self._routing(call, context)
        return self._uploaded(call)

    def _submitted(self, call: Call, context: RuleContext) -> Reply:
        where, message, documents = call.route, call.message() or {}, self.state.documents
        if where is None:
            return Reply(404)
        request_id = str(uuid.uuid4()) if context.on("T13") else str(uuid.UUID(int=0))
        errors = playground.content_errors(message) if context.on("T25") else []
        made = Document(
            call.org,
            where.level,
            messages.identity(where.level, message),
            messages.fixed(where.level, message),
            message,
        )
        mrn, before = call.mrn, documents.get(call.mrn or "")
        if call.method == "PUT" and before and context.on("T20"):
            if before.fixed != made.fixed:
                errors.append(_error("Key fields may not be changed"))
        elif call.method == "POST" and made.key and _known(made, documents.values()):
            errors.append(_error("documentNumber is already in use"))
        if not errors and call.method == "DELETE" and mrn:
            documents.pop(mrn, None)
        elif not errors and where.kind != "arrive":
            mrn = mrn or self._mrn(context)
            documents[mrn] = made
        if not errors and where.kind == "arrive":
            arrived = playground.arrival(message)
            mrn = arrived["mrn"]
            place = arrived["customsOfficeOfArrival"]
            self.state.arrivals[mrn] = place, arrived["dateAndTimeOfArrival"]
        delay = self.settings.polling_delay if context.on("T16") else 0
        self.state.submissions[request_id] = Submission(
            request_id,
            call.org,
            where.mode,
            where.level,
            call.method,
            context.now + delay,
            _instant(context.now),
            mrn,
            errors,
            playground.missing_documentation(message) if where.level == "house-consignment" else [],
        )
        return json_reply(202, {"requestId": request_id})

    def _mrn(self, context: RuleContext) -> str:
        year = datetime.fromtimestamp(context.now, UTC).strftime("%y")
        return f"{year}NO" + "".join(secrets.choice(_MRN_CHARS) for _ in range(14))

    def _validation(self, request_id: str, context: RuleContext) -> Reply:
        found = self.state.submissions.get(request_id)
        if found is None or context.now < found.ready_at:
            return Reply(404)
        failed = bool(found.errors)
        result: dict[str, Any] = {
            "status": "FAILURE" if failed else "SUCCESS",
            "requestId": request_id,
            "notificationDate": found.at,
            "validationErrorList": found.errors,
        }
        if not failed:
            result["incompleteDocumentationReasonList"] = found.incomplete
            if context.on("T17"):
                result["mrn"] = found.mrn
        settings = self.settings
        return json_reply(settings.failure_status if failed else settings.success_status, result)

    def _queried(self, call: Call) -> Reply:
        where, documents = call.route, self.state.documents
        if where is None:
            return Reply(404)
        if where.kind == "receptacle":
            return json_reply(200, statuses.in_receptacle(where.refs[0], documents, call.org))
        if where.kind == "entry":
            return json_reply(200, self._entry(where.refs[0]))
        if where.kind == "document":
            key = (call.query.get("documentNumber", ""), call.query.get("type", ""))
            mrns = [mrn for mrn, each in documents.items() if each.key == key]
        else:
            mrns = [mrn for mrn in where.refs[:1] if mrn in documents]
        mrn = next((mrn for mrn in mrns if documents[mrn].org == call.org), None)
        if mrn is None:
            return Reply(404)
        levels = where.refs[1:] or (statuses.MASTER, statuses.HOUSE)
        listed = [each for level in levels for each in statuses.below(mrn, documents, level)]
        if where.kind == "descendants":
            return json_reply(200, {"mrn": mrn, "received": True, "descendants": listed})
        alone = documents[mrn].level == statuses.HOUSE
        return json_reply(200, statuses.one(documents[mrn]) if alone else listed)

    def _entry(self, mrn: str) -> dict[str, Any]:
        arrived = self.state.arrivals.get(mrn)
        if arrived is None:
            return {"validEntry": False, "mrn": mrn}
        office, time = arrived
        return {"validEntry": True, "customsOfficeOfEntry": office, "timeOfEntry": time, "mrn": mrn}

    def _presented(self, call: Call, context: RuleContext) -> Reply:
        where, message = call.route, call.message() or {}
        request_id = str(message.get("requestId"))
        known = where and context.on("T25")
        errors = playground.presentation_errors(where.level, message) if where and known else []
        self.state.presentations[call.org, request_id] = {
            "requestId": request_id,
            "status": "FAILURE" if errors else "SUCCESS",
            "notificationDate": _instant(context.now),
            "validationErrorList": errors,
            "_ready_at": context.now + self.settings.polling_delay,
        }
        return json_reply(202, {"requestId": request_id})

    def _presentations(self, call: Call, context: RuleContext) -> Reply:
        mine = [
            {name: value for name, value in found.items() if not name.startswith("_")}
            for (org, _), found in self.state.presentations.items()
            if org == call.org and found["_ready_at"] <= context.now
        ]
        return json_reply(200, mine)

    def _routing(self, call: Call, context: RuleContext) -> Reply:
        signals = self.state.signals
        mine = [item for org, item in signals if org == call.org or not context.on("T23")]
        marker, static = call.query.get("marker"), [_marker(each) for each in playground.ROUTING]
        # The playground's list, until a test has given the organisation a feed of its own.
        if not mine and context.on("T25"):
            mine = list(playground.ROUTING)
        elif marker in static:
            marker = None
        if marker and context.on("T23"):
            ids = [_marker(item) for item in mine]
            if marker not in ids:
                return json_reply(400, messages.answered([{"field": "marker", "error": "unknown"}]))
            mine = mine[ids.index(marker) + 1 :]
        return json_reply(200, mine[:_PAGE] if context.on("T23") else mine)

    def _uploaded(self, call: Call) -> Reply:
        if call.route is None:
            return Reply(404)
        declaration = call.route.refs[0]
        found = messages.unpack_upload(declaration, call.body)
        self.state.uploads.append((declaration, found.document_type, found.filename, found.size))
        return json_reply(201, {"documentId": str(uuid.uuid4())})


#: Rules that are checked after the grant itself was valid: its jti is used up (M58).
_AFTER_REPLAY: Final = frozenset(("M70", "M71", "M72", "M73", "M64", "M66", "M67", "M63", "M65"))


def _seen(
    kind: str, request: Request, reply: Reply, asked: TokenRequest, refusal: Refusal | None
) -> Received:
    return Received(
        kind,
        request.method,
        request.target,
        reply.status,
        header=asked.jws.header,
        claims=asked.jws.claims,
        refused_by=refusal.rule.id if refusal else None,
        headers=_safe(request.headers),
    )


def _safe(headers: Mapping[str, str]) -> dict[str, str]:
    # Without bearer tokens: the admin endpoint shows this log.
    return {name: value for name, value in headers.items() if name != "authorization"}


def _marker(signal: Mapping[str, Any]) -> str:
    return str(signal["routingResult"]["id"])


def _known(made: Document, others: Iterable[Document]) -> bool:
    """Whether the organisation has a message with the same key already."""
    return any((made.org, made.level, made.key) == (one.org, one.level, one.key) for one in others)


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "pointer": {"messageElementPath": ""}}


def _instant(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _own_chain(key: rsa.RSAPrivateKey) -> list[str]:
    """A self-signed certificate as the x5c of a published key (M02): leaf and root in one."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hsmtoll sandbox Maskinporten")])
    begin = datetime.now(UTC) - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=365))
        .sign(key, hashes.SHA256())
    )
    return [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()]
