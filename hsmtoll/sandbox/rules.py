"""
The one table of rules that the sandbox enforces, each a pure function of request, state and time.

M: Maskinporten; T: Customs; B and F: switches for what no document settles, B about certificates, F
about the flow. `scripts/rules_page.py` writes `hsmtoll/docs/rules.md` from this table.

A rule *refuses* a request, *permits* what a stricter server might refuse, or *gives* an answer its
shape; a rule that is switched off does none of it, so that tests can show what depends on it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtensionOID, NameOID

from hsmtoll.sandbox import facts, jose
from hsmtoll.sandbox.messages import answered, synchronous_errors, unpack_upload
from hsmtoll.sandbox.state import CUSTOMS_SCOPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cryptography.hazmat.primitives.asymmetric import rsa

    from hsmtoll.sandbox.facts import Call, TokenRequest
    from hsmtoll.sandbox.settings import Settings
    from hsmtoll.sandbox.state import Client, State

__all__ = ["SENTENCES", "TABLE", "Refusal", "Rule", "World", "refuse", "replay_key"]

Stage = Literal["grant", "exchange", "call", "answer"]

JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
FORM: Final = "application/x-www-form-urlencoded"
_YEAR: Final = 365 * 86_400

#: Environment → regular expression of the policies that Digdir's validator accepts (M36).
_POLICIES: Final = {
    "prod": r"2\.16\.578\.1\.26\.1\.3\.[25]|2\.16\.578\.1\.29\.13\.(2[01]0|2[012]0\..+|1\.1\.0)"
    r"|2\.16\.578\.1\.29\.13\.1",
    "test": r"2\.16\.578\.1\.26\.1\.(3\.[25]|0\.3\.2)|2\.16\.578\.1\.29\.913\.(2[012]0\..+|1\.1\.0)"
    r"|2\.16\.578\.1\.29\.13\.1\.1\.0|2\.16\.578\.1\.1\.1\.1\.100",
}
_NORWEGIAN: Final = re.compile(r"2\.16\.578\.1\.(26|29|1\.1\.1)\..+")
_OPTIONS: Final = ("resource", "pid", "consumer_org", "iss_onbehalfof", "authorization_details")
_CLAIMS: Final = frozenset(("aud", "iss", "scope", "iat", "exp", "jti", *_OPTIONS))
_NOT_MASKINPORTEN: Final = re.compile(r"openid|profile|offline_access|idporten:.+|krr:user/.+")
_QC_COMPLIANCE: Final = "0.4.0.1862.1.1"
_QC_TYPE: Final = "0.4.0.1862.1.6."


# Pages of Digdir, which runs Maskinporten.
_DIGDIR: Final = "https://docs.digdir.no/docs/Maskinporten/maskinporten_"
_GRANT_PAGE: Final = f"{_DIGDIR}protocol_jwtgrant"
_TOKENS: Final = f"{_DIGDIR}protocol_token"
_ERRORS: Final = f"{_DIGDIR}feilsoking"
_ESEALS: Final = f"{_DIGDIR}func_european_eseals"
_METADATA: Final = f"{_DIGDIR}func_wellknown"
_AUDIENCE: Final = f"{_DIGDIR}func_audience_restricted_tokens"
_PERSON: Final = f"{_DIGDIR}func_pid_restricted_tokens"
_SYSTEM_USER: Final = f"{_DIGDIR}func_systembruker"
_SCOPES: Final = "https://docs.digdir.no/docs/idporten/oidc/oidc_protocol_scope"

# Pages of Customs.
_TOLL: Final = "https://toll.github.io/api/"
_INTEGRATION: Final = f"{_TOLL}maskinporten/teknisk-integrasjon-EN.html"
_WHAT_IS: Final = f"{_TOLL}maskinporten/hva-er-maskinporten-EN.html"
_ORDER_NORWEGIAN: Final = f"{_TOLL}maskinporten/bestille-sertifikat-norsk-EN.html"
_SYNCHRONOUS: Final = f"{_TOLL}mo/synkrone-valideringsfeil-EN.html"
_ASYNCHRONOUS: Final = f"{_TOLL}mo/asynkrone-valideringsfeil-EN.html"
_QUERIES: Final = f"{_TOLL}mo/beskrivelse-av-sporre-api-EN.html"
_RELATION: Final = f"{_TOLL}mo/beskrivelse-av-koblings-api-EN.html"
_CHANGES: Final = f"{_TOLL}mo/kobling-oppdatering-og-sletting-EN.html"
_ROUTING: Final = f"{_TOLL}mo/fremlegging-og-kontrolldirigering-EN.html"
_EXAMPLES: Final = f"{_TOLL}mo/mo-eksempler-EN.html"
_PRESENTATION: Final = f"{_TOLL}ics2/ics2-forsendelser-EN.html"
_UPLOAD: Final = f"{_TOLL}document/document-api-EN.html"
#: The road API v1 as it was rendered in 2022.
_ROAD_2022: Final = "https://github.com/toll/toll.github.io/tree/98d26b6"

# Where something was observed.
#: Digdir's validator of Norwegian enterprise certificates.
_VALIDATOR: Final = "https://github.com/felleslosninger/idporten-seid2-certificate-validator-lib"
#: A client that runs against Maskinporten and Customs, with logs of 2022 and 2023.
_CLIENT_CODE: Final = "https://github.com/SystemaAS/syjservicestn-expft"
#: A report of what Maskinporten's server checks of iat and exp.
_SERVER_LIMITS: Final = "https://github.com/Altinn/altinn-studio/issues/19603"
_ETSI: Final = "https://www.etsi.org/deliver/etsi_en/319400_319499/"


@dataclass(frozen=True, slots=True)
class World:
    """What a rule may look at beside the request. *now* in epoch seconds."""

    state: State
    settings: Settings
    issuer: str
    now: float
    maskinporten_keys: Mapping[str, rsa.RSAPublicKey] = field(default_factory=dict)

    def on(self, rule: str) -> bool:
        """Whether *rule* is in force."""
        return rule not in self.settings.without

    def client(self, request: TokenRequest) -> Client | None:
        """The registered client that the grant names."""
        iss = request.jws.claims.get("iss")
        return self.state.clients.get(iss) if isinstance(iss, str) else None

    def norwegian(self, request: TokenRequest) -> bool:
        """
        Whether the grant is judged as a Norwegian client's: its iss is registered, or it has a
        kid. Otherwise a certificate that asks for a scope of eSeals is one, whoever issued it:
        Buypass and Commfides are on Customs' list for foreign businesses. How Maskinporten decides
        is not public; for other scopes the policy's arc says whose certificate it is (inferred).
        """
        if self.client(request) or request.leaf is None:
            return True
        if any(scope in self.state.eseal_scopes for scope in request.scopes):
            return False
        return any(_NORWEGIAN.fullmatch(policy) for policy in facts.policies(request.leaf))

    def tolerates(self, deviation: str) -> bool:
        """Whether the profile lets a deviation pass."""
        return deviation in self.settings.tolerate


@dataclass(frozen=True, slots=True)
class Rule:
    """
    One row. *basis*: D documented, O observed, I inferred. *sources*: public addresses and sections
    of RFCs; none where nothing public is known, then *basis* is I. *code* is Maskinporten's.
    """

    id: str
    says: str
    basis: str
    sources: tuple[str, ...]
    kind: Literal["refuses", "permits", "gives"]
    stage: Stage
    status: int = 400
    error: str = "invalid_grant"
    code: str | None = None
    check: Callable[[Any, World], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a rule answers. *description* has no trace id yet."""

    rule: Rule
    status: int
    error: str
    code: str | None
    description: str


_ROWS: list[Rule] = []
_CLIENT_FAILED: Final = "Invalid assertion. Client authentication failed."


def _rule(
    id_: str,
    says: str,
    basis: str,
    *sources: str,
    stage: Stage = "grant",
    status: int = 400,
    error: str = "invalid_grant",
    code: str | None = None,
    kind: Literal["refuses", "permits"] = "refuses",
) -> Callable[[Callable[[Any, World], str | None]], Callable[[Any, World], str | None]]:
    def add(
        check: Callable[[Any, World], str | None],
    ) -> Callable[[Any, World], str | None]:
        _ROWS.append(Rule(id_, says, basis, sources, kind, stage, status, error, code, check))
        return check

    return add


def _gives(id_: str, says: str, basis: str, *sources: str) -> None:
    _ROWS.append(Rule(id_, says, basis, sources, "gives", "answer"))


def refuse(stage: Stage, request: TokenRequest | Call, world: World) -> Refusal | None:
    """The first rule of *stage* that refuses *request*, in the order of this file."""
    for rule in _ROWS:
        if rule.stage != stage or rule.check is None:
            continue
        # A permission has a check as well: it refuses where the permission is switched off.
        if world.on(rule.id) == (rule.kind == "permits"):
            continue
        if (said := rule.check(request, world)) is not None:
            status, error, code = rule.status, rule.error, rule.code
            if stage == "exchange" and rule.id in {"T03", "T09"}:
                status = world.settings.invalid_subject_status
                error = "invalid_token" if status == 401 else "invalid_grant"
            if rule.id == "M06" and said.endswith("(missing)"):
                error = "invalid_request"
            if rule.id == "M73":
                code, error = _m73_code(said)
            if rule.id == "M65" and "delegated" in said:
                code = "MP-251"
            return Refusal(rule, status, error, code, said + _quoted(rule.id))
    return None


_CLAIMS_ONLY: Final = (
    "Adding claims not present in the following documentation will result in a response of "
    "400 Bad request with error description containing Invalid assertion."
)

#: What a client in use may do otherwise, and the sentence by which it is refused all the same.
SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "M20": ("RS256, RS384 and RS512 are supported by Maskinporten.", _GRANT_PAGE),
    "M24": (
        "reject the encoded data if it contains characters outside the base alphabet",
        "https://www.rfc-editor.org/rfc/rfc4648#section-3.3",
    ),
    "M37": (_CLAIMS_ONLY, _GRANT_PAGE),
    "M51": ("Using the token-endpoint url as audience is no longer valid.", _TOKENS),
    "M52": ("must only contain a single value", _TOKENS),
    "M53": (_CLAIMS_ONLY, _GRANT_PAGE),
    "M54": ("Maximum 120 seconds allowed. (exp - iat <= 120 )", _GRANT_PAGE),
    "M70": ("Currently only array supported.", _GRANT_PAGE),
}


def _quoted(rule: str) -> str:
    """The sentence behind *rule*; like every reason in brackets, not the real service's words."""
    if rule not in SENTENCES:
        return ""
    sentence, page = SENTENCES[rule]
    return f' [sandbox: "{sentence}" {page}]'


def replay_key(request: TokenRequest) -> str:
    """What is remembered of a grant: its jti, or the whole of it (M58, M59)."""
    jti = request.jws.claims.get("jti")
    if isinstance(jti, str) and jti:
        return f"jti {jti}"
    return f"jwt {hashlib.sha256(request.jws.text.encode()).hexdigest()}"


# --- the answers of Maskinporten ------------------------------------------------------------

_gives(
    "M01",
    "metadata has the seven members; the issuer ends in a slash",
    "O",
    _METADATA,
    "RFC 8414 section 3.2",
)
_gives(
    "M02",
    "/jwk returns RSA keys with kid, n, e, x5c; x5c[0] holds the same key",
    "D/O",
    _ESEALS,
    "RFC 7517 section 4.7",
)
_gives("M03", "/health answers 200", "D", _WHAT_IS)
_gives(
    "M08",
    "every error has error, error_description with trace_id, and error_uri",
    "D/O",
    _ERRORS,
    "RFC 6749 section 5.2",
)
_gives(
    "M09",
    "no-store and application/json on success and error",
    "O",
    _CLIENT_CODE,
    "RFC 6749 section 5.1",
)
_gives("M80", "200 with exactly access_token, token_type, expires_in, scope", "D", _TOKENS)
_gives("M81", "expires_in = exp - iat - 1", "O", _CLIENT_CODE)
_gives("M82", "lifetimes are configurable per scope; the lowest wins", "D/O", _SCOPES)
_gives("M83", "token header only kid and alg; RS256; kid is in /jwk", "D/O", _TOKENS, _CLIENT_CODE)
_gives(
    "M84",
    "the documented claims; no sub, no nbf; aud only with resource",
    "D/O",
    _TOKENS,
    _AUDIENCE,
)
_gives(
    "M85",
    "Norwegian consumer.ID is 0192: and the number; client_amr by the kind of proof",
    "D",
    _TOKENS,
)
_gives("M86", "eSeal consumer.ID verbatim; names copied when present", "D", _ESEALS)
_gives(
    "M87",
    "eSeal client_id is eidas- and the serial; client_amr by QCStatements",
    "D/I",
    _ESEALS,
    _TOKENS,
)
_gives("M88", "eSeal consumer.authority in the spelling of the settings", "D", _ESEALS)
_gives("M89", "Maskinporten fails as a test asks: status, delay, broken answer", "I")

# --- the token request ----------------------------------------------------------------------


@_rule(
    "M04",
    "/token accepts only POST",
    "I",
    "RFC 6749 section 3.2",
    status=405,
    error="invalid_request",
)
def _m04(request: TokenRequest, _: World) -> str | None:
    return None if request.method == "POST" else "Method not allowed"


@_rule(
    "M05",
    "the body is form-urlencoded",
    "I",
    _TOKENS,
    "RFC 6749 section 4.5",
    status=415,
    error="invalid_request",
)
def _m05(request: TokenRequest, _: World) -> str | None:
    return None if request.media_type == FORM else "Unsupported Content-Type"


@_rule(
    "M10",
    "no client authentication; an Authorization header is ignored",
    "D/I",
    _TOKENS,
    kind="permits",
)
def _m10(request: TokenRequest, _: World) -> str | None:
    return "Client authentication is not used here" if request.authorization else None


@_rule(
    "M06",
    "grant_type is RFC 7523's",
    "I",
    _TOKENS,
    "RFC 6749 section 5.2",
    error="unsupported_grant_type",
)
def _m06(request: TokenRequest, _: World) -> str | None:
    found = request.form.get("grant_type")
    return None if found == JWT_BEARER else f"Unsupported grant_type {found or '(missing)'}"


@_rule(
    "M07",
    "assertion is a compact JWS of JSON objects",
    "D/I",
    _ERRORS,
    "RFC 7515 section 3.1",
    error="invalid_request",
    code="MP-011",
)
def _m07(request: TokenRequest, _: World) -> str | None:
    return "Invalid assertion. Invalid parameter value" if request.jws.malformed else None


# --- the header -----------------------------------------------------------------------------


@_rule(
    "M37",
    "the header has alg, kid or x5c, and perhaps typ JWT, which no page forbids",
    "D/O",
    _GRANT_PAGE,
)
def _m37(request: TokenRequest, _: World) -> str | None:
    extra = set(request.jws.header) - {"alg", "kid", "x5c"}
    if request.jws.header.get("typ") == "JWT":
        extra -= {"typ"}
    return f"Invalid assertion. Unknown header {sorted(extra)}" if extra else None


@_rule("M20", "alg is RS256, RS384 or RS512", "D/I", _GRANT_PAGE)
def _m20(request: TokenRequest, _: World) -> str | None:
    alg = request.jws.header.get("alg")
    return None if isinstance(alg, str) and alg in jose.HASHES else "Invalid assertion. Invalid alg"


@_rule("M21", "kid or x5c is there", "D", _GRANT_PAGE)
def _m21(request: TokenRequest, world: World) -> str | None:
    if {"kid", "x5c"} & set(request.jws.header):
        return None
    client = world.client(request)
    if client and client.keys:
        return f"{_CLIENT_FAILED} {_NEEDS_KID}"
    return "Invalid assertion. Neither kid nor x5c in the JWT header"


_NEEDS_KID: Final = (
    "Invalid JWT. The client requires pre-registered jwk and no key identifier (kid) provided"
)


@_rule("M22", "not both kid and x5c", "I")
def _m22(request: TokenRequest, _: World) -> str | None:
    both = {"kid", "x5c"} <= set(request.jws.header)
    return "Invalid assertion. Both kid and x5c in the JWT header" if both else None


@_rule("M23", "x5c is an array of strings", "D", _ERRORS, "RFC 7515 section 4.1.6", code="MP-123")
def _m23(request: TokenRequest, _: World) -> str | None:
    return _x5c(request, "shape")


@_rule(
    "M24",
    "x5c entries are standard base64 of DER",
    "D/I",
    "RFC 7515 section 4.1.6",
    "RFC 4648 section 3.3",
    code="MP-123",
)
def _m24(request: TokenRequest, _: World) -> str | None:
    return _x5c(request, "entry")


def _x5c(request: TokenRequest, kind: str) -> str | None:
    wrong = request.x5c_fault and request.x5c_fault.startswith(kind)
    return f"{_CLIENT_FAILED} Invalid JWT header x5c" if wrong else None


# --- the claims, as far as they can be judged without knowing who asks -----------------------


@_rule(
    "M50",
    "aud, iss, scope, iat, exp are there",
    "D/I",
    _GRANT_PAGE,
    error="invalid_request",
    code="MP-011",
)
def _m50(request: TokenRequest, _: World) -> str | None:
    needed = ("aud", "iss", "scope", "iat", "exp")
    missing = [name for name in needed if request.jws.claims.get(name) in (None, "", [])]
    if "scope" in missing and isinstance(request.jws.claims.get("scope"), str):
        missing.remove("scope")
    return f"Invalid assertion. Missing claim {', '.join(missing)}" if missing else None


@_rule("M53", "no claims beside the documented ones", "D", _GRANT_PAGE, error="invalid_request")
def _m53(request: TokenRequest, world: World) -> str | None:
    extra = set(request.jws.claims) - _CLAIMS
    if world.tolerates("nbf"):
        extra -= {"nbf"}
    return f"Invalid assertion. Unknown claim {sorted(extra)}" if extra else None


@_rule(
    "M60",
    "iat and exp are JSON integers, in seconds",
    "I",
    "RFC 7519 section 2",
    error="invalid_request",
    code="MP-011",
)
def _m60(request: TokenRequest, _: World) -> str | None:
    for name in ("iat", "exp"):
        found = request.jws.claims.get(name)
        if name in request.jws.claims and (type(found) is not int or found > 99_999_999_999):
            return f"Invalid assertion. Invalid parameter value {name}"
    return None


@_rule(
    "M69",
    "scope is split on white space and not empty",
    "D/I",
    _GRANT_PAGE,
    error="invalid_request",
    code="MP-011",
)
def _m69(request: TokenRequest, _: World) -> str | None:
    empty = "scope" in request.jws.claims and not request.scopes
    return "Invalid assertion. Invalid parameter value scope" if empty else None


@_rule("M52", "aud is a single value, not an array", "D/I", _TOKENS, code="MP-110")
def _m52(request: TokenRequest, world: World) -> str | None:
    aud = request.jws.claims.get("aud")
    if not isinstance(aud, list) or (world.tolerates("aud-list") and len(aud) == 1):
        return None
    return f"{_CLIENT_FAILED} Invalid JWT claim aud"


@_rule("M51", "aud is the issuer, byte for byte", "D", _TOKENS, code="MP-110")
def _m51(request: TokenRequest, world: World) -> str | None:
    aud = request.jws.claims.get("aud", world.issuer)
    heard = aud if isinstance(aud, list) else [aud]
    return None if world.issuer in heard else f"{_CLIENT_FAILED} Invalid JWT claim aud"


# --- who asks -------------------------------------------------------------------------------


@_rule(
    "M61",
    "iss is a registered client; an eSeal's is any string",
    "D",
    _ERRORS,
    _ESEALS,
    code="MP-100",
)
def _m61(request: TokenRequest, world: World) -> str | None:
    iss = request.jws.claims.get("iss", "-")
    if not isinstance(iss, str):
        return f"{_CLIENT_FAILED} Invalid iss"
    if world.norwegian(request) and world.client(request) is None:
        return f"{_CLIENT_FAILED} Client not found"
    return None


@_rule("M40", "a client registered for keys uses kid", "D/O", _GRANT_PAGE)
def _m40(request: TokenRequest, world: World) -> str | None:
    client, header = world.client(request), request.jws.header
    if client and client.keys and "x5c" in header and "kid" not in header:
        return f"{_CLIENT_FAILED} {_NEEDS_KID}"
    return None


@_rule("M38", "kid is one of the client's", "O", _CLIENT_CODE)
def _m38(request: TokenRequest, world: World) -> str | None:
    kid, client = request.jws.header.get("kid"), world.client(request)
    if "kid" not in request.jws.header:
        return None
    if client and isinstance(kid, str) and kid in client.keys:
        return None
    return f"{_CLIENT_FAILED} Unknown key identifier (kid) for client."


@_rule("M39", "the registered key was posted less than a year ago", "D", _ERRORS, code="MP-121")
def _m39(request: TokenRequest, world: World) -> str | None:
    kid, client = request.jws.header.get("kid"), world.client(request)
    known = client.keys.get(kid) if client and isinstance(kid, str) else None
    return f"{_CLIENT_FAILED} Expired key" if known and world.now - known[1] > _YEAR else None


# --- the certificates -----------------------------------------------------------------------

_BAD_CERTIFICATE: Final = f"{_CLIENT_FAILED} The JWT is signed with an invalid certificate."


@_rule(
    "M33", "the key of x5c[0] is RSA, 2048 bits or more", "I", "RFC 7518 section 3.3", code="MP-120"
)
def _m33(request: TokenRequest, _: World) -> str | None:
    if request.leaf is None:
        return None
    key = facts.rsa_key(request.leaf)
    return None if key and key.key_size >= 2048 else _bad("key")


@_rule("M34", "x5c[0] is neither self-signed nor a CA", "O", _VALIDATOR, code="MP-120")
def _m34(request: TokenRequest, _: World) -> str | None:
    leaf = request.leaf
    if leaf is None:
        return None
    return _bad("leaf") if _self_signed(leaf) or _is_ca(leaf) else None


@_rule(
    "M26", "each certificate is signed by the next", "D/I", "RFC 7515 section 4.1.6", code="MP-120"
)
def _m26(request: TokenRequest, _: World) -> str | None:
    chain = request.certificates
    pairs = itertools.pairwise(chain)
    return None if all(_issued(lower, upper) for lower, upper in pairs) else _bad("order")


@_rule(
    "M27",
    "an eSeal's chain reaches an anchor from the supplied certificates alone",
    "D/I",
    _ESEALS,
    _INTEGRATION,
    code="MP-120",
)
def _m27(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or world.norwegian(request):
        return None
    return None if _complete(request, world) else _bad("chain")


@_rule(
    "M28",
    "a Norwegian leaf or chain is issued by a known CA",
    "O/D",
    _INTEGRATION,
    _GRANT_PAGE,
    code="MP-120",
)
def _m28(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or not world.norwegian(request) or _complete(request, world):
        return None
    known = [anchor.certificate for anchor in world.state.anchors] + world.state.pinned
    # Customs' guide documents the certificate alone, Digdir's page the whole chain.
    if any(_issued(request.certificates[-1], ca) for ca in known):
        return None
    return _bad("chain")


@_rule("M29", "every certificate is within its validity", "D", _ERRORS, code="MP-120")
def _m29(request: TokenRequest, world: World) -> str | None:
    now = datetime.fromtimestamp(world.now, UTC)
    valid = all(
        cert.not_valid_before_utc <= now <= cert.not_valid_after_utc
        for cert in request.certificates
    )
    return None if valid else _bad("validity")


@_rule("M30", "no certificate is revoked", "O/I", _ERRORS, _VALIDATOR, code="MP-120")
def _m30(request: TokenRequest, world: World) -> str | None:
    gone = any(cert.serial_number in world.state.revoked for cert in request.certificates)
    return _bad("revoked") if gone else None


@_rule(
    "M31", "a Norwegian certificate belongs to this environment", "D", _GRANT_PAGE, code="MP-120"
)
def _m31(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or not world.norwegian(request):
        return None
    found, here = facts.policies(request.leaf), world.settings.environment
    other = "prod" if here == "test" else "test"
    if not _accepted(found, here) and _accepted(found, other):
        return _bad("environment")
    anchors = [a for a in world.state.anchors if a.certificate in request.certificates]
    wrong = [a for a in anchors if a.environment not in (None, here)]
    return _bad("environment") if wrong else None


@_rule("M32", "the chain ends at an anchor on the trust list", "D", _ESEALS, code="MP-120")
def _m32(request: TokenRequest, world: World) -> str | None:
    chain = request.certificates
    if not chain or not _self_signed(chain[-1]) or len(chain) == 1:
        return None
    trusted = [anchor.certificate for anchor in world.state.anchors]
    return None if any(cert in trusted for cert in chain[1:]) else _bad("anchor")


@_rule(
    "M35",
    "a Norwegian leaf has no critical extension beside the known two",
    "O",
    _VALIDATOR,
    code="MP-120",
)
def _m35(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or not world.norwegian(request):
        return None
    known = {ExtensionOID.KEY_USAGE, ExtensionOID.BASIC_CONSTRAINTS}
    odd = [one for one in request.leaf.extensions if one.critical and one.oid not in known]
    return _bad("extension") if odd else None


@_rule("M36", "a Norwegian leaf has an accepted policy", "O", _VALIDATOR, code="MP-120")
def _m36(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or not world.norwegian(request):
        return None
    found = facts.policies(request.leaf)
    accepted = any(_accepted(found, environment) for environment in _POLICIES)
    return None if accepted else _bad("policy")


@_rule("M74", "an eSeal's subject has an organizationIdentifier", "D/I", _ESEALS, code="MP-120")
def _m74(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or world.norwegian(request):
        return None
    found = facts.values(request.leaf, NameOID.ORGANIZATION_IDENTIFIER)
    return None if found else _bad("organizationIdentifier")


@_rule(
    "M75",
    "an eSeal's subject has one organizationIdentifier",
    "I",
    _ETSI + "31941203/",
    code="MP-120",
)
def _m75(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or world.norwegian(request):
        return None
    found = facts.values(request.leaf, NameOID.ORGANIZATION_IDENTIFIER)
    return _bad("organizationIdentifier") if len(found) > 1 else None


@_rule(
    "B1",
    "the leaf may make signatures (a switch; the documents do not say)",
    "I",
    _ORDER_NORWEGIAN,
    code="MP-120",
)
def _b1(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or not world.settings.key_usage_enforced:
        return None
    try:
        usage = request.leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return _bad("keyUsage")
    seal = usage.content_commitment and not world.norwegian(request)
    return None if usage.digital_signature or seal else _bad("keyUsage")


@_rule("B4", "a qualified certificate is one for seals", "I", _ETSI + "31941205/", code="MP-120")
def _b4(request: TokenRequest, world: World) -> str | None:
    if request.leaf is None or world.norwegian(request):
        return None
    found = facts.qc_statements(request.leaf)
    wrong = _QC_COMPLIANCE in found and {f"{_QC_TYPE}1", f"{_QC_TYPE}3"} & found
    return _bad("QcType") if wrong else None


@_rule("M62", "the certificate's organisation owns the client", "D", _ERRORS, code="MP-122")
def _m62(request: TokenRequest, world: World) -> str | None:
    client = world.client(request)
    if request.leaf is None or client is None or facts.org_no(request.leaf) == client.org_no:
        return None
    return "Invalid JWT. Invalid organization number for client. Does not match certificate orgno"


@_rule(
    "M25", "the signature verifies with the key of x5c[0], or of kid", "D", _ERRORS, code="MP-124"
)
def _m25(request: TokenRequest, world: World) -> str | None:
    key = signing_key(request, world)
    alg = request.jws.header.get("alg")
    if key is None or not isinstance(alg, str) or alg not in jose.HASHES:
        return None
    if jose.verified(alg, key, request.jws.data, request.jws.signature):
        return None
    return f"{_CLIENT_FAILED} Invalid JWT signature"


def signing_key(request: TokenRequest, world: World) -> rsa.RSAPublicKey | None:
    """The key that must have signed."""
    kid, client = request.jws.header.get("kid"), world.client(request)
    if client and isinstance(kid, str) and kid in client.keys:
        return client.keys[kid][0]
    return facts.rsa_key(request.leaf) if request.leaf else None


def _bad(why: str) -> str:
    # The reason is ours: the real service says no more than the sentence.
    return f"{_BAD_CERTIFICATE} [sandbox: {why}]"


def _issued(lower: x509.Certificate, upper: x509.Certificate) -> bool:
    if not _is_ca(upper):
        return False
    try:
        lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _self_signed(cert: x509.Certificate) -> bool:
    if cert.issuer != cert.subject:
        return False
    try:
        cert.verify_directly_issued_by(cert)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_ca(cert: x509.Certificate) -> bool:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _complete(request: TokenRequest, world: World) -> bool:
    """The supplied certificates end in a root, at an anchor, or just below one."""
    chain = request.certificates
    if len(chain) == 1 and not _self_signed(chain[0]):
        return False
    if _self_signed(chain[-1]):
        return True
    if world.settings.root_in_x5c:
        return False
    trusted = [anchor.certificate for anchor in world.state.anchors]
    return chain[-1] in trusted or any(_issued(chain[-1], anchor) for anchor in trusted)


def _accepted(found: set[str], environment: str) -> bool:
    return any(re.fullmatch(_POLICIES[environment], policy) for policy in found)


# --- time -----------------------------------------------------------------------------------


@_rule(
    "M54",
    "exp - iat is more than 0 and at most 120 s (as observed: 180)",
    "D/O",
    _GRANT_PAGE,
    _SERVER_LIMITS,
)
def _m54(request: TokenRequest, world: World) -> str | None:
    life = request.number("exp", world.now + 60) - request.number("iat", world.now)
    if life <= 0:
        return "JWT has no lifetime: exp is not after iat."
    return "JWT has too long lifetime." if life > world.settings.longest_grant else None


@_rule("M55", "iat is at most 10 s ahead", "D/O", _GRANT_PAGE, _SERVER_LIMITS)
def _m55(request: TokenRequest, world: World) -> str | None:
    ahead = request.number("iat", world.now) > world.now + 10
    return "Issue time is in the future." if ahead else None


@_rule("M56", "iat in the past is no error by itself", "O", _SERVER_LIMITS, kind="permits")
def _m56(request: TokenRequest, world: World) -> str | None:
    old = request.number("iat", world.now) < world.now - 10
    return "Issue time is too old." if old else None


@_rule("M57", "exp is at most 10 s ago", "D/O", _ERRORS, _SERVER_LIMITS, code="MP-130")
def _m57(request: TokenRequest, world: World) -> str | None:
    late = request.number("exp", world.now + 60) < world.now - 10
    return "JWT is expired" if late else None


@_rule(
    "M59",
    "jti may be absent; then the whole JWT is the replay key",
    "D",
    _GRANT_PAGE,
    kind="permits",
)
def _m59(request: TokenRequest, _: World) -> str | None:
    return "Invalid assertion. Missing claim jti" if "jti" not in request.jws.claims else None


@_rule("M58", "a grant is used once", "D/I", _GRANT_PAGE, _ERRORS, code="MP-012")
def _m58(request: TokenRequest, world: World) -> str | None:
    used = world.state.used.get(replay_key(request), 0) >= world.now
    return "Validation of JWT (Bearer grant) failed. Grant is used before" if used else None


# --- options --------------------------------------------------------------------------------


@_rule(
    "M70", "resource is an array of strings", "D/O", _GRANT_PAGE, _AUDIENCE, error="invalid_request"
)
def _m70(request: TokenRequest, world: World) -> str | None:
    found = request.jws.claims.get("resource", [])
    if isinstance(found, str) and world.tolerates("resource"):
        return None
    right = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return None if right else "Invalid assertion. Invalid parameter value resource"


@_rule("M71", "pid is 11 digits", "D", _PERSON, error="invalid_request")
def _m71(request: TokenRequest, _: World) -> str | None:
    pid = request.jws.claims.get("pid")
    right = pid is None or (isinstance(pid, str) and re.fullmatch(r"\d{11}", pid, re.ASCII))
    return None if right else "Invalid assertion. Invalid parameter value pid"


@_rule("M72", "consumer_org is another's, and alone", "D", _ERRORS, error="invalid_request")
def _m72(request: TokenRequest, world: World) -> str | None:
    consumer, client = request.jws.claims.get("consumer_org"), world.client(request)
    if consumer is not None and "iss_onbehalfof" in request.jws.claims:
        return "Invalid assertion. consumer_org and iss_onbehalfof exclude each other"
    own = client.org_no if client else None
    if consumer is not None and consumer == own:
        return (
            "Validation of JWT claim failed: The combination consumer_org in claim and "
            "delegation scope on client is invalid"
        )
    return None


@_rule(
    "M73",
    "authorization_details are of a known type, with known and good members",
    "D",
    _SYSTEM_USER,
    _ERRORS,
)
def _m73(request: TokenRequest, _: World) -> str | None:
    found = request.jws.claims.get("authorization_details", [])
    members = {
        "urn:altinn:systemuser": {"type", "systemuser_org", "externalRef"},
        "urn:altinn:consent": {"type", "id", "from"},
    }
    if not isinstance(found, list):
        return "Invalid authorization details values"
    for one in found:
        kind = one.get("type") if isinstance(one, dict) else None
        if not isinstance(kind, str) or kind not in members:
            return "Unknown authorization details type"
        if set(one) - members[kind]:
            return "Unknown fields in the authorization details"
        if not _good_details(one):
            return "Invalid authorization details values"
    return None


def _good_details(one: dict[str, Any]) -> bool:
    if one["type"] == "urn:altinn:consent":
        return bool(one.get("id") and one.get("from"))
    org = one.get("systemuser_org")
    return (
        isinstance(org, dict)
        and org.get("authority") == "iso6523-actorid-upis"
        and bool(re.fullmatch(r"0192:\d{9}", str(org.get("ID"))))
    )


def _m73_code(said: str) -> tuple[str, str]:
    if said.endswith("type"):
        return "MP-301", "invalid_authorization_details"
    if said.startswith("Unknown"):
        return "MP-302", "invalid_authorization_details"
    return "MP-303", "invalid_altinn_customer_configuration"


# --- scopes ---------------------------------------------------------------------------------


def _bad_scope(request: TokenRequest, world: World, bad: Callable[[str], bool]) -> str | None:
    """The scope that fails the request: any bad one (M68), else only where none is good."""
    found = [scope for scope in request.scopes if bad(scope)]
    if not found or (not world.on("M68") and len(found) < len(request.scopes)):
        return None
    return found[0]


@_rule(
    "M64",
    "the scope is for this integration type",
    "D",
    _ERRORS,
    error="invalid_scope",
    code="MP-201",
)
def _m64(request: TokenRequest, world: World) -> str | None:
    if not world.norwegian(request):
        return None
    bad = _bad_scope(request, world, lambda one: bool(_NOT_MASKINPORTEN.fullmatch(one)))
    return bad and f"Token request contains scopes not allowed for maskinporten, {bad}"


@_rule(
    "M66",
    "an eSeal asks for scopes enabled for eSeals",
    "D/I",
    _ESEALS,
    error="invalid_scope",
    code="MP-200",
)
def _m66(request: TokenRequest, world: World) -> str | None:
    if world.norwegian(request):
        return None
    bad = _bad_scope(request, world, lambda one: one not in world.state.eseal_scopes)
    return bad and f"Token request contains invalid scopes for client, {bad}"


@_rule(
    "M67",
    "a Norwegian client does not ask for toll:eu/",
    "D/I",
    _INTEGRATION,
    error="invalid_scope",
    code="MP-200",
)
def _m67(request: TokenRequest, world: World) -> str | None:
    if not world.norwegian(request):
        return None
    bad = _bad_scope(request, world, lambda one: one.startswith("toll:eu/"))
    return bad and f"Token request contains invalid scopes for client, {bad}"


@_rule("M63", "the scope is on the client", "D/O", _ERRORS, error="invalid_scope", code="MP-200")
def _m63(request: TokenRequest, world: World) -> str | None:
    client = world.client(request)
    if client is None or not world.norwegian(request):
        return None

    def missing(one: str) -> bool:
        elsewhere = one.startswith("toll:eu/") or _NOT_MASKINPORTEN.fullmatch(one)
        return one not in client.scopes and not elsewhere

    bad = _bad_scope(request, world, missing)
    return bad and f"Token request contains invalid scopes for client, {bad}"


@_rule(
    "M65",
    "the organisation has been granted the scope, or it was delegated",
    "D/O",
    _ERRORS,
    status=403,
    error="forbidden",
    code="MP-250",
)
def _m65(request: TokenRequest, world: World) -> str | None:
    own, consumer = organisation(request, world), request.jws.claims.get("consumer_org")
    client = world.client(request)

    def refused(one: str) -> bool:
        if consumer is not None:
            return (str(consumer), own, one) not in world.state.delegations
        allowed = world.state.allowed.get(own)
        if allowed is None and client is not None:
            allowed = set(client.granted) if client.granted is not None else None
        return allowed is not None and one not in allowed

    bad = _bad_scope(request, world, refused)
    if bad and consumer is not None:
        return f"Consumer {consumer} has not delegated access to the scope {bad} to supplier {own}"
    return bad and f"Consumer has not been granted access to the scope {bad}"


_gives("M68", "one bad scope fails the whole request", "D", _GRANT_PAGE)


def organisation(request: TokenRequest, world: World) -> str:
    """Who asks: the client's organisation number, or the eSeal's identifier."""
    client = world.client(request)
    if client is not None:
        return client.org_no
    if request.leaf is None:
        return ""
    if world.norwegian(request):
        return facts.org_no(request.leaf) or ""
    return next(iter(facts.values(request.leaf, NameOID.ORGANIZATION_IDENTIFIER)), "")


# --- the exchange at Customs ----------------------------------------------------------------

_gives(
    "T06", "issued_token_type, access_token, token_type, expires_in; no scope", "D", _INTEGRATION
)
_gives("T07", "exp of the subject token; expires_in is what remains, less one", "O", _CLIENT_CODE)
_gives("T08", "RS512, no kid; iss, sub, iat, exp, scope with internal names", "O", _CLIENT_CODE)


@_rule(
    "T01",
    "POST, form-urlencoded, the three parameters",
    "D",
    _INTEGRATION,
    stage="exchange",
    error="invalid_request",
)
def _t01(request: TokenRequest, _: World) -> str | None:
    if request.method != "POST" or request.media_type != FORM:
        return "POST a form"
    known = {"grant_type", "subject_token_type", "subject_token"}
    wrong = sorted(known ^ set(request.form))
    return f"missing or unknown parameter {', '.join(wrong)}" if wrong else None


@_rule(
    "T02",
    "the bare words, not RFC 8693's URNs",
    "D/I",
    _INTEGRATION,
    "RFC 8693 section 2.1",
    stage="exchange",
    error="unsupported_grant_type",
)
def _t02(request: TokenRequest, _: World) -> str | None:
    words = {"grant_type": "token-exchange", "subject_token_type": "access_token"}
    wrong = [name for name, word in words.items() if request.form.get(name, word) != word]
    return f"unsupported {', '.join(wrong)}" if wrong else None


@_rule(
    "T03",
    "a Maskinporten token of the same environment",
    "I",
    "RFC 8693 section 2.1",
    stage="exchange",
    status=401,
)
def _t03(request: TokenRequest, world: World) -> str | None:
    jws = request.jws
    key = world.maskinporten_keys.get(str(jws.header.get("kid")))
    alg = str(jws.header.get("alg"))
    if key is None or alg not in jose.HASHES or jws.claims.get("iss") != world.issuer:
        return "subject_token is not a token of this environment's Maskinporten"
    valid = jose.verified(alg, key, jws.data, jws.signature)
    return None if valid else "subject_token has an invalid signature"


@_rule(
    "T09",
    "the subject token still lives",
    "I",
    "RFC 8693 section 2.1",
    stage="exchange",
    status=401,
)
def _t09(request: TokenRequest, world: World) -> str | None:
    unexpired_in_memory = request.number("exp", 0) >= world.now + 2
    return None if unexpired_in_memory else "subject_token has expired"


@_rule(
    "T04",
    "the scope is one of Customs'",
    "D",
    _INTEGRATION,
    stage="exchange",
    status=403,
    error="invalid_scope",
)
def _t04(request: TokenRequest, _: World) -> str | None:
    if set(request.scopes) & CUSTOMS_SCOPES:
        return None
    return f"Not authorized to request scope {' '.join(request.scopes)}"


@_rule(
    "T05",
    "the organisation is registered for the scope",
    "D",
    _INTEGRATION,
    stage="exchange",
    status=403,
    error="invalid_scope",
)
def _t05(request: TokenRequest, world: World) -> str | None:
    org = subject(request)
    denied = [one for one in request.scopes if (org, one) in world.state.customs_denied]
    return f"Not authorized to request scope {denied[0]}" if denied else None


@_rule("F2", "one token, one exchange (a switch; the documents do not say)", "I", stage="exchange")
def _f2(request: TokenRequest, world: World) -> str | None:
    again = not world.settings.exchange_twice and request.jws.text in world.state.exchanged
    return "subject_token was exchanged before" if again else None


def subject(request: TokenRequest) -> str:
    """The organisation in a Maskinporten token, as Customs writes it into ``sub``."""
    consumer = request.jws.claims.get("consumer")
    found = str(consumer.get("ID", "")) if isinstance(consumer, dict) else ""
    return found.removeprefix("0192:")


# --- the APIs of Customs --------------------------------------------------------------------

_gives("T12", "test-auth of road answers 200, empty", "D/I", _INTEGRATION, _ROAD_2022)
_gives("T13", "202 with a new requestId each time", "D", _SYNCHRONOUS)
_gives("T16", "validation-status is 404 for a while; then 2xx", "D/O", _ASYNCHRONOUS)
_gives("T17", "SUCCESS has an 18-character mrn, FAILURE a list", "D", _ASYNCHRONOUS)
_gives("T23", "routing: newer than the marker, 1000 at most, own items", "D", _ROUTING)
_gives("T25", "the playground's data behaves as its pages list it", "D", _EXAMPLES, _PRESENTATION)
_gives("T26", "every response has X-CorrelationID and x-request-id", "O", _CLIENT_CODE)
_gives("T27", "Customs fails as a test asks: status, delay, broken answer", "I")


@_rule("T10", "a Customs token that lives", "O/I", _ROAD_2022, stage="call", status=401)
def _t10(call: Call, world: World) -> str | None:
    claims = call.claims
    if claims is None or call.bearer in world.state.dead_tokens:
        return "no valid token"
    return None if claims.get("exp", 0) > world.now else "expired"


@_rule("T19", "a path of this API, with its method", "I", _QUERIES, stage="call", status=404)
def _t19(call: Call, _: World) -> str | None:
    return "no such path" if call.route is None or call.other_base else None


@_rule("T11", "the token's scope covers the API", "O/I", _ROAD_2022, stage="call", status=403)
def _t11(call: Call, _: World) -> str | None:
    scopes = str((call.claims or {}).get("scope", "")).split()
    needed = INTERNAL[call.route.scope] if call.route and call.route.scope else ""
    return None if not needed or needed in scopes else "insufficient scope"


#: Kinds of calls that carry a message.
_MESSAGES: Final = frozenset(("submit", "change", "relation", "present", "arrive"))


@_rule("T14", "the documented Content-Type", "O", _ROAD_2022, _RELATION, stage="call", status=415)
def _t14(call: Call, _: World) -> str | None:
    kind = call.route.kind if call.route else ""
    wanted = {"upload": "multipart/form-data"}.get(kind, "application/json")
    if kind not in {*_MESSAGES, "upload"}:
        return None
    if call.method == "DELETE" and not call.body:
        return None
    return None if call.media_type == wanted else "unsupported media type"


@_rule("T21", "DELETE carries a JSON body", "O/I", _ROAD_2022, _RELATION, stage="call")
def _t21(call: Call, _: World) -> str | None:
    if call.route is None or call.method != "DELETE" or call.message() is not None:
        return None
    return _errors([{"field": "body", "error": "must not be null"}])


@_rule("T15", "required members, in form", "D", _SYNCHRONOUS, stage="call")
def _t15(call: Call, _: World) -> str | None:
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


@_rule("T20", "PUT and DELETE name an MRN issued earlier", "D", _CHANGES, stage="call", status=404)
def _t20(call: Call, world: World) -> str | None:
    if call.route is None or call.route.kind != "change":
        return None
    known = world.state.documents.get(call.mrn or "")
    mine = known and (known.org, known.level) == (call.org, call.route.level)
    return None if mine else "no such MRN"


@_rule(
    "T22", "a presentation's requestId is the client's, and new", "D", _PRESENTATION, stage="call"
)
def _t22(call: Call, world: World) -> str | None:
    if call.route is None or call.route.kind != "present":
        return None
    key = (call.org, str((call.message() or {}).get("requestId")))
    again = key in world.state.presentations
    return _errors([{"field": "requestId", "error": "is already in use"}]) if again else None


@_rule("T18", "a requestId is seen by its own organisation", "I", stage="call", status=404)
def _t18(call: Call, world: World) -> str | None:
    if call.route is None or call.route.kind != "validation-status":
        return None
    found = world.state.submissions.get(call.route.refs[0])
    return "not yours" if found and found.org != call.org else None


@_rule("T24", "an upload is in order and in bounds", "D/I", _UPLOAD, stage="call")
def _t24(call: Call, _: World) -> str | None:
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

#: The rules by id. The order of enforcement is that of `_ROWS`.
TABLE: Final[Mapping[str, Rule]] = {
    rule.id: rule for rule in sorted(_ROWS, key=lambda rule: rule.id)
}
