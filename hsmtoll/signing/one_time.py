"""
A Signer with one grant that was signed before, perhaps on another machine.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hsmtoll import jws
from hsmtoll.errors import ConfigurationError, GrantRefused, UsageError, sanitized
from hsmtoll.signing.grant import SignedGrant

if TYPE_CHECKING:
    from hsmtoll.token import TokenRequest

__all__ = ["OneTimeAssertion"]


class OneTimeAssertion:
    """
    A grant that was signed elsewhere and read from stdin; it can be used once.

    UsageError if it is not an assertion. ConfigurationError (``audience``) if it is for another
    environment: it would be refused, but disclosed to that server.
    """

    def __init__(self, assertion: str, *, audience: str) -> None:
        try:
            _, claims = jws.read_unverified(assertion)
        except ValueError as exc:
            raise UsageError(
                f"assertion on stdin: {exc}", hint="it is what `hsmtoll sign` prints"
            ) from None
        if claims.get("aud") != audience:
            raise ConfigurationError(
                f"assertion on stdin: made for {sanitized(claims.get('aud'))}, not for {audience}",
                hint="sign and exchange with the same HSMTOLL_ENVIRONMENT",
                code="audience",
            )
        jti, iat, exp = (claims.get(name) for name in ("jti", "iat", "exp"))
        self.scope = str(claims.get("scope", ""))
        self._lock = threading.Lock()
        self._grant: SignedGrant | None = SignedGrant(
            assertion,
            jti=jti if isinstance(jti, str) else "",
            scope=self.scope,
            issued_at=iat if isinstance(iat, int) else 0,
            expires_at=exp if isinstance(exp, int) else 0,
            identity="",
            not_after=None,
        )

    def known_identity(self) -> None:
        """None, so that its token is not cached."""

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """The grant, the first time; GrantRefused (MP-012) after that."""
        del request, jti
        with self._lock:
            grant, self._grant = self._grant, None
        if grant is None:
            raise GrantRefused(
                "assertion on stdin: it was used, and a grant works once (MP-012)",
                hint="sign another one",
                code="MP-012",
            )
        return grant

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """False: there is no other grant."""
        del grant, code
        return False
