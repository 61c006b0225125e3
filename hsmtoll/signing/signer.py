"""
The interface of what signs grants: `hsmtoll.signing.local`, with a device of this machine;
`hsmtoll.signing.failover`, with the first usable one of several; `hsmtoll.signing.remote`, with a
signing host; `hsmtoll.signing.one_time`, a grant that was signed before.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hsmtoll.signing.grant import SignedGrant
    from hsmtoll.token import TokenRequest

__all__ = ["Signer", "new_jti"]


def new_jti() -> str:
    """A value for jti that no grant has had: 128 random bits, as 32 hexadecimal digits."""
    return os.urandom(16).hex()


class Signer(Protocol):
    """Makes signed grants, with a key here or elsewhere."""

    def known_identity(self) -> str | None:
        """`SignedGrant.identity` of the next grant, as far as it is known without any I/O."""

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """One grant for *request*: a new signature each time."""

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """
        Called when Maskinporten rejected the certificate of *grant* with *code*. Returns whether a
        new grant may be accepted.
        """
