"""
NIST's suite of path processing (PKITS): by each test's own path, and out of all CAs at once.

The verdict is in the name of a test. Those without one depend on policies that a verifier asks
for; hsmtoll asks for none, and has to find a whole path.
"""

from __future__ import annotations

import email
import random
from datetime import UTC, datetime
from functools import cache

import pytest

from hsmtoll import der
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.certificate_checks import chain_faults, leaf_faults
from hsmtoll.x509.path_building import build
from tests.kit import vectors

PKITS = vectors.package("cryptography_vectors") / "x509" / "PKITS_data"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
#: The name says neither: NIST's description does.
INVALID = {"MissingCRLTest1"}
#: What is said of a leaf by time and extensions; the rest is about organisations.
OF_ANY_LEAF = {"certificate-critical", "certificate-expired", "certificate-not-yet-valid"}


def _loaded(raw: bytes) -> Certificate | None:
    try:
        return Certificate.load(raw)
    except ValueError:
        return None


@cache
def _paths() -> dict[str, list[Certificate]]:
    """The certificates of each test below the root, as its signed message has them."""
    found = {}
    for message in sorted((PKITS / "smime").iterdir(), key=lambda each: each.name):
        parts = email.message_from_bytes(message.read_bytes()).walk()
        file = next(part for part in parts if part.get_filename() == "smime.p7s")
        signature = file.get_payload(decode=True)
        assert isinstance(signature, bytes)
        # RFC 5652 sections 3 and 5.1: ContentInfo, SignedData, and its certificates.
        _, content = der.parts(signature)
        fields = der.parts(der.parts(content, 0xA0)[0])
        certificates = next(field for field in fields if field[0] == 0xA0)
        loaded = [_loaded(each) for each in der.parts(certificates, 0xA0)]
        name = message.name.removeprefix("Signed").removesuffix(".eml")
        found[name] = [each for each in loaded if each is not None]
    return found


@cache
def _authorities() -> list[Certificate]:
    files = [each for each in (PKITS / "certs").iterdir() if not each.name.endswith("EE.crt")]
    loaded = [_loaded(each.read_bytes()) for each in sorted(files, key=lambda file: file.name)]
    return [each for each in loaded if each is not None]


@cache
def _root() -> Certificate:
    return Certificate.load((PKITS / "certs" / "TrustAnchorRootCertificate.crt").read_bytes())


def _proven(leaf: Certificate, pool: list[Certificate]) -> bool:
    chain = build(leaf, pool, now=NOW)
    faults = [
        *(f for f in leaf_faults(leaf, identity="eseal", now=NOW) if f.code in OF_ANY_LEAF),
        *chain_faults(chain, identity="eseal", now=NOW),
    ]
    return chain.root == _root() and not faults


def test_the_whole_suite_is_there() -> None:
    assert len(_paths()) == 224
    assert len(_authorities()) > 170
    # The control of all that follows: a root of another suite is not where a path may end.
    leaf, *pool = reversed(_paths()["ValidSignaturesTest1"])
    assert _proven(leaf, [*pool, _root()])
    assert not _proven(leaf, pool)


def _says_valid(name: str) -> bool:
    return not name.startswith("Invalid") and name not in INVALID


def test_each_path_ends_as_nist_says() -> None:
    vectors.judge(
        "PKITS",
        {
            name: (_says_valid(name), _proven(leaf, [*above, _root()]))
            for name, (*above, leaf) in _paths().items()
        },
    )


@pytest.mark.parametrize("seed", range(3))
def test_each_path_ends_the_same_out_of_all_cas_in_any_order(seed: int) -> None:
    order = random.Random(seed)
    pool = list(_authorities())
    verdicts = {}
    for name, (*_, leaf) in _paths().items():
        order.shuffle(pool)
        verdicts[name] = _says_valid(name), _proven(leaf, pool)
    vectors.judge("PKITS", verdicts)
