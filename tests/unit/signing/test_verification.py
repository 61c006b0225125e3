"""A grant of another host is believed if it is the one asked for, signed by whom it names."""

from __future__ import annotations

import base64
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from hsmtoll import jws
from hsmtoll.errors import ClockError, DeviceError, PolicyDenied
from hsmtoll.jws import RsaPublicKey
from hsmtoll.signing.grant import LIFETIME, MIN_LEFT
from hsmtoll.signing.verification import Expected, verify_grant
from hsmtoll.token import TokenRequest
from tests.kit import pki

if TYPE_CHECKING:
    from hsmtoll.x509.certificate import Certificate

AUDIENCE = "https://test.maskinporten.no/"
ROAD = TokenRequest("toll:eu/movement/road/v2")
NOW = pki.NOW.timestamp()
_NUMBERS = pki.rsa_key().public_key().public_numbers()
KEY = RsaPublicKey(_NUMBERS.n, _NUMBERS.e)
_OTHER = pki.rsa_key(1).public_key().public_numbers()
OTHER_KEY = RsaPublicKey(_OTHER.n, _OTHER.e)


def _assertion(*, header: dict[str, Any], iat: int = int(NOW), lives: int = LIFETIME) -> str:
    claims = {
        "aud": AUDIENCE, "iss": "us", "scope": ROAD.scope, "iat": iat, "exp": iat + lives,
        "jti": "1",
    }  # fmt: skip
    unsigned = jws.signing_input({"alg": "RS256", **header}, claims)
    return jws.compact(unsigned, pki.rsa_key().sign(unsigned, padding.PKCS1v15(), hashes.SHA256()))


def _x5c(*certificates: Certificate) -> dict[str, Any]:
    return {"x5c": [base64.b64encode(each.der).decode() for each in certificates]}


def _verified(
    assertion: object, *, sent: float = NOW, received: float = NOW, **expected: Any
) -> Any:
    wanted = Expected(**{"audience": AUDIENCE, "family": "norwegian"} | expected)
    return verify_grant(assertion, ROAD, wanted, sent=sent, received=received)


def _code(assertion: object, **expected: Any) -> str:
    with pytest.raises(PolicyDenied) as caught:
        _verified(assertion, **expected)
    assert str(caught.value).startswith("the signing host: ")
    assert caught.value.who == "you"
    return caught.value.code


@pytest.mark.parametrize(
    ("kid", "expected"),
    [
        pytest.param("ours", {"kid": "ours"}, id="the kid that is set"),
        pytest.param("ours", {"kid": "ours", "public_key": KEY}, id="and the key"),
        pytest.param("any", {"public_key": KEY}, id="the key alone"),
        pytest.param(
            KEY.thumbprint(), {"kid": "thumbprint", "public_key": KEY}, id="the key's thumbprint"
        ),
        pytest.param(OTHER_KEY.thumbprint(), {"kid": "thumbprint"}, id="a thumbprint"),
    ],
)
def test_a_kid_that_the_settings_name_is_believed(kid: str, expected: dict[str, Any]) -> None:
    grant, organization = _verified(_assertion(header={"kid": kid}), **expected)
    assert (grant.jti, grant.not_after, organization) == ("1", None, None)
    # Who signed is known by the key where there is one, and else by its name.
    known = KEY.spki() if "public_key" in expected else f"kid {kid}".encode()
    assert grant.identity == sha256(known).hexdigest()


@pytest.mark.parametrize(
    ("kid", "expected", "code"),
    [
        pytest.param("ours", {}, "grant-header", id="nobody said whose"),
        pytest.param("theirs", {"kid": "ours"}, "grant-header", id="another kid"),
        pytest.param("", {"public_key": KEY}, "grant-header", id="no text in it"),
        pytest.param(7, {"public_key": KEY}, "grant-header", id="a number"),
        pytest.param(["ours"], {"public_key": KEY}, "grant-header", id="a list"),
        pytest.param("ours", {"kid": "thumbprint"}, "grant-header", id="no thumbprint"),
        pytest.param(
            OTHER_KEY.thumbprint(), {"kid": "thumbprint", "public_key": KEY}, "grant-header",
            id="another key's thumbprint",
        ),
        pytest.param(
            "ours", {"kid": "ours", "public_key": OTHER_KEY}, "grant-signature", id="another key"
        ),
        pytest.param(
            "ours", {"kid": "ours", "family": "eseal"}, "grant-header",
            id="an eSeal is known by its certificate",
        ),
        pytest.param(
            "ours", {"kid": "ours", "organization": "987654321"}, "grant-header",
            id="an organisation is known by its certificate",
        ),
    ],
)  # fmt: skip
def test_any_other_kid_is_not(kid: object, expected: dict[str, Any], code: str) -> None:
    assert _code(_assertion(header={"kid": kid}), **expected) == code


def _long_chain(length: int) -> tuple[Certificate, ...]:
    names = [f"CA {place}" for place in range(length - 1)]
    above = [
        pki.authority(common, pki.ec_key(place), issuer, pki.ec_key(place + 1))
        for place, (common, issuer) in enumerate(pairwise(names))
    ]
    root = pki.authority(names[-1], pki.ec_key(length - 2))
    return pki.leaf(names[0], pki.ec_key(0)), *above, root


@pytest.mark.parametrize("length", [2, 3, 10])
def test_a_chain_of_ten_certificates_is_believed_and_its_organisation_is_told(length: int) -> None:
    chain = _long_chain(length)
    assertion = _assertion(header=_x5c(*chain))
    grant, organization = _verified(assertion, family="eseal", organization=pki.ORGID)
    assert organization == pki.ORGID
    assert (grant.identity, grant.not_after) == (chain[0].sha256, chain[0].not_after)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        pytest.param(_x5c(*_long_chain(11)), "grant-certificate", id="eleven certificates"),
        pytest.param({"x5c": []}, "grant-certificate", id="no certificate"),
        pytest.param({"x5c": "AAAA"}, "grant-certificate", id="no list"),
        pytest.param({"x5c": ["AAAA"]}, "grant-certificate", id="not a certificate"),
        pytest.param({"x5c": [7]}, "grant-certificate", id="a number"),
        pytest.param(_x5c(*_long_chain(3)[::2]), "grant-certificate", id="one is left out"),
        pytest.param(
            _x5c(*_long_chain(3)[:2], pki.authority("Stranger", pki.ec_key(50))),
            "grant-certificate", id="a stranger at its end",
        ),
        pytest.param(
            _x5c(pki.leaf(key=pki.rsa_key(1)), *pki.good()[1:]), "grant-signature",
            id="a certificate of another key",
        ),
    ],
)  # fmt: skip
def test_what_is_no_chain_of_the_key_that_signed_is_not(header: dict[str, Any], code: str) -> None:
    assert _code(_assertion(header=header), family="eseal") == code


def test_a_certificate_is_not_believed_where_a_kid_is_set_or_another_organisation() -> None:
    assertion = _assertion(header=_x5c(*pki.good()))
    assert _code(assertion, family="eseal", kid="ours") == "grant-header"
    assert _code(assertion, family="eseal", organization="NTRSE-1") == "grant-organization"
    assert _code(assertion, family="norwegian") == "grant-organization"
    assert _code(assertion, family="eseal", certificate_sha256="0" * 64) == "grant-certificate"
    assert _code(assertion, family="eseal", root_sha256="0" * 64) == "grant-certificate"


@pytest.mark.parametrize("late", [10.0, -10.0])
def test_ten_seconds_between_the_clocks_are_borne_and_more_are_named(late: float) -> None:
    assertion = _assertion(header={"kid": "ours"})
    assert _verified(assertion, sent=NOW + late, received=NOW + late, kid="ours")
    apart = NOW + late * 1.1
    with pytest.raises(ClockError) as caught:
        _verified(assertion, sent=apart, received=apart, kid="ours")
    assert caught.value.code == "host-clock"
    assert f"11 s {'behind' if late > 0 else 'ahead of'} this machine" in str(caught.value)


def test_a_grant_that_came_when_it_was_nearly_over_is_told_as_a_slow_device() -> None:
    assertion = _assertion(header={"kid": "ours"})
    last = NOW + LIFETIME - MIN_LEFT
    assert _verified(assertion, received=last, kid="ours")
    with pytest.raises(DeviceError) as caught:
        _verified(assertion, received=last + 1, kid="ours")
    assert caught.value.code == "device-slow"


@pytest.mark.parametrize("lives", [MIN_LEFT, LIFETIME])
def test_a_grant_lives_no_longer_and_no_shorter_than_hsmtoll_makes_them(lives: int) -> None:
    header = {"kid": "ours"}
    assert _verified(_assertion(header=header, lives=lives), kid="ours")
    off = lives + (1 if lives == LIFETIME else -1)
    assert _code(_assertion(header=header, lives=off), kid="ours") == "grant-lifetime"
