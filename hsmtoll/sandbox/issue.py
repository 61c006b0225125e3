"""
The tokens that the sandbox issues for Maskinporten and for Customs when no rule refuses.
"""

from __future__ import annotations

import json
import secrets
import uuid
from typing import TYPE_CHECKING, Any, Final

from cryptography.x509.oid import NameOID

from hsmtoll.sandbox import facts
from hsmtoll.sandbox.customs_rules import INTERNAL

if TYPE_CHECKING:
    from hsmtoll.sandbox.facts import TokenRequest
    from hsmtoll.sandbox.rule import RuleContext

__all__ = ["access_claims", "customs_claims", "grant_answer"]

_NAMES: Final = {
    "commonName": NameOID.COMMON_NAME,
    "organizationName": NameOID.ORGANIZATION_NAME,
    "organizationalUnitName": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "countryName": NameOID.COUNTRY_NAME,
}
_QUALIFIED: Final = {"0.4.0.1862.1.1", "0.4.0.1862.1.6.2"}
_CUSTOMS_ISSUER: Final = "/api/authentication/external-access-control/v1"


def access_claims(request: TokenRequest, context: RuleContext) -> dict[str, Any]:
    """The claims of an access token (M80 to M88)."""
    now = int(context.now)
    asked = request.jws.claims
    claims: dict[str, Any] = {
        "scope": " ".join(request.scopes),
        "iss": context.issuer,
        "token_type": "Bearer",
        "exp": now + _lifetime(request, context),
        "iat": now,
        "jti": secrets.token_urlsafe(32),
    }
    claims |= (
        _norwegian(request, context) if context.norwegian(request) else _eseal(request, context)
    )
    consumer = asked.get("consumer_org")
    if consumer is not None:
        claims["supplier"] = claims["consumer"]
        claims["consumer"] = {"authority": "iso6523-actorid-upis", "ID": f"0192:{consumer}"}
        claims["delegation_source"] = "https://www.altinn.no"
    resource = asked.get("resource")
    if resource:
        single = resource[0] if isinstance(resource, list) and len(resource) == 1 else resource
        claims["aud"] = single
    if "pid" in asked:
        claims["pid"] = asked["pid"]
    if "authorization_details" in asked:
        claims["authorization_details"] = [_detail(one) for one in asked["authorization_details"]]
    if not context.on("M84"):
        claims |= {"sub": "-", "nbf": now}
    return claims


def _detail(asked: dict[str, Any]) -> dict[str, Any]:
    """One of authorization_details, with the system user that Maskinporten found for it."""
    if asked.get("type") != "urn:altinn:systemuser":
        return asked
    known = json.dumps(asked, sort_keys=True)
    user = str(uuid.uuid5(uuid.NAMESPACE_URL, known))
    return {**asked, "systemuser_id": [user], "system_id": "987654321_hsmtoll_sandbox"}


def _lifetime(request: TokenRequest, context: RuleContext) -> int:
    settings = context.settings
    if not context.on("M82"):
        return 300
    return min(settings.lifetimes.get(scope, settings.lifetime) for scope in request.scopes or [""])


def _norwegian(request: TokenRequest, context: RuleContext) -> dict[str, Any]:
    kid = "kid" in request.jws.header
    prefix = "0192:" if context.on("M85") else ""
    return {
        "client_id": str(request.jws.claims.get("iss", "")),
        "client_amr": "private_key_jwt" if kid else "virksomhetssertifikat",
        "consumer": {
            "authority": "iso6523-actorid-upis",
            "ID": f"{prefix}{context.organisation(request)}",
        },
    }


def _eseal(request: TokenRequest, context: RuleContext) -> dict[str, Any]:
    leaf = request.leaf
    if leaf is None:
        return {}
    found = {name: facts.values(leaf, oid) for name, oid in _NAMES.items()}
    consumer = {name: values[0] for name, values in found.items() if values}
    consumer["authority"] = (
        context.settings.eseal_authority if context.on("M88") else "iso6523-actorid-upis"
    )
    verbatim = context.organisation(request)
    consumer["ID"] = verbatim if context.on("M86") else verbatim.upper().replace(" ", "")
    qualified = facts.qc_statements(leaf) >= _QUALIFIED
    serial = f"{leaf.serial_number:x}"
    return {
        "client_id": f"eidas-{serial}" if context.on("M87") else serial,
        "client_amr": "QCForESeal" if qualified else "CForESeal",
        "consumer": consumer,
    }


def grant_answer(token: str, claims: dict[str, Any], context: RuleContext) -> dict[str, Any]:
    """The body of a 200 from /token."""
    life = claims["exp"] - claims["iat"] - (1 if context.on("M81") else 0)
    answer = {
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": life,
        "scope": claims["scope"],
    }
    return answer if context.on("M80") else answer | {"refresh_token": "none"}


def customs_claims(request: TokenRequest, context: RuleContext, host: str) -> dict[str, Any]:
    """The claims of a Customs token (T07, T08). ``sub`` of an eSeal is the raw identifier."""
    bare = [scope.removeprefix("toll:").removeprefix("eu/") for scope in request.scopes]
    names = [INTERNAL[scope] for scope in bare if scope in INTERNAL]
    exp = int(request.number("exp", context.now))
    # What Customs does with a system user is not documented: it is passed on, for tests to see.
    details = request.jws.claims.get("authorization_details")
    return {
        **({"authorization_details": details} if details else {}),
        "sub": request.consumer,
        "iat": int(context.now),
        "exp": exp if context.on("T07") else exp + 100,
        "iss": f"{host}{_CUSTOMS_ISSUER}",
        "scope": " ".join(names),
    }
