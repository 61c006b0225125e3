"""A grant holds what Maskinporten documents, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from hsmtoll import jws
from hsmtoll.errors import ConfigurationError
from hsmtoll.signing.grant import Grant
from hsmtoll.token import TokenRequest

ISSUER = "https://test.maskinporten.no/"


def grant(**changes: Any) -> Grant:
    request = changes.pop("request", TokenRequest("toll:eu/movement/road/v2"))
    given: dict[str, Any] = {
        "alg": "RS256",
        "issuer": "Eksempel AB",
        "audience": ISSUER,
        "request": request,
        "x5c": ("AA==", "BB=="),
    }
    return Grant(**{**given, **changes})


def read(made: Grant, *, now: float = 1_790_000_000.9) -> tuple[dict[str, Any], dict[str, Any]]:
    return jws.read_unverified(jws.compact(made.unsigned(now=now, jti="j1"), b"s"))


def test_the_claims_are_exactly_the_documented_ones() -> None:
    header, claims = read(grant())

    assert header == {"alg": "RS256", "x5c": ["AA==", "BB=="]}
    assert claims == {
        "aud": ISSUER,
        "iss": "Eksempel AB",
        "scope": "toll:eu/movement/road/v2",
        "iat": 1_790_000_000,
        "exp": 1_790_000_120,
        "jti": "j1",
    }


def test_a_kid_goes_without_certificates() -> None:
    header, _ = read(grant(kid="k1", x5c=()))

    assert header == {"alg": "RS256", "kid": "k1"}


@pytest.mark.parametrize("changes", [{"kid": "k1"}, {"x5c": ()}])
def test_both_or_neither_of_kid_and_certificates_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        grant(**changes)


def test_options_are_added_as_documented() -> None:
    request = TokenRequest("toll:movement/air", resource=("https://r/",), consumer_org="987654321")
    _, claims = read(grant(request=request))

    assert claims["resource"] == ["https://r/"]
    assert claims["consumer_org"] == "987654321"


@pytest.mark.parametrize("org", ["12345678", "1234567890", "NO987654321", ""])
def test_a_consumer_that_is_no_organisation_number_is_refused(org: str) -> None:
    with pytest.raises(ConfigurationError, match="HSMTOLL_CONSUMER_ORG"):
        grant(request=TokenRequest("toll:movement/air", consumer_org=org))


@pytest.mark.parametrize("alg", ["PS256", "ES256", "HS256", "none"])
def test_an_algorithm_that_maskinporten_does_not_take_is_refused(alg: str) -> None:
    with pytest.raises(ConfigurationError, match="RS256"):
        grant(alg=alg)


def test_two_attempts_differ() -> None:
    made = grant()

    assert made.unsigned(now=1, jti="a") != made.unsigned(now=1, jti="b")
