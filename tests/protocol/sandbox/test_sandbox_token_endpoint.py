"""The sandbox's Maskinporten on the wire, judged by joserfc and cryptography."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc import jwt
from joserfc.jwk import KeySet

from tests.kit.rule_cases import ROAD, TokenRequestParts, by_key, certificate, eseal, leaf
from tests.kit.sandbox_requests import Wire, wire

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def sandbox_wire() -> Iterator[Wire]:
    with wire(
        signing_bits=4096, lifetimes={"toll:eu/movement/air": 7200, "digdir:verksemd.eu": 120}
    ) as found:
        yield found


def opened(found: Wire, token: str) -> Any:
    keys = KeySet.import_key_set(found.http.get(f"{found.sandbox.issuer}jwk").json())
    return jwt.decode(token, keys, algorithms=["RS256"])


def test_the_metadata_names_an_issuer_with_a_slash(sandbox_wire: Wire) -> None:
    where = f"{sandbox_wire.sandbox.issuer}.well-known/oauth-authorization-server"
    found = sandbox_wire.http.get(where).json()
    assert found["issuer"] == sandbox_wire.sandbox.issuer
    assert found["issuer"].endswith("/")
    assert found["token_endpoint"] == sandbox_wire.sandbox.token_endpoint
    assert len(found) == 7
    assert sandbox_wire.http.get(f"{sandbox_wire.sandbox.issuer}health").status_code == 200
    assert sandbox_wire.http.get(f"{sandbox_wire.sandbox.issuer}nothing").status_code == 404


def test_the_published_key_has_4096_bits_and_its_certificate_holds_the_same(
    sandbox_wire: Wire,
) -> None:
    (key,) = sandbox_wire.http.get(f"{sandbox_wire.sandbox.issuer}jwk").json()["keys"]
    cert = x509.load_der_x509_certificate(base64.b64decode(key["x5c"][0]))
    public = cert.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.key_size == 4096
    modulus = base64.urlsafe_b64decode(key["n"] + "==")
    assert int.from_bytes(modulus) == public.public_numbers().n


def test_an_eseal_gets_a_token_with_its_identifier_verbatim(sandbox_wire: Wire) -> None:
    ask = eseal().but(chain=leaf(organization_id="ei:SE-55 66", qualified=True))
    answer = sandbox_wire.grant(ask)
    assert answer.status_code == 200
    assert set(answer.json()) == {"access_token", "token_type", "expires_in", "scope"}
    assert "no-store" in answer.headers["cache-control"]
    token = opened(sandbox_wire, answer.json()["access_token"])
    assert set(token.header) == {"alg", "kid"}
    claims = token.claims
    assert claims["consumer"] == {
        "commonName": "Eksempel AB",
        "organizationName": "Eksempel AB",
        "countryName": "SE",
        "authority": "etsi-en-319-412",
        "ID": "ei:SE-55 66",
    }
    assert claims["client_amr"] == "QCForESeal"
    assert claims["client_id"] == f"eidas-{ask.chain[0].serial_number:x}"
    assert answer.json()["expires_in"] == claims["exp"] - claims["iat"] - 1
    assert not {"sub", "nbf", "aud"} & set(claims)
    plain = opened(sandbox_wire, sandbox_wire.grant().json()["access_token"]).claims
    assert plain["client_amr"] == "CForESeal"


@pytest.mark.parametrize(
    ("ask", "amr"),
    [(certificate(), "virksomhetssertifikat"), (by_key(), "private_key_jwt")],
)
def test_a_norwegian_client_gets_a_token_for_its_number(
    sandbox_wire: Wire, ask: TokenRequestParts, amr: str
) -> None:
    claims = opened(sandbox_wire, sandbox_wire.grant(ask).json()["access_token"]).claims
    assert claims["consumer"] == {"authority": "iso6523-actorid-upis", "ID": "0192:987654325"}
    assert claims["client_amr"] == amr


def test_lifetimes_are_per_scope_and_the_lowest_wins(sandbox_wire: Wire) -> None:
    air = "toll:eu/movement/air"
    assert sandbox_wire.grant(scope=air).json()["expires_in"] == 7199
    assert sandbox_wire.grant(scope=f"{air} {ROAD}").json()["expires_in"] == 599
    assert sandbox_wire.grant(scope="digdir:verksemd.eu").json()["expires_in"] == 119


def test_a_refusal_is_json_with_trace_id_and_code(sandbox_wire: Wire) -> None:
    ask = eseal().but(claims={"jti": "only once"})
    assert sandbox_wire.send(ask).status_code == 200
    answer = sandbox_wire.send(ask)
    assert answer.status_code == 400
    found = answer.json()
    assert found["error"] == "invalid_grant"
    assert re.search(r"\(trace_id: [0-9a-f]{32}\)$", found["error_description"])
    assert found["error_uri"] == f"{sandbox_wire.sandbox.issuer}errors/MP-012"
    assert "no-store" in answer.headers["cache-control"]
    assert sandbox_wire.sandbox.received[-1].refused_by == "M58"


def test_an_organisation_with_a_list_has_that_list_alone(sandbox_wire: Wire) -> None:
    sandbox_wire.sandbox.allow("NTRSE-1", "toll:eu/movement/air")
    ask = eseal().but(chain=leaf(organization_id="NTRSE-1"))
    assert sandbox_wire.grant(ask, scope="toll:eu/movement/air").status_code == 200
    refused = sandbox_wire.grant(ask)
    assert (refused.status_code, refused.json()["error"]) == (403, "forbidden")
