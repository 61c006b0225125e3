"""
Maskinporten: the certificates of a grant, and its signature.
"""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtensionOID, NameOID

from hsmtoll.sandbox import facts, jose, sources
from hsmtoll.sandbox.rule import CLIENT_FAILED, Rules

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import rsa

    from hsmtoll.sandbox.facts import TokenRequest
    from hsmtoll.sandbox.rule import RuleContext

__all__ = ["RULES"]

RULES: Final = Rules()
#: Environment → regular expression of the policies that Digdir's validator accepts (M36).
_POLICIES: Final = {
    "prod": r"2\.16\.578\.1\.26\.1\.3\.[25]|2\.16\.578\.1\.29\.13\.(2[01]0|2[012]0\..+|1\.1\.0)"
    r"|2\.16\.578\.1\.29\.13\.1",
    "test": r"2\.16\.578\.1\.26\.1\.(3\.[25]|0\.3\.2)|2\.16\.578\.1\.29\.913\.(2[012]0\..+|1\.1\.0)"
    r"|2\.16\.578\.1\.29\.13\.1\.1\.0|2\.16\.578\.1\.1\.1\.1\.100",
}
_QC_COMPLIANCE: Final = "0.4.0.1862.1.1"
_QC_TYPE: Final = "0.4.0.1862.1.6."


# --- the certificates -----------------------------------------------------------------------

_BAD_CERTIFICATE: Final = f"{CLIENT_FAILED} The JWT is signed with an invalid certificate."


@RULES.checked_by(
    "M33", "the key of x5c[0] is RSA, 2048 bits or more", "I", "RFC 7518 section 3.3", code="MP-120"
)
def _m33(request: TokenRequest, _: RuleContext) -> str | None:
    if request.leaf is None:
        return None
    key = facts.rsa_key(request.leaf)
    return None if key and key.key_size >= 2048 else _bad("key")


@RULES.checked_by(
    "M34", "x5c[0] is neither self-signed nor a CA", "O", sources.VALIDATOR, code="MP-120"
)
def _m34(request: TokenRequest, _: RuleContext) -> str | None:
    leaf = request.leaf
    if leaf is None:
        return None
    return _bad("leaf") if _self_signed(leaf) or _is_ca(leaf) else None


@RULES.checked_by(
    "M26", "each certificate is signed by the next", "D/I", "RFC 7515 section 4.1.6", code="MP-120"
)
def _m26(request: TokenRequest, _: RuleContext) -> str | None:
    chain = request.certificates
    pairs = itertools.pairwise(chain)
    return None if all(_issued(lower, upper) for lower, upper in pairs) else _bad("order")


@RULES.checked_by(
    "M27",
    "an eSeal's chain reaches an anchor from the supplied certificates alone",
    "D/I",
    sources.ESEALS,
    sources.INTEGRATION,
    code="MP-120",
)
def _m27(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or context.norwegian(request):
        return None
    return None if _complete(request, context) else _bad("chain")


@RULES.checked_by(
    "M28",
    "a Norwegian leaf or chain is issued by a known CA",
    "O/D",
    sources.INTEGRATION,
    sources.GRANT,
    code="MP-120",
)
def _m28(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or not context.norwegian(request) or _complete(request, context):
        return None
    known = [anchor.certificate for anchor in context.state.anchors] + context.state.pinned
    # Customs' guide documents the certificate alone, Digdir's page the whole chain.
    if any(_issued(request.certificates[-1], ca) for ca in known):
        return None
    return _bad("chain")


@RULES.checked_by(
    "M29", "every certificate is within its validity", "D", sources.ERRORS, code="MP-120"
)
def _m29(request: TokenRequest, context: RuleContext) -> str | None:
    now = datetime.fromtimestamp(context.now, UTC)
    valid = all(
        cert.not_valid_before_utc <= now <= cert.not_valid_after_utc
        for cert in request.certificates
    )
    return None if valid else _bad("validity")


@RULES.checked_by(
    "M30", "no certificate is revoked", "O/I", sources.ERRORS, sources.VALIDATOR, code="MP-120"
)
def _m30(request: TokenRequest, context: RuleContext) -> str | None:
    revoked = any(cert.serial_number in context.state.revoked for cert in request.certificates)
    return _bad("revoked") if revoked else None


@RULES.checked_by(
    "M31", "a Norwegian certificate belongs to this environment", "D", sources.GRANT, code="MP-120"
)
def _m31(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or not context.norwegian(request):
        return None
    found, here = facts.policies(request.leaf), context.settings.environment
    other = "prod" if here == "test" else "test"
    if not _accepted(found, here) and _accepted(found, other):
        return _bad("environment")
    anchors = [a for a in context.state.anchors if a.certificate in request.certificates]
    wrong = [a for a in anchors if a.environment not in (None, here)]
    return _bad("environment") if wrong else None


@RULES.checked_by(
    "M32", "the chain ends at an anchor on the trust list", "D", sources.ESEALS, code="MP-120"
)
def _m32(request: TokenRequest, context: RuleContext) -> str | None:
    chain = request.certificates
    if not chain or not _self_signed(chain[-1]) or len(chain) == 1:
        return None
    trusted = [anchor.certificate for anchor in context.state.anchors]
    return None if any(cert in trusted for cert in chain[1:]) else _bad("anchor")


@RULES.checked_by(
    "M35",
    "a Norwegian leaf has no critical extension but keyUsage and basicConstraints",
    "O",
    sources.VALIDATOR,
    code="MP-120",
)
def _m35(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or not context.norwegian(request):
        return None
    known = {ExtensionOID.KEY_USAGE, ExtensionOID.BASIC_CONSTRAINTS}
    odd = [one for one in request.leaf.extensions if one.critical and one.oid not in known]
    return _bad("extension") if odd else None


@RULES.checked_by(
    "M36", "a Norwegian leaf has an accepted policy", "O", sources.VALIDATOR, code="MP-120"
)
def _m36(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or not context.norwegian(request):
        return None
    found = facts.policies(request.leaf)
    accepted = any(_accepted(found, environment) for environment in _POLICIES)
    return None if accepted else _bad("policy")


@RULES.checked_by(
    "M74", "an eSeal's subject has an organizationIdentifier", "D/I", sources.ESEALS, code="MP-120"
)
def _m74(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or context.norwegian(request):
        return None
    found = facts.values(request.leaf, NameOID.ORGANIZATION_IDENTIFIER)
    return None if found else _bad("organizationIdentifier")


@RULES.checked_by(
    "M75",
    "an eSeal's subject has one organizationIdentifier",
    "I",
    sources.ETSI + "31941203/",
    code="MP-120",
)
def _m75(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or context.norwegian(request):
        return None
    found = facts.values(request.leaf, NameOID.ORGANIZATION_IDENTIFIER)
    return _bad("organizationIdentifier") if len(found) > 1 else None


@RULES.checked_by(
    "B1",
    "the leaf's keyUsage permits signatures (a switch: not documented)",
    "I",
    sources.ORDER_NORWEGIAN,
    code="MP-120",
)
def _b1(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or not context.settings.key_usage_enforced:
        return None
    try:
        usage = request.leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return _bad("keyUsage")
    seal = usage.content_commitment and not context.norwegian(request)
    return None if usage.digital_signature or seal else _bad("keyUsage")


@RULES.checked_by(
    "B4",
    "the QcType of a qualified certificate is that of seals",
    "I",
    sources.ETSI + "31941205/",
    code="MP-120",
)
def _b4(request: TokenRequest, context: RuleContext) -> str | None:
    if request.leaf is None or context.norwegian(request):
        return None
    found = facts.qc_statements(request.leaf)
    wrong = _QC_COMPLIANCE in found and {f"{_QC_TYPE}1", f"{_QC_TYPE}3"} & found
    return _bad("QcType") if wrong else None


@RULES.checked_by(
    "M62", "the certificate's organisation owns the client", "D", sources.ERRORS, code="MP-122"
)
def _m62(request: TokenRequest, context: RuleContext) -> str | None:
    client = context.client(request)
    if request.leaf is None or client is None or facts.org_no(request.leaf) == client.org_no:
        return None
    return "Invalid JWT. Invalid organization number for client. Does not match certificate orgno"


@RULES.checked_by(
    "M25",
    "the signature verifies with the key of x5c[0], or of kid",
    "D",
    sources.ERRORS,
    code="MP-124",
)
def _m25(request: TokenRequest, context: RuleContext) -> str | None:
    key = signing_key(request, context)
    alg = request.jws.header.get("alg")
    if key is None or not isinstance(alg, str) or alg not in jose.HASHES:
        return None
    if jose.verified(alg, key, request.jws.data, request.jws.signature):
        return None
    return f"{CLIENT_FAILED} Invalid JWT signature"


def signing_key(request: TokenRequest, context: RuleContext) -> rsa.RSAPublicKey | None:
    """The key that must have signed."""
    kid, client = request.jws.header.get("kid"), context.client(request)
    if client and isinstance(kid, str) and kid in client.keys:
        return client.keys[kid][0]
    return facts.rsa_key(request.leaf) if request.leaf else None


def _bad(why: str) -> str:
    # The part in brackets is the sandbox's own; the real service gives no reason.
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


def _complete(request: TokenRequest, context: RuleContext) -> bool:
    """The supplied certificates end in a root, at an anchor, or just below one."""
    chain = request.certificates
    if len(chain) == 1 and not _self_signed(chain[0]):
        return False
    if _self_signed(chain[-1]):
        return True
    if context.settings.root_in_x5c:
        return False
    trusted = [anchor.certificate for anchor in context.state.anchors]
    return chain[-1] in trusted or any(_issued(chain[-1], anchor) for anchor in trusted)


def _accepted(found: set[str], environment: str) -> bool:
    return any(re.fullmatch(_POLICIES[environment], policy) for policy in found)
