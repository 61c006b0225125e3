"""
What Maskinporten wants in a JWT grant (RFC 7523; PROTOCOL A.4, A.5): header, claims, limits.

Signing and sending never enter; neither does a clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import jws
from hsmtoll.errors import ConfigurationError

if TYPE_CHECKING:
    from hsmtoll.tokens import TokenRequest

__all__ = ["LIFETIME", "MIN_LEFT", "Grant"]

#: Seconds from iat to exp: the documented maximum (M54), so that a slow device has it all.
LIFETIME: Final = 120

#: A grant with fewer seconds left is not sent (PROTOCOL C05).
MIN_LEFT: Final = 30

_ORGNO = re.compile(r"\d{9}")


@dataclass(frozen=True)
class Grant:
    """
    A grant that is right by construction; only time, jti and signature are missing.

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
        """Exactly ``alg`` and one of ``kid`` and ``x5c``; no ``typ`` (PROTOCOL C03)."""
        named: dict[str, Any] = {"kid": self.kid} if self.kid else {"x5c": list(self.x5c)}
        return {"alg": self.alg, **named}

    @cached_property
    def _header_segment(self) -> bytes:
        # Kilobytes of certificates that are the same from grant to grant.
        return jws.segment(self.header)

    def unsigned(self, *, now: float, jti: str) -> jws.SigningInput:
        """
        The signing input of one attempt.

        *now* is Maskinporten's time as far as known, in seconds since the epoch, taken
        after the device was unlocked. *jti* is used once: a second use is a replay (MP-012).
        """
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
        return jws.signing_input(self._header_segment, claims)
