"""Signing inputs: a device signs grants and nothing else, so tests of signatures need some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hsmtoll.signing.grant import Grant
from hsmtoll.token import TokenRequest

if TYPE_CHECKING:
    from hsmtoll.jws import SigningInput

AUDIENCE: Final = "https://test.maskinporten.no/"

#: The same for a program of its own, which imports nothing of the tests.
DEFINED: Final = """
from hsmtoll.signing.grant import Grant
from hsmtoll.token import TokenRequest
def a_grant(jti="one", audience="https://test.maskinporten.no/"):
    request = TokenRequest(scope="toll:eu/movement/road/v2")
    return Grant("RS256", "Example", audience, request, kid="k").unsigned(now=1, jti=jti)
"""


def a_grant(
    alg: str = "RS256", *, jti: str = "one", audience: str = AUDIENCE, size: int = 0
) -> SigningInput:
    """A grant of one key and second that differs from others by *jti*, of *size* bytes or more."""
    request = TokenRequest(scope="toll:eu/movement/road/v2")
    grant = Grant(alg, "Example", audience, request, kid="k" * max(size, 1))
    return grant.unsigned(now=1_800_000_000, jti=jti)
