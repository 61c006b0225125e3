"""The one proven chain, on hostile tokens; and the leaf that is taken."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ObjectIdentifier

from hsmtoll.errors import CertificateError
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.certificate_checks import chain_faults, leaf_faults
from hsmtoll.x509.leaf_choice import checked, choose, for_key, ranked
from hsmtoll.x509.path_building import MAX_DEPTH, MAX_VERIFICATIONS, Chain, build
from tests.kit import pki
from tests.kit.pki import DAY, NOW, authority, ec_key, leaf, name, rsa_key, usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.apis import Identity

LATE = NOW + 1000 * DAY


def _any_order(
    first: Certificate,
    pool: Iterable[Certificate],
    *,
    root_sha256: str | None = None,
    preferred: frozenset[str] = frozenset(),
) -> Chain:
    """The chain, after asking for it in four orders."""
    shuffled = list(pool)
    chains: set[tuple[Certificate, ...]] = set()
    for seed in range(4):
        random.Random(seed).shuffle(shuffled)
        chain = build(first, shuffled, now=NOW, root_sha256=root_sha256, preferred=preferred)
        chains.add(chain.certificates)
    assert len(chains) == 1
    return chain


# ----- the ordinary chain -----------------------------------------------------------------


def test_the_chain_is_leaf_intermediate_root_in_any_order() -> None:
    first, inter, root = pki.good()
    chain = _any_order(first, [root, first, inter])
    assert chain.certificates == (first, inter, root)
    assert (chain.leaf, chain.root, chain.complete) == (first, root, True)
    assert (chain.unused, chain.unproven, chain.cut_short) == (0, 0, False)


def test_x5c_is_standard_base64_of_der_and_has_three_modes() -> None:
    first, inter, root = pki.good()
    chain = build(first, [inter, root], now=NOW)
    encoded = tuple(base64.b64encode(c.der).decode() for c in (first, inter, root))
    assert chain.x5c() == chain.x5c("full") == encoded
    assert chain.x5c("without-root") == encoded[:2]
    assert chain.x5c("leaf") == encoded[:1]
    assert build(first, [inter], now=NOW).x5c("without-root") == encoded[:2]


def test_the_weakest_end_is_the_earliest() -> None:
    first = leaf(end=NOW + 9 * DAY)
    inter = authority("Inter", ec_key(1), "Root", ec_key(0), end=NOW + 7 * DAY)
    chain = build(first, [inter, authority("Root", ec_key(0))], now=NOW)
    assert chain.weakest_not_after == NOW + 7 * DAY


def test_a_self_signed_leaf_stands_alone() -> None:
    alone = pki.issue(name("Alone"), rsa_key(), name("Alone"), rsa_key())
    assert build(alone, pki.good(), now=NOW).certificates == (alone,)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        (rsa_key(1), {}),
        (rsa_key(1), {"digest": hashes.SHA512()}),
        (rsa_key(1), {"pss": True}),
        (rsa_key(1), {"pss": True, "digest": hashes.SHA384()}),
        (ec_key(1), {"digest": hashes.SHA384()}),
        (ec.generate_private_key(ec.SECP384R1()), {}),
        (ed25519.Ed25519PrivateKey.generate(), {}),
        (ed448.Ed448PrivateKey.generate(), {}),
    ],
)
def test_issuers_of_every_kind_are_proven(key: pki.Key, options: dict[str, bool]) -> None:
    inter = authority("Inter", key, "Root", ec_key(0))
    root = authority("Root", ec_key(0))
    first = pki.issue(name("Leaf"), rsa_key(), name("Inter"), key, **options)  # type: ignore[arg-type]  # a table of options
    assert build(first, [root, inter], now=NOW).certificates == (first, inter, root)
    forged = bytearray(first.der)
    forged[-1] ^= 1
    assert build(Certificate.load(bytes(forged)), [root, inter], now=NOW).certificates[1:] == ()


@pytest.mark.parametrize("digest", [hashes.SHA1(), hashes.MD5()])  # noqa: S303 - the refused ones
def test_sha1_and_md5_count_on_a_root_over_itself_and_nowhere_else(
    digest: hashes.HashAlgorithm,
) -> None:
    old = _resigned(authority("Old", rsa_key(1)), rsa_key(1), digest)
    inter = authority("Inter", ec_key(1), "Old", rsa_key(1))
    assert _any_order(leaf(), [inter, old]).complete
    weak = _resigned(inter, rsa_key(1), digest)
    assert _any_order(leaf(), [weak, old]).certificates[2:] == ()


def _resigned(certificate: Certificate, key: pki.Key, digest: hashes.HashAlgorithm) -> Certificate:
    """The same certificate under a digest that cryptography does not sign with any more."""
    from asn1crypto import x509 as asn1
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    assert isinstance(key, rsa.RSAPrivateKey)
    made = asn1.Certificate.load(certificate.der)  # type: ignore[no-untyped-call]  # asn1crypto
    algorithm = {"algorithm": f"{digest.name}_rsa", "parameters": None}
    made["tbs_certificate"]["signature"] = algorithm
    made["signature_algorithm"] = algorithm
    tbs = made["tbs_certificate"].dump(force=True)
    made["signature_value"] = key.sign(tbs, padding.PKCS1v15(), digest)
    return Certificate.load(made.dump(force=True))


# ----- hostile tokens, each with its control ----------------------------------------------


def test_cross_signed_intermediates() -> None:
    """Same name and key, different issuers: the one that leads to a root is taken."""
    first = leaf()
    to_root = authority("Inter", ec_key(1), "Root", ec_key(0))
    to_nowhere = authority("Inter", ec_key(1), "Gone", ec_key(9), end=LATE)
    root = authority("Root", ec_key(0))
    assert _any_order(first, [to_nowhere, to_root, root]).certificates == (first, to_root, root)
    gone = authority("Gone", ec_key(9), end=LATE)
    both = _any_order(leaf(end=LATE), [to_nowhere, to_root, root, gone])
    assert both.certificates[1:] == (to_nowhere, gone)


def test_a_pinned_root_decides_between_cross_signs() -> None:
    first = leaf()
    a, b = authority("A", ec_key(2)), authority("B", ec_key(3), end=LATE)
    under_a = authority("Inter", ec_key(1), "A", ec_key(2))
    under_b = authority("Inter", ec_key(1), "B", ec_key(3), end=LATE)
    pool = [a, b, under_a, under_b]
    for pin, path in ((a, (first, under_a, a)), (b, (first, under_b, b))):
        assert _any_order(first, pool, root_sha256=pin.sha256).certificates == path
    colons = ":".join(a.sha256[at : at + 2] for at in range(0, 64, 2)).upper()
    assert build(first, pool, now=NOW, root_sha256=colons).root == a


def test_a_pin_may_name_a_cross_signed_certificate_and_ends_the_chain_there() -> None:
    first, root = leaf(), authority("Root", ec_key(0))
    cross = authority("Inter", ec_key(1), "Root", ec_key(0))
    chain = _any_order(first, [cross, root], root_sha256=cross.sha256)
    assert (chain.certificates, chain.complete) == ((first, cross), True)


def test_a_pinned_root_that_is_not_reached_is_an_error() -> None:
    first, inter, root = pki.good()
    stranger = authority("Stranger", ec_key(5))
    for pin in (stranger.sha256, "00" * 32):
        with pytest.raises(CertificateError) as caught:
            build(first, [inter, root, stranger], now=NOW, root_sha256=pin)
        assert caught.value.code == "chain-pin"
        assert "HSMTOLL_HSM__ROOT_SHA256" in (caught.value.hint or "")


def test_two_cas_with_the_same_name_and_different_keys() -> None:
    first, inter, root = pki.good()
    namesakes = [authority("Inter", ec_key(n), end=LATE) for n in (5, 6)]
    assert _any_order(first, [*namesakes, inter, root]).certificates == (first, inter, root)
    only = _any_order(first, namesakes)
    assert (only.certificates, only.complete, only.unproven) == ((first,), False, 2)


def test_a_namesake_with_the_right_key_identifier_is_still_a_stranger() -> None:
    first, inter, root = pki.good()
    assert first.authority_key_id == inter.subject_key_id
    claims = x509.SubjectKeyIdentifier(inter.subject_key_id or b"")
    liar = authority("Inter", ec_key(5), key_ids=False, extensions=[(claims, False)], end=LATE)
    assert liar.subject_key_id == first.authority_key_id
    assert _any_order(first, [liar, inter, root]).certificates == (first, inter, root)


def test_a_wrong_key_identifier_does_not_hide_the_issuer() -> None:
    first = leaf()
    wrong = (x509.SubjectKeyIdentifier(b"wrong"), False)
    inter = authority("Inter", ec_key(1), "Root", ec_key(0), key_ids=False, extensions=[wrong])
    root = authority("Root", ec_key(0))
    assert _any_order(first, [inter, root]).certificates == (first, inter, root)


def test_an_expired_cross_sign_beside_a_good_one() -> None:
    first, root, old_root = leaf(), authority("Root", ec_key(0)), authority("Old", ec_key(4))
    good = authority("Inter", ec_key(1), "Root", ec_key(0), end=NOW + DAY)
    expired = authority("Inter", ec_key(1), "Old", ec_key(4), end=NOW - DAY)
    future = authority("Inter", ec_key(1), "Old", ec_key(4), start=NOW + DAY, end=LATE)
    pool = [expired, future, good, root, old_root]
    assert _any_order(first, pool).certificates == (first, good, root)
    pool.remove(good)
    assert _any_order(first, pool).certificates == (first, future, old_root)
    later = build(first, [*pool, good], now=NOW + 2 * DAY)
    assert later.certificates == (first, future, old_root)


@pytest.mark.parametrize("other", ["INTER", "  inter ", "Inter"])
def test_names_equal_but_not_the_same_bytes(other: str) -> None:
    first = leaf(other, ec_key(1))
    inter = pki.issue(
        name("Inter", kind=_ASN1Type.PrintableString),
        ec_key(1),
        name("root  CA", kind=_ASN1Type.PrintableString),
        ec_key(0),
        ca=True,
    )
    root = authority("Root CA", ec_key(0))
    assert _any_order(first, [inter, root]).certificates == (first, inter, root)
    unequal = leaf("I nter", ec_key(1))
    assert _any_order(unequal, [inter, root]).certificates == (unequal,)


@pytest.mark.parametrize(
    "options",
    [
        {"ca": False, "key_usage": usage("key_cert_sign")},
        {"ca": None, "key_usage": usage("key_cert_sign")},
        {"ca": True, "key_usage": usage("digital_signature", "crl_sign")},
    ],
)
def test_look_alikes_that_are_not_cas(options: dict[str, object]) -> None:
    """They have the CA's name and even its key, and may not issue all the same."""
    first, inter, root = pki.good()
    alike = authority("Inter", ec_key(1), "Root", ec_key(0), end=LATE, **options)
    assert _any_order(first, [alike, inter, root]).certificates == (first, inter, root)
    alone = _any_order(first, [alike, root])
    assert (alone.certificates, alone.unproven) == ((first,), 1)


def test_a_ca_without_key_usage_may_issue() -> None:
    first, root = leaf(), authority("Root", ec_key(0), key_usage=None)
    inter = authority("Inter", ec_key(1), "Root", ec_key(0), key_usage=None)
    assert _any_order(first, [inter, root]).certificates == (first, inter, root)


def test_path_length_is_respected_and_self_issued_certificates_do_not_count() -> None:
    first, root = leaf(), authority("Root", ec_key(0), path_length=0)
    inter = authority("Inter", ec_key(1), "Root", ec_key(0))
    assert _any_order(first, [inter, root]).certificates == (first, inter)
    wide = authority("Root", ec_key(0), path_length=1)
    assert _any_order(first, [inter, root, wide]).certificates == (first, inter, wide)
    rolled = authority("Root", ec_key(7), "Root", ec_key(0))
    under = authority("Inter", ec_key(1), "Root", ec_key(7))
    chain = _any_order(first, [under, rolled, wide])
    assert chain.certificates == (first, under, rolled, wide)


def test_duplicates() -> None:
    first, inter, root = pki.good()
    copies = [Certificate.load(c.der) for c in (first, inter, root)]
    chain = _any_order(first, [*copies, *copies, first, inter, root])
    assert chain == build(first, [inter, root], now=NOW)


def _attestation(key: pki.Key, **options: object) -> Certificate:
    vendor = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.41482.3.3"), b"\x05\x07\x04")
    return leaf(
        "Device Attestation",
        ec_key(8),
        key=key,
        subject=name("YubiKey PIV Attestation 9c"),
        extensions=[(vendor, False)],
        key_usage=None,
        **options,
    )


@pytest.mark.parametrize("identity", ["eseal", "norwegian"])
def test_attestation_certificates_sharing_the_cka_id(identity: Identity) -> None:
    """Same key and newer, but about the device: neither taken nor in the way."""
    subject = name("Example", org="Example", orgids=["NTRNO-991825827"])
    first, (_, inter, root) = leaf(subject=subject), pki.good()
    attested = _attestation(rsa_key(), start=NOW - DAY)
    vendor = authority("Device Attestation", ec_key(8))
    pool = [attested, vendor, root, inter, first]
    candidates = for_key(pool, first.public_key) if first.public_key else ()
    assert set(candidates) == {first, attested}
    chain = checked(candidates, pool, identity=identity, now=NOW)
    assert chain.certificates == (first, inter, root)
    assert any("YubiKey PIV Attestation" in note for note in chain.explain())
    with pytest.raises(CertificateError) as caught:
        checked([attested], pool, identity=identity, now=NOW)
    assert caught.value.code == "certificate-orgid"


def test_self_signed_strangers() -> None:
    first, inter, root = pki.good()
    strangers = [authority(common, ec_key(5), end=LATE) for common in ("Inter", "Root", "X")]
    strangers.append(pki.issue(name("Example AB"), rsa_key(), name("Example AB"), rsa_key()))
    chain = _any_order(first, [*strangers, inter, root])
    assert (chain.certificates, chain.unused) == ((first, inter, root), 4)


def test_a_self_issued_certificate_that_its_key_did_not_sign_is_no_root() -> None:
    first, inter, _ = pki.good()
    fake = authority("Root", ec_key(0), "Root", ec_key(5))
    chain = _any_order(first, [inter, fake])
    assert (chain.certificates, chain.complete) == ((first, inter, fake), False)


def test_loops() -> None:
    """Two CAs that vouch for each other, and a way out."""
    first = leaf("A", ec_key(2))
    a = authority("A", ec_key(2), "B", ec_key(3))
    b = authority("B", ec_key(3), "A", ec_key(2))
    chain = _any_order(first, [a, b])
    assert (chain.certificates, chain.complete) == ((first, a, b), False)
    root = authority("Root", ec_key(0))
    out = authority("B", ec_key(3), "Root", ec_key(0))
    assert _any_order(first, [a, b, out, root]).certificates == (first, a, out, root)


@pytest.mark.parametrize("part", [0b001, 0b010, 0b100, 0b011, 0b110, 0b101, 0b111])
def test_a_chain_completed_from_a_pem_file_that_holds_any_part(part: int) -> None:
    whole = pki.good()
    in_file = [c for n, c in enumerate(whole) if part >> n & 1]
    on_device = [c for n, c in enumerate(whole) if not part >> n & 1]
    chain = _any_order(
        whole[0], [*on_device, *in_file], preferred=frozenset(c.sha256 for c in in_file)
    )
    assert chain.certificates == whole
    assert (
        not _any_order(whole[0], on_device[-1:] if part & 1 else [whole[0]]).complete or part == 1
    )


def test_certificates_named_in_the_pem_file_win_over_those_that_live_longer() -> None:
    first, root = leaf(), authority("Root", ec_key(0))
    named = authority("Inter", ec_key(1), "Root", ec_key(0), end=NOW + DAY)
    longer = authority("Inter", ec_key(1), "Root", ec_key(0), end=NOW + 9 * DAY)
    pool = [named, longer, root]
    assert _any_order(first, pool).certificates == (first, longer, root)
    preferred = frozenset({named.sha256.upper()})
    assert _any_order(first, pool, preferred=preferred).certificates == (first, named, root)


def test_the_shorter_of_equals_wins_then_the_lower_sha256() -> None:
    first = leaf()
    root = authority("Inter", ec_key(1))
    cross, above = authority("Inter", ec_key(1), "Up", ec_key(2)), authority("Up", ec_key(2))
    assert _any_order(first, [cross, above, root]).certificates == (first, root)
    twins = [authority("Inter", ec_key(1)) for _ in range(3)]
    lowest = min(twins, key=lambda c: c.sha256)
    assert _any_order(first, twins).certificates == (first, lowest)


def test_a_longer_way_that_lives_longer_wins() -> None:
    first = leaf(end=LATE)
    near = [authority("Inter", ec_key(1), "A", ec_key(2), end=LATE), authority("A", ec_key(2))]
    far = [
        authority("Inter", ec_key(1), "B", ec_key(3), end=LATE),
        authority("B", ec_key(3), "C", ec_key(4), end=LATE),
        authority("C", ec_key(4), "D", ec_key(5), end=LATE),
        authority("D", ec_key(5), end=LATE),
    ]
    assert _any_order(first, [*near, *far]).certificates == (first, *far)
    assert _any_order(first, [*near, *far[:-1]]).certificates == (first, *near)


def test_no_root_present() -> None:
    first, inter, _ = pki.good()
    chain = _any_order(first, [inter])
    assert (chain.certificates, chain.root, chain.unproven) == ((first, inter), None, 0)
    assert "no certificate of 'CN=Root'" in " ".join(chain.explain())
    assert [f.code for f in chain_faults(chain, identity="eseal", now=NOW)] == ["chain-incomplete"]
    assert chain_faults(chain, identity="eseal", now=NOW, mode="without-root") == ()


def test_two_hundred_certificates_on_the_device() -> None:
    first, inter, root = pki.good()
    crowd = [authority(f"S{n}", ec_key(n % 5), f"S{n + 1}", ec_key((n + 1) % 5)) for n in range(99)]
    crowd += [leaf(f"S{n}", ec_key(n % 5)) for n in range(98)]
    chain = _any_order(first, [*crowd, inter, root])
    assert (chain.certificates, chain.unused) == ((first, inter, root), 197)
    assert chain.verifications == 3


def test_two_hundred_namesakes_cost_one_proof_each_at_most() -> None:
    first, inter, root = pki.good()
    crowd = [authority("Inter", ec_key(100 + n), key_ids=False) for n in range(197)]
    chain = _any_order(first, [*crowd, inter, root])
    assert chain.certificates == (first, inter, root)
    assert chain.verifications <= 200


def test_objects_that_do_not_parse_are_the_callers_to_skip() -> None:
    whole = pki.good()
    objects = [b"", b"\x30\x03abc", *(c.der for c in whole), whole[1].der[:-1], bytes(70_000)]
    read = []
    for der in objects:
        try:
            read.append(Certificate.load(der))
        except ValueError:
            continue
    assert _any_order(whole[0], read).certificates == whole


def _mesh(size: int) -> list[Certificate]:
    """Every CA signs every other: size * (size - 1) certificates."""
    return [
        authority(f"CA{a}", ec_key(a), f"CA{b}", ec_key(b))
        for a in range(size)
        for b in range(size)
        if a != b
    ]


def test_72_cross_signed_certificates_are_bounded() -> None:
    mesh, first = _mesh(9), leaf("CA0", ec_key(0))
    assert len(mesh) == 72
    without = _any_order(first, mesh)
    assert not without.complete
    assert without.verifications <= 100
    root = authority("CA7", ec_key(7))
    chain = _any_order(first, [*mesh, root])
    assert [c.subject for c in chain.certificates[1:]] == ["CN=CA0", "CN=CA7"]
    assert chain.root == root
    assert chain.verifications <= 100
    assert not chain.cut_short


def test_72_in_layers_are_bounded_and_the_lowest_of_three_million_ways_is_found() -> None:
    layers = [
        [authority(f"L{n}", ec_key(n), f"L{n + 1}", ec_key(n + 1)) for _ in range(12)]
        for n in range(6)
    ]
    first, root = leaf("L0", ec_key(0)), authority("L6", ec_key(6))
    chain = _any_order(first, [*(c for layer in layers for c in layer), root])
    lowest = [min(layer, key=lambda c: c.sha256) for layer in layers]
    assert chain.certificates == (first, *lowest, root)
    assert chain.verifications <= 74
    assert not chain.cut_short


def test_a_mesh_named_in_the_pem_file_ends_at_its_root_though_the_search_is_cut_short() -> None:
    mesh, first, root = _mesh(9), leaf("CA0", ec_key(0)), authority("CA8", ec_key(8))
    preferred = frozenset(c.sha256 for c in mesh)
    chain = _any_order(first, [*mesh, root], preferred=preferred)
    assert chain.root == root
    assert chain.verifications <= 100
    if chain.cut_short:
        assert "cut short" in " ".join(chain.explain())


def test_no_input_costs_more_than_the_bound() -> None:
    """One name for all and a key for each: every pair is a possible link."""
    keys = [ec_key(200 + n) for n in range(60)]
    ring = [
        authority("Same", key, "Same", above, key_ids=False)
        for key, above in zip(keys, keys[1:] + keys[:1], strict=True)
    ]
    more = [authority("Same", ec_key(300 + n), key_ids=False) for n in range(400)]
    chain = build(leaf("Same", keys[0]), [*ring, *more], now=NOW)
    assert chain.verifications == MAX_VERIFICATIONS
    assert chain.cut_short
    assert len(chain.certificates) <= MAX_DEPTH


def test_a_chain_has_ten_certificates_at_most() -> None:
    tower = [authority(f"T{n}", ec_key(n), f"T{n + 1}", ec_key(n + 1)) for n in range(12)]
    first = leaf("T0", ec_key(0))
    chain = _any_order(first, tower)
    assert chain.certificates == (first, *tower[:9])
    low = authority("T8", ec_key(8))
    assert _any_order(first, [*tower, low]).certificates == (first, *tower[:8], low)


# ----- the leaf and the verdict -----------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    code: str
    make: Callable[[], Certificate]
    identity: Identity = "eseal"


SEAL = name("Example AB", org="Example AB", orgids=[pki.ORGID], country="SE")
NORSK = name("Bedrift AS", org="Bedrift AS", orgids=["NTRNO-991825827"], country="NO")
STRANGE = (x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), b"\x05\x00"), True)
CASES = [
    _Case("certificate-key", lambda: leaf(key=ec_key(3))),
    _Case("certificate-key", lambda: leaf(key=rsa_key(0, 1024))),
    _Case("certificate-kind", lambda: leaf(ca=True)),
    _Case("certificate-kind", lambda: pki.issue(SEAL, rsa_key(), SEAL, rsa_key(), key_usage=None)),
    _Case("certificate-orgid", lambda: leaf(subject=name("A", org="B"))),
    _Case("certificate-orgid", lambda: leaf(subject=name("A", orgids=["VATDE-1", "VATDE-2"]))),
    _Case("certificate-orgid", leaf, "norwegian"),
    _Case("certificate-usage", lambda: leaf(key_usage=usage("key_encipherment"))),
    _Case("certificate-usage", lambda: leaf(key_usage=usage("data_encipherment", "key_agreement"))),
    _Case(
        "certificate-usage",
        lambda: leaf(subject=NORSK, key_usage=usage("content_commitment")),
        "norwegian",
    ),
    _Case("certificate-usage", lambda: leaf(subject=NORSK, key_usage=None), "norwegian"),
    _Case("certificate-critical", lambda: leaf(extensions=[STRANGE])),
    _Case("certificate-critical", lambda: leaf(subject=NORSK, extensions=[STRANGE]), "norwegian"),
    _Case("certificate-expired", lambda: leaf(end=NOW - DAY)),
    _Case("certificate-not-yet-valid", lambda: leaf(start=NOW + DAY)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}-{case.identity}")
def test_each_fault_of_a_leaf_has_its_code_and_no_other(case: _Case) -> None:
    bad, (_, inter, root) = case.make(), pki.good()
    assert [f.code for f in leaf_faults(bad, identity=case.identity, now=NOW)] == [case.code]
    with pytest.raises(CertificateError) as caught:
        checked([bad], [inter, root], identity=case.identity, now=NOW)
    error = caught.value
    assert (error.code, error.exit_code) == (case.code, 40)
    assert error.hint
    assert "\n" not in str(error)
    assert bad.subject in str(error)


@pytest.mark.parametrize(
    "bits",
    [
        ("content_commitment",),
        ("content_commitment", "digital_signature"),
        ("digital_signature",),
        ("digital_signature", "key_encipherment"),
        ("digital_signature", "key_agreement"),
        ("content_commitment", "digital_signature", "key_encipherment"),
    ],
)
def test_an_eseal_may_have_every_category_of_etsi_but_encipherment_alone(
    bits: tuple[str, ...],
) -> None:
    assert leaf_faults(leaf(key_usage=usage(*bits)), identity="eseal", now=NOW) == ()


def test_the_messages_that_users_search_for() -> None:
    expired = leaf(end=NOW - DAY)
    with pytest.raises(CertificateError) as caught:
        checked([expired], [expired], identity="eseal", now=NOW)
    assert str(caught.value) == (
        f"using the certificate '{expired.subject}': it expired at 2026-05-31 12:00 UTC"
    )
    with pytest.raises(CertificateError) as caught:
        checked(
            [], [expired, expired], identity="eseal", now=NOW, preferred=frozenset({expired.sha256})
        )
    assert str(caught.value).endswith(
        "2 certificates in HSMTOLL_HSM__CERTIFICATES, none for this key"
    )
    with pytest.raises(CertificateError) as caught:
        checked([], [], identity="eseal", now=NOW)
    assert caught.value.code == "certificate-missing"
    assert str(caught.value) == (
        "looking for the certificate of the key: "
        "there is no certificate, on the device or in a file"
    )
    with pytest.raises(CertificateError) as caught:
        checked([leaf(key=ec_key(3))], [], identity="eseal", now=NOW)
    assert "RS256, RS384 and RS512" in (caught.value.hint or "")


def _set(subject: x509.Name = NORSK) -> tuple[Certificate, Certificate, Certificate]:
    """A Norwegian set over one key: authentication, signing, encryption."""
    return (
        leaf(subject=subject, key_usage=usage("digital_signature"), start=NOW - 9 * DAY),
        leaf(subject=subject, key_usage=usage("content_commitment"), start=NOW - 8 * DAY),
        leaf(subject=subject, key_usage=usage("key_encipherment"), start=NOW - 7 * DAY),
    )


def test_of_a_norwegian_set_the_one_for_authentication_is_taken() -> None:
    authentication, signing, encryption = _set()
    for order in ((authentication, signing, encryption), (encryption, signing, authentication)):
        assert choose(order, identity="norwegian", now=NOW) == authentication
    with pytest.raises(CertificateError) as caught:
        choose([signing, encryption], identity="norwegian", now=NOW)
    assert caught.value.code == "certificate-usage"
    assert ranked([encryption, signing, authentication], identity="eseal", now=NOW) == (
        signing,
        authentication,
    )


def test_the_newest_valid_one_takes_over_when_it_becomes_valid() -> None:
    old = leaf(start=NOW - 300 * DAY, end=NOW + 20 * DAY)
    new = leaf(start=NOW + 5 * DAY, end=NOW + 700 * DAY)
    _, inter, root = pki.good()
    taken = [
        checked([old, new], [inter, root], identity="eseal", now=NOW + n * DAY).leaf
        for n in (0, 4, 5, 19, 25)
    ]
    assert taken == [old, old, new, new, new]


def test_a_new_one_whose_issuer_is_not_there_yet_does_not_displace_the_old() -> None:
    old, (_, inter, root) = leaf(), pki.good()
    new = leaf("Next", ec_key(4), start=NOW - DAY)
    chain = checked([old, new], [inter, root], identity="eseal", now=NOW)
    assert chain.leaf == old
    assert any("its chain cannot be used" in line for line in chain.explain())
    nxt = authority("Next", ec_key(4), "Root", ec_key(0))
    assert checked([old, new], [inter, root, nxt], identity="eseal", now=NOW).leaf == new
    with pytest.raises(CertificateError) as caught:
        checked([new], [inter, root], identity="eseal", now=NOW)
    assert caught.value.code == "chain-incomplete"


def test_one_that_was_refused_lately_comes_last_and_is_still_better_than_none() -> None:
    old, new = leaf(), leaf(start=NOW - DAY)
    _, inter, root = pki.good()
    refused = frozenset({new.sha256})
    chain = checked([old, new], [inter, root], identity="eseal", now=NOW, refused=refused)
    assert chain.leaf == old
    assert any("refused it lately" in line for line in chain.explain())
    assert choose([new], identity="eseal", now=NOW, refused=refused) == new


def test_a_certificate_can_be_pinned() -> None:
    old, new = leaf(), leaf(start=NOW - DAY)
    assert choose([old, new], identity="eseal", now=NOW) == new
    assert choose([old, new], identity="eseal", now=NOW, pinned_sha256=old.sha256) == old
    with pytest.raises(CertificateError) as caught:
        choose([old], identity="eseal", now=NOW, pinned_sha256=new.sha256)
    assert caught.value.code == "certificate-pin"
    expired = leaf(end=NOW - DAY)
    with pytest.raises(CertificateError) as caught:
        choose([old, expired], identity="eseal", now=NOW, pinned_sha256=expired.sha256)
    assert caught.value.code == "certificate-expired"


def test_certificates_of_two_organisations_are_not_guessed_between() -> None:
    one, two = leaf(), leaf(subject=name("Other", orgids=["NTRSE-1"]))
    with pytest.raises(CertificateError) as caught:
        choose([one, two], identity="eseal", now=NOW)
    assert caught.value.code == "certificate-orgid"
    assert pki.ORGID in str(caught.value)
    assert choose([one, two], identity="eseal", now=NOW, organization="NTRSE-1") == two
    whole = [two, authority("Inter", ec_key(1))]
    chain = checked([one, two], whole, identity="eseal", now=NOW, organization="NTRSE-1")
    assert any("another organisation" in line for line in chain.explain())
    assert choose([one, two], identity="eseal", now=NOW, pinned_sha256=one.sha256) == one
    with pytest.raises(CertificateError) as caught:
        choose([one], identity="eseal", now=NOW, organization="NTRSE-1")
    assert caught.value.code == "certificate-orgid"


def test_what_is_said_is_about_the_certificate_meant() -> None:
    expired, attested = leaf(end=NOW - DAY), _attestation(rsa_key())
    for order in ([expired, attested], [attested, expired]):
        with pytest.raises(CertificateError) as caught:
            choose(order, identity="eseal", now=NOW)
        assert caught.value.code == "certificate-expired"


def test_an_expired_or_future_issuer_is_predicted() -> None:
    first, root = leaf(), authority("Root", ec_key(0))
    gone = authority("Inter", ec_key(1), "Root", ec_key(0), end=NOW - DAY)
    with pytest.raises(CertificateError) as caught:
        checked([first], [gone, root], identity="eseal", now=NOW)
    assert caught.value.code == "chain-expired"
    ahead = authority("Inter", ec_key(1), "Root", ec_key(0), start=NOW + DAY)
    with pytest.raises(CertificateError) as caught:
        checked([first], [ahead, root], identity="eseal", now=NOW)
    assert caught.value.code == "chain-not-yet-valid"


def test_a_broken_chain_is_told_from_a_missing_one() -> None:
    first = leaf()
    for pool, code in (
        ([authority("Inter", ec_key(5))], "chain-broken"),
        ([authority("Other", ec_key(5))], "chain-incomplete"),
        ([], "chain-incomplete"),
    ):
        with pytest.raises(CertificateError) as caught:
            checked([first], pool, identity="eseal", now=NOW)
        assert caught.value.code == code
        assert "HSMTOLL_HSM__CERTIFICATES" in (caught.value.hint or "")


def test_leaf_alone_will_do_for_a_norwegian_client_and_not_for_an_eseal() -> None:
    norsk = leaf(subject=NORSK)
    assert checked([norsk], [], identity="norwegian", now=NOW, mode="leaf").certificates == (norsk,)
    with pytest.raises(CertificateError) as caught:
        checked([leaf()], pki.good(), identity="eseal", now=NOW, mode="leaf")
    assert caught.value.code == "chain-incomplete"
    with pytest.raises(CertificateError):
        checked([norsk], [], identity="norwegian", now=NOW, mode="without-root")


def test_the_pinned_root_is_kept_for_every_candidate() -> None:
    first, inter, root = pki.good()
    ok = checked([first], [inter, root], identity="eseal", now=NOW, root_sha256=root.sha256)
    assert ok.root == root
    with pytest.raises(CertificateError) as caught:
        checked([first], [inter, root], identity="eseal", now=NOW, root_sha256="ab" * 32)
    assert caught.value.code == "chain-pin"


def test_a_good_chain_has_no_faults_and_explains_itself() -> None:
    first, inter, root = pki.good()
    chain = checked([first], [root, inter], identity="eseal", now=NOW)
    assert chain_faults(chain, identity="eseal", now=NOW) == ()
    lines = chain.explain()
    assert [line[:2] for line in lines[:3]] == ["1.", "2.", "3."]
    assert lines[3] == "it ends at a root"
    assert replace(chain, notes=()) == chain


def test_hostile_names_reach_no_message_unescaped() -> None:
    first = leaf("\x1b[2J\nhsmtoll: fine", ec_key(1))
    with pytest.raises(CertificateError) as caught:
        checked([first], [], identity="eseal", now=NOW)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in "".join(build(first, [], now=NOW).explain())
    with pytest.raises(CertificateError) as caught:
        choose([leaf(), leaf(subject=name("B", orgids=["\x1b[2J"]))], identity="eseal", now=NOW)
    assert "\x1b" not in str(caught.value)
