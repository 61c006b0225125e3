"""
Lenient parsing of requests, so that the rules alone decide what is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from hsmtoll.sandbox import jose

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Call", "Jws", "Route", "TokenRequest", "org_no", "qc_statements", "route", "values"]

_QC: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.3")


@dataclass(frozen=True, slots=True)
class Jws:
    """A compact JWS in parts. *malformed*: why a strict parser would refuse it (M07)."""

    text: str
    header: Mapping[str, Any] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)
    data: bytes = b""
    signature: bytes = b""
    malformed: str | None = None

    @classmethod
    def read(cls, text: str) -> Jws:
        """Never raises; what cannot be read is empty."""
        parts = text.split(".")
        if len(parts) != 3:
            return cls(text, malformed="not three segments")
        malformed = None
        try:
            for part in parts:
                jose.decode(part)
        except ValueError:
            malformed = "a segment is not base64url"
        cleaned = ["".join(part.split()).rstrip("=") for part in parts]
        try:
            header, claims = map(jose.load_object, cleaned[:2])
            signature = jose.decode(cleaned[2])
        except (ValueError, RecursionError):
            return cls(text, malformed="header or payload is not a JSON object")
        return cls(text, header, claims, ".".join(cleaned[:2]).encode(), signature, malformed)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request to one of the two token endpoints; *jws* is its assertion or subject token."""

    method: str
    media_type: str
    authorization: bool
    form: Mapping[str, str]
    jws: Jws
    certificates: tuple[x509.Certificate, ...] = ()
    x5c_fault: str | None = None

    @classmethod
    def read(
        cls,
        method: str,
        media_type: str,
        form: Mapping[str, str],
        *,
        member: str,
        authorization: bool = False,
    ) -> TokenRequest:
        """*member*: the name of the form's member that carries the JWS."""
        jws = Jws.read(form.get(member, ""))
        certificates, fault = _x5c(jws.header["x5c"]) if "x5c" in jws.header else ((), None)
        return cls(method, media_type, authorization, form, jws, certificates, fault)

    @property
    def leaf(self) -> x509.Certificate | None:
        """x5c[0]."""
        return self.certificates[0] if self.certificates else None

    @property
    def scopes(self) -> list[str]:
        """The scopes asked for (M69)."""
        scope = self.jws.claims.get("scope")
        return scope.split() if isinstance(scope, str) else []

    @property
    def consumer(self) -> str:
        """The organisation in a Maskinporten token, as Customs writes it into ``sub``."""
        consumer = self.jws.claims.get("consumer")
        found = str(consumer.get("ID", "")) if isinstance(consumer, dict) else ""
        return found.removeprefix("0192:")

    def number(self, claim: str, default: float) -> float:
        """*claim* as a number, wherever a lenient reader finds one."""
        found = self.jws.claims.get(claim, default)
        try:
            return float(found)
        except (TypeError, ValueError, OverflowError):
            return default


#: What cryptography raises for a certificate that it cannot read.
_UNREADABLE: Final = (
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def _x5c(found: object) -> tuple[tuple[x509.Certificate, ...], str | None]:
    """The certificates that can be read, and the first thing that a strict reader refuses."""
    fault = None
    entries = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found:
        fault = "shape: not a non-empty array of strings"
    certificates: list[x509.Certificate] = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, str):
            fault = fault or "shape: not a non-empty array of strings"
            continue
        try:
            der = base64.b64decode(entry, validate=True)
        except (binascii.Error, ValueError):
            fault = fault or "entry: not standard base64"
            der = _lenient(entry)
        try:
            certificate = x509.load_der_x509_certificate(der)
            # Parsed lazily by cryptography: raise here and not inside a rule.
            _ = certificate.extensions
            certificates.append(certificate)
        except _UNREADABLE:
            fault = fault or "entry: not DER of a certificate"
    return tuple(certificates), fault


def _lenient(entry: str) -> bytes:
    body = re.sub(r"-----[A-Z ]+-----|\s", "", entry).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body.rstrip("=") + "=" * (-len(body.rstrip("=")) % 4))
    except (binascii.Error, ValueError):
        return b""


def values(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str]:
    """The subject's values of *oid*, verbatim."""
    return [str(found.value) for found in certificate.subject.get_attributes_for_oid(oid)]


def org_no(certificate: x509.Certificate) -> str | None:
    """
    The Norwegian organisation number of a subject, 9 digits.

    Searched in the order of Digdir's public extractor (seid2lib): serialNumber, organizationName
    ending in `` - 123456789``, organizationIdentifier.
    """
    places = (
        (NameOID.SERIAL_NUMBER, r"(\d{9})"),
        (NameOID.ORGANIZATION_NAME, r".* - (\d{9})"),
        (NameOID.ORGANIZATION_IDENTIFIER, r"(?:NTRNO-|PSDNO-FSA-)?(\d{9})"),
    )
    for oid, pattern in places:
        for value in values(certificate, oid):
            if found := re.fullmatch(pattern, value):
                return found[1]
    return None


def policies(certificate: x509.Certificate) -> set[str]:
    """Certificate policies, dotted."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.CertificatePolicies).value
    except x509.ExtensionNotFound:
        return set()
    return {policy.policy_identifier.dotted_string for policy in found}


def qc_statements(certificate: x509.Certificate) -> set[str]:
    """
    The object identifiers inside QCStatements, dotted, QcType's values included.

    A walk over DER: only SEQUENCEs are entered, only OBJECT IDENTIFIERs are kept.
    """
    try:
        found = certificate.extensions.get_extension_for_oid(_QC).value
    except x509.ExtensionNotFound:
        return set()
    return set(_oids(found.value)) if isinstance(found, x509.UnrecognizedExtension) else set()


def _oids(data: bytes) -> list[str]:
    found: list[str] = []
    while len(data) >= 2:
        tag, length, head = data[0], data[1], 2
        if length & 0x80:
            head += length & 0x7F
            length = int.from_bytes(data[2:head])
        body, data = data[head : head + length], data[head + length :]
        if tag == 0x30:
            found += _oids(body)
        elif tag == 0x06:
            found.append(_dotted(body))
    return found


def _dotted(body: bytes) -> str:
    arcs, value = [], 0
    for byte in body:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2) if arcs else 0
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:]))) if arcs else ""


def rsa_key(certificate: x509.Certificate) -> rsa.RSAPublicKey | None:
    """The certificate's key, if it is an RSA key."""
    try:
        key = certificate.public_key()
    except ValueError:
        return None
    return key if isinstance(key, rsa.RSAPublicKey) else None


@dataclass(frozen=True, slots=True)
class Route:
    """
    The endpoint of a call. *mode* is the transport mode, *refs* the parameters in the path; an
    empty *scope* means any scope.
    """

    kind: str
    scope: str
    mode: str = ""
    level: str = ""
    refs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a Customs API. *claims* are those of a Customs token that verified."""

    method: str
    path: str
    media_type: str
    body: bytes
    query: Mapping[str, str]
    claims: Mapping[str, Any] | None
    bearer: str
    route: Route | None
    other_base: bool = False

    @property
    def org(self) -> str:
        """The organisation of the token."""
        return str((self.claims or {}).get("sub", ""))

    def message(self) -> dict[str, Any] | None:
        """The body as a JSON object, if it is one."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def mrn(self) -> str | None:
        """
        The MRN of what is changed: in the path; of a relation also in the message, where the guide
        leaves it open (beskrivelse-av-koblings-api-EN).
        """
        if self.route is None:
            return None
        if self.route.refs:
            return self.route.refs[0]
        given = (self.message() or {}).get("mrn") if self.route.kind == "change" else None
        return given if isinstance(given, str) else None


_LEVEL = r"(?P<level>transport|master-consignment|house-consignment)"
_MODE = r"(?P<mode>road|air|rail|maritime)"
_VERSION = r"(?P<version>v\d)"
_BASE = rf"/api/movement/{_MODE}/{_VERSION}"
_QUERY = rf"/api/movement/{_MODE}/status/{_VERSION}"
_ENTRY: Final = "movement/entry"
#: The paths below this base are documented in Swagger only; those of similar APIs are assumed.
_ARRIVAL = r"/api/movement/arrival/v1"
_SSNN = r"/api/movement/(?P<mode>maritime-ssnn)"
_SSNN_LEVEL = r"(?P<level>transport|declaration-of-goods|relationship)"

_ROUTES: Final = tuple(
    (method, re.compile(pattern), kind)
    for method, pattern, kind in (
        ("GET", rf"{_BASE}/test-auth", "test-auth"),
        ("POST", rf"{_BASE}/{_LEVEL}", "submit"),
        ("PUT", rf"{_BASE}/{_LEVEL}/(?P<a>[^/]+)", "change"),
        ("DELETE", rf"{_BASE}/{_LEVEL}/(?P<a>[^/]+)", "change"),
        ("POST", rf"{_BASE}/(?P<level>relation)", "relation"),
        ("DELETE", rf"{_BASE}/(?P<level>relation)(?:/(?P<a>[^/]+))?", "change"),
        (
            "GET",
            (
                rf"{_QUERY}/(?P<level>transport|master-consignment|house-consignment|relation)"
                r"/validation-status/(?P<a>[^/]+)"
            ),
            "validation-status",
        ),
        ("GET", rf"{_QUERY}/{_LEVEL}/(?P<a>[^/]+)/status-with-descendants", "descendants"),
        (
            "GET",
            (
                rf"{_QUERY}/{_LEVEL}/(?P<a>[^/]+)(?:/(?P<b>(?:master|house)-consignment))?"
                r"/transport-document/status"
            ),
            "documents",
        ),
        ("GET", rf"{_QUERY}/{_LEVEL}/transport-document/status", "document"),
        (
            "GET",
            (
                rf"{_QUERY}/(?P<level>house-consignment)/postal-receptacle/(?P<a>[^/]+)"
                r"/transport-document/status"
            ),
            "receptacle",
        ),
        ("GET", rf"{_QUERY}/entry/status/(?P<a>[^/]+)", "entry"),
        (
            "POST",
            (
                r"/api/movement/presentation/v1/(?P<level>house-consignment|master-consignment"
                r"|container|receptacle|entry-summary-declaration)"
            ),
            "present",
        ),
        ("GET", r"/api/movement/presentation/v1/validation-status", "presentations"),
        (
            "GET",
            r"/api/movement/routing/v1/(?P<level>house-consignment|transport)",
            "routing",
        ),
        ("POST", rf"{_ARRIVAL}(?:/arrival)?", "arrive"),
        ("GET", rf"{_ARRIVAL}(?:/arrival)?/validation-status/(?P<a>[^/]+)", "validation-status"),
        ("GET", rf"{_ARRIVAL}/entry/status/(?P<a>[^/]+)", "entry"),
        ("POST", rf"{_SSNN}/v1/{_SSNN_LEVEL}", "submit"),
        ("PUT", rf"{_SSNN}/v1/{_SSNN_LEVEL}/(?P<a>[^/]+)", "change"),
        (
            "DELETE",
            rf"{_SSNN}/v1/(?P<level>transport|declaration-of-goods)/(?P<a>[^/]+)",
            "change",
        ),
        (
            "GET",
            rf"{_SSNN}/status/v1/{_SSNN_LEVEL}/validation-status/(?P<a>[^/]+)",
            "validation-status",
        ),
        (
            "POST",
            r"/api/goodsdeclaration/document/v2/declaration-id/(?P<a>[^/]+)/document",
            "upload",
        ),
    )
)


def route(method: str, path: str) -> Route | None:
    """The route of a call to an API, None where Customs has none."""
    for wanted, pattern, kind in _ROUTES:
        if wanted == method and (found := pattern.fullmatch(path)):
            parts = found.groupdict()
            mode = parts.get("mode") or ""
            version = parts.get("version")
            if version and version != ("v2" if mode == "road" else "v1"):
                return None
            refs = tuple(parts[name] for name in ("a", "b") if parts.get(name))
            return Route(kind, _scope(path, kind, mode), mode, parts.get("level") or "", refs)
    return None


def _scope(path: str, kind: str, mode: str) -> str:
    if mode:
        named = {"road": "movement/road/v2", "maritime-ssnn": "movement/maritimessnn"}
        return named.get(mode, f"movement/{mode}")
    if path.startswith(_ARRIVAL):
        # The guide names no scope: the token of any API is accepted.
        return ""
    return "goodsdeclaration/document.write" if kind == "upload" else _ENTRY
