"""
Header, claims and limits of a JWT grant for Maskinporten (RFC 7523).

It neither signs nor sends, and reads no clock.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import jws
from hsmtoll.errors import ConfigurationError, HsmTollError
from hsmtoll.token import TokenRequest, details_text
from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["LIFETIME", "MIN_LEFT", "Grant", "ParsedGrant", "SignedGrant", "read_grant"]

#: Seconds from iat to exp: the documented maximum (M54), for slow devices.
LIFETIME: Final = 120

#: A grant with fewer seconds left is not sent.
MIN_LEFT: Final = 30

_ORGNO = re.compile(r"\d{9}")


@dataclass(frozen=True, slots=True)
class Grant:
    """
    A grant without time, jti and signature, validated on construction.

    *audience* is the issuer byte for byte (M51). Exactly one of *kid* and *x5c* is set
    (M21, M22); x5c is standard base64 of DER, leaf first (RFC 7515 section 4.1.6).
    """

    alg: str
    issuer: str
    audience: str
    request: TokenRequest
    kid: str | None = None
    x5c: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.alg not in jws.ALGS:
            raise ConfigurationError(f"alg {self.alg}: Maskinporten takes {', '.join(jws.ALGS)}")
        if bool(self.kid) == bool(self.x5c):
            raise ConfigurationError("a grant carries either a kid or certificates (M21, M22)")
        if not self.issuer:
            raise ConfigurationError("a grant needs a value for iss (HSMTOLL_ISS)")
        org = self.request.consumer_org
        if org is not None and not _ORGNO.fullmatch(org):
            raise ConfigurationError("HSMTOLL_CONSUMER_ORG: nine digits are expected")

    @property
    def header(self) -> dict[str, Any]:
        """Exactly ``alg`` and one of ``kid`` and ``x5c``; no ``typ``."""
        return _header(self.alg, self.kid, self.x5c)

    def unsigned(self, *, now: float, jti: str) -> jws.SigningInput:
        """
        The signing input of one attempt.

        *now* is Maskinporten's time as far as known, in seconds since the epoch, taken
        after the device was unlocked. *jti* is used once: a second use is a replay (MP-012).
        """
        header = _header_segment(self.alg, self.kid, self.x5c)
        unsigned = jws.signing_input(header, self.claims(now=now, jti=jti))
        return jws.SigningInput(unsigned)

    def claims(self, *, now: float, jti: str) -> dict[str, Any]:
        """The claims of `unsigned`."""
        iat = int(now)
        claims: dict[str, Any] = {
            "aud": self.audience,
            "iss": self.issuer,
            "scope": self.request.scope,
            "iat": iat,
            "exp": iat + LIFETIME,
            "jti": jti,
        }
        if self.request.resource:
            claims["resource"] = list(self.request.resource)
        if self.request.consumer_org:
            claims["consumer_org"] = self.request.consumer_org
        if self.request.authorization_details:
            claims["authorization_details"] = self.request.details
        return claims


def _header(alg: str, kid: str | None, x5c: tuple[str, ...]) -> dict[str, Any]:
    return {"alg": alg, **({"kid": kid} if kid else {"x5c": list(x5c)})}


# Kilobytes of certificates that are the same from grant to grant. No cached_property: that of
# Python 3.11 has a lock, and a child that is forked while another thread holds it waits for ever.
@lru_cache(maxsize=8)
def _header_segment(alg: str, kid: str | None, x5c: tuple[str, ...]) -> bytes:
    return jws.segment(_header(alg, kid, x5c))


@dataclass(frozen=True, slots=True)
class SignedGrant:
    """
    A signed grant: the *assertion* (compact JWS) and its properties.

    *issued_at* (iat) and *expires_at* (exp) are epoch seconds by Maskinporten's clock. *identity*
    is the SHA-256 (hex) of the leaf, or with a kid of the public key. *not_after* is the end of the
    leaf's validity; None with a kid.
    """

    assertion: str = field(repr=False)
    jti: str
    scope: str
    issued_at: int
    expires_at: int
    identity: str
    not_after: datetime | None


@dataclass(frozen=True, slots=True)
class ParsedGrant:
    """A parsed grant: *iat* in epoch seconds, *leaf* the first certificate of x5c."""

    grant: Grant
    iat: int
    jti: str
    leaf: Certificate | None


def read_grant(alg: str, unsigned: bytes) -> ParsedGrant:
    """
    Parse a signing input that is to be signed with *alg*. ValueError, whose text contains no value
    of the grant, unless it equals byte for byte the output of `Grant.unsigned`: input that two
    parsers could read differently is refused.
    """
    first, _, second = unsigned.partition(b".")
    kid, x5c, leaf = _read_header(alg, first)
    claims = jws.read_segment(second.decode("ascii", "replace"), "payload")
    scope, org, iat, jti, issuer, audience = (
        claims.get(name) for name in ("scope", "consumer_org", "iat", "jti", "iss", "aud")
    )
    texts = (scope, jti, issuer, audience, "" if org is None else org)
    resource = claims.get("resource", [])
    if not (
        all(isinstance(each, str) for each in texts)
        and type(iat) is int
        and isinstance(resource, list)
        and all(isinstance(each, str) for each in resource)
        and jti
        and audience
    ):
        raise ValueError("a claim of a grant is missing, or of another type")
    try:
        details = details_text(claims.get("authorization_details"))
        request = TokenRequest(str(scope), tuple(resource), org, details)
        grant = Grant(alg, str(issuer), str(audience), request, kid=kid, x5c=x5c)
    except HsmTollError as exc:
        raise ValueError(str(exc)) from None
    if jws.segment(grant.claims(now=iat, jti=str(jti))) != second:
        raise ValueError("the claims are not those of a grant")
    return ParsedGrant(grant, iat, str(jti), leaf)


@lru_cache(maxsize=8)
def _read_header(alg: str, first: bytes) -> tuple[str | None, tuple[str, ...], Certificate | None]:
    """kid, x5c and its leaf. Cached, because the header is the same for each grant."""
    header = jws.read_segment(first.decode("ascii", "replace"), "header")
    kid, x5c = header.get("kid"), header.get("x5c")
    named = {"kid": kid} if x5c is None else {"x5c": x5c}
    if jws.segment({"alg": alg, **named}) != first:
        raise ValueError("the header is not that of a grant")
    if x5c is None:
        if not isinstance(kid, str) or not kid:
            raise ValueError("the header's kid is no text")
        return kid, (), None
    if not isinstance(x5c, list) or not x5c or not all(isinstance(each, str) for each in x5c):
        raise ValueError("the header's x5c is no list of certificates")
    try:
        leaf = Certificate.load(base64.b64decode(x5c[0], validate=True))
    except ValueError:
        raise ValueError("the first certificate of x5c cannot be read") from None
    return None, tuple(x5c), leaf
