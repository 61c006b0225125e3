"""The sandbox's rules as pure functions: each passes its good twin, refuses the bad one, alone."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.sandbox.facts import TokenRequest, _x5c
from hsmtoll.sandbox.issue import access_claims
from hsmtoll.sandbox.rules import TABLE, Refusal, RuleContext, refuse, replay_key
from hsmtoll.sandbox.settings import PROFILES, Profile, Settings
from hsmtoll.sandbox.state import Anchor, State
from tests.kit.rule_cases import (
    NOW,
    TokenRequestParts,
    Twins,
    by_key,
    certificate,
    clients,
    enterprise,
    eseal,
    grants,
    key,
    leaf,
    seals,
    segment,
)

ISSUER = "https://localhost:1/"
TWINS = grants()


def rule_context(settings: Settings | None = None) -> RuleContext:
    state = State()
    state.anchors = [Anchor(authority.root) for authority in (seals(), enterprise())]
    state.anchors.append(Anchor(enterprise("prod").root, "prod"))
    state.pinned = [enterprise().intermediate]
    state.clients = {client.client_id: client for client in clients()}
    return RuleContext(state, settings or Settings(), ISSUER, NOW)


def request(ask: TokenRequestParts) -> TokenRequest:
    return TokenRequest.read(
        ask.method,
        ask.media_type,
        ask.form(ISSUER),
        member="assertion",
        authorization=ask.authorization,
    )


def judged(
    twins: Twins, ask: TokenRequestParts, without: frozenset[str] = frozenset()
) -> Refusal | None:
    context = rule_context(replace(Settings(**twins.settings), without=without))
    if twins.revoked:
        context.state.revoked.add(twins.revoked.serial_number)
    return refuse("grant", request(ask), context)


@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins.rule)
def test_a_rule_passes_the_good_twin_and_refuses_the_bad_one_by_its_name(twins: Twins) -> None:
    assert judged(twins, twins.good) is None
    refusal = judged(twins, twins.bad)
    assert refusal is not None
    assert (refusal.rule.id, refusal.status, refusal.code) == (twins.rule, twins.status, twins.code)


@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins.rule)
def test_a_rule_switched_off_lets_the_bad_twin_pass(twins: Twins) -> None:
    assert judged(twins, twins.bad, without=frozenset({twins.rule})) is None


@pytest.mark.parametrize(
    ("rule", "ask"),
    [
        ("M10", eseal().but(authorization=True)),
        ("M56", eseal().but(claims={"iat": NOW - 60, "exp": NOW + 60})),
        ("M59", eseal().but(claims={"jti": None})),
    ],
)
def test_a_permission_passes_what_its_absence_refuses(rule: str, ask: TokenRequestParts) -> None:
    assert refuse("grant", request(ask), rule_context()) is None
    refusal = refuse("grant", request(ask), rule_context(Settings(without=frozenset({rule}))))
    assert refusal is not None
    assert refusal.rule.id == rule


def test_a_replay_is_refused_by_jti_and_without_jti_by_the_whole_grant() -> None:
    for ask in (eseal(), eseal().but(claims={"jti": None})):
        context = rule_context()
        asked = request(ask)
        assert refuse("grant", asked, context) is None
        context.state.used[replay_key(asked)] = NOW + 130
        refusal = refuse("grant", asked, context)
        assert refusal is not None
        assert refusal.code == "MP-012"
        other = request(eseal().but(claims={"jti": "j-2"}))
        assert refuse("grant", other, context) is None
        off = replace(context, settings=Settings(without=frozenset({"M58"})))
        assert refuse("grant", asked, off) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The version.
        ("a003020102", "a003020107"),
        # In the place of the keyUsage a subjectAltName with an ediPartyName.
        ("0603551d0f0101ff0404030206c0", "0603551d110101ff04043002a500"),
    ],
)
def test_a_certificate_that_cannot_be_read_is_refused_and_breaks_no_rule(
    old: str, new: str
) -> None:
    der = eseal().chain[0].public_bytes(Encoding.DER)
    good, harmed = bytes.fromhex(old), bytes.fromhex(new)
    assert der.count(good) == 1
    both = [b64encode(each).decode() for each in (der, der.replace(good, harmed))]
    (read,), fault = _x5c(both[:1])
    assert (read.public_bytes(Encoding.DER), fault) == (der, None)
    assert _x5c(both[1:]) == ((), "entry: not DER of a certificate")


def test_consumer_org_may_not_be_the_clients_own() -> None:
    ask = certificate().but(claims={"consumer_org": "987654325"})
    refusal = refuse("grant", request(ask), rule_context())
    assert refusal is not None
    assert refusal.rule.id == "M72"
    other = certificate().but(claims={"consumer_org": "999999999"})
    context = rule_context()
    context.state.delegations.add(("999999999", "987654325", "toll:movement/road/v2"))
    assert refuse("grant", request(other), context) is None


def test_one_bad_scope_fails_the_whole_request() -> None:
    ask = eseal().but(claims={"scope": "toll:eu/movement/air toll:movement/air"})
    refusal = refuse("grant", request(ask), rule_context())
    assert refusal is not None
    assert "toll:movement/air" in refusal.description
    assert refuse("grant", request(ask), rule_context(Settings(without=frozenset({"M68"})))) is None


@pytest.mark.parametrize(
    "ask",
    [
        by_key().but(claims={"nbf": NOW}),
        eseal().but(claims={"exp": NOW + 180}),
        eseal().but(claims={"aud": ["ISSUER"]}),
        eseal().but(claims={"resource": "https://api.invalid"}),
    ],
)
def test_as_observed_tolerates_what_strict_docs_refuses(ask: TokenRequestParts) -> None:
    assert refuse("grant", request(ask), rule_context(PROFILES["strict-docs"])) is not None
    assert refuse("grant", request(ask), rule_context(PROFILES["as-observed"])) is None


def test_the_root_may_be_left_out_unless_the_settings_demand_it() -> None:
    ask = eseal().but(chain=eseal().chain[:2])
    assert refuse("grant", request(ask), rule_context()) is None
    refusal = refuse("grant", request(ask), rule_context(Settings(root_in_x5c=True)))
    assert refusal is not None
    assert refusal.rule.id == "M27"


def test_an_authority_that_signs_with_pss_or_ec_is_as_good_as_any() -> None:
    from hsmtoll.sandbox.pki import eseal_authority

    for authority in (eseal_authority(algorithm="rsa-pss"), eseal_authority(algorithm="ec")):
        context = rule_context()
        ask = eseal().but(chain=leaf(authority))
        assert refuse("grant", request(ask), context) is not None
        context.state.anchors.append(Anchor(authority.root))
        assert refuse("grant", request(ask), context) is None


def test_each_m_rule_of_the_conformance_list_has_a_row() -> None:
    wanted = {f"M{n:02d}" for n in (*range(1, 11), *range(20, 41), *range(50, 76), *range(80, 90))}
    wanted |= {f"T{n:02d}" for n in range(1, 28)}
    assert wanted <= set(TABLE)
    assert all(rule.sentence and rule.basis for rule in TABLE.values())


def test_each_refusing_m_rule_has_twins() -> None:
    refusing = {r.id for r in TABLE.values() if r.stage == "grant" and r.kind == "refuses"}
    assert refusing - {twins.rule for twins in TWINS} == {"M58", "M72"}


@pytest.mark.parametrize("header", [{"kid": None}, {"x5c": None}], ids=["kid", "x5c"])
@pytest.mark.parametrize("client", ["cert-client", "key-client"])
def test_a_header_member_that_is_null_is_no_way_past_the_signature(
    client: str, header: dict[str, None]
) -> None:
    claims = json.dumps({**by_key().claims, "aud": ISSUER, "iss": client})
    head = json.dumps({"alg": "RS256", **header})
    assertion = ".".join(map(segment, (head.encode(), claims.encode(), b"no signature")))
    form = {"grant_type": by_key().grant_type, "assertion": assertion}
    asked = TokenRequest.read("POST", by_key().media_type, form, member="assertion")
    assert refuse("grant", asked, rule_context()) is not None


def test_a_missing_grant_type_is_another_error_than_a_strange_one() -> None:
    form = {"assertion": eseal().assertion(ISSUER)}
    bare = TokenRequest.read("POST", eseal().media_type, form, member="assertion")
    strange = request(eseal().but(grant_type="password"))
    errors = []
    for asked in (bare, strange):
        refusal = refuse("grant", asked, rule_context())
        assert refusal is not None
        errors.append((refusal.rule.id, refusal.error))
    assert errors == [("M06", "invalid_request"), ("M06", "unsupported_grant_type")]


@pytest.mark.parametrize("kind", [[], {}, 5, None])
def test_authorization_details_of_no_type_are_refused_by_their_code(kind: object) -> None:
    ask = eseal().but(claims={"authorization_details": [{"type": kind}]})
    refusal = refuse("grant", request(ask), rule_context())
    assert refusal is not None
    assert (refusal.rule.id, refusal.code) == ("M73", "MP-301")


@pytest.mark.parametrize("oid", ["2.5.29.32", "2.5.29.19", "2.5.29.15", "2.5.29.17"])
def test_a_leaf_with_an_extension_that_nobody_can_read_is_refused(oid: str) -> None:
    """As one that is no DER at all, and before anybody asks who signed it."""
    unread = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), b"garbage")
    good, *above = eseal().chain
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.subject)
        .issuer_name(good.issuer)
        .public_key(key().public_key())
        .serial_number(good.serial_number)
        .not_valid_before(good.not_valid_before_utc)
        .not_valid_after(good.not_valid_after_utc)
        .add_extension(unread, critical=False)
    )
    ours = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ask = eseal().but(chain=(builder.sign(ours, hashes.SHA256()), *above))
    refusal = refuse("grant", request(ask), rule_context())
    assert refusal is not None
    assert refusal.code == "MP-123"
    assert refuse("grant", request(eseal()), rule_context()) is None


@pytest.mark.parametrize("profile", ["strict-docs", "as-observed"])
@pytest.mark.parametrize(
    "ask",
    [
        certificate(),
        certificate().but(chain=certificate().chain[:1]),
        certificate().but(chain=certificate().chain[:2]),
        by_key().but(header={"typ": "JWT"}),
        eseal().but(header={"typ": "JWT"}),
    ],
)
def test_what_one_of_two_pages_documents_is_taken_by_both_profiles(
    ask: TokenRequestParts, profile: Profile
) -> None:
    assert refuse("grant", request(ask), rule_context(PROFILES[profile])) is None


def test_what_stays_strict_quotes_the_sentence_and_its_page() -> None:
    for ask, words in (
        (eseal().but(claims={"nbf": NOW}), "Adding claims not present"),
        (eseal().but(header={"x5t": "x"}), "Adding claims not present"),
        (eseal().but(claims={"aud": ["ISSUER"]}), "must only contain a single value"),
        (eseal().but(claims={"exp": NOW + 180}), "Maximum 120 seconds allowed"),
        (eseal().but(claims={"resource": "x"}), "Currently only array supported"),
        (eseal().but(x5c=["a\r\nb"]), "characters outside the base alphabet"),
    ):
        refusal = refuse("grant", request(ask), rule_context(PROFILES["strict-docs"]))
        assert refusal is not None
        assert words in refusal.description
        assert "https://" in refusal.description


def test_an_eseal_of_a_norwegian_ca_is_no_client_that_was_not_found() -> None:
    """Customs' list for foreign businesses begins with Buypass and Commfides."""
    foreign = leaf(enterprise(), organization_id="NTRSE-5566778899", country="SE")
    seal = eseal().but(chain=foreign)
    assert refuse("grant", request(seal), rule_context(PROFILES["strict-docs"])) is None
    own_test = eseal().but(chain=foreign, claims={"scope": "digdir:verksemd.eu"})
    assert refuse("grant", request(own_test), rule_context(PROFILES["strict-docs"])) is None
    # Its organisation is the identifier as it stands, and it needs the whole chain.
    context = rule_context(PROFILES["strict-docs"])
    assert access_claims(request(seal), context)["consumer"]["ID"] == "NTRSE-5566778899"
    alone = refuse("grant", request(seal.but(chain=foreign[:1])), context)
    assert alone is not None
    assert alone.rule.id == "M27"
    # The control: a client's certificate that asks for a client's scope is looked for as a client.
    unknown = certificate().but(claims={"iss": "nobody"})
    refusal = refuse("grant", request(unknown), context)
    assert refusal is not None
    assert refusal.code == "MP-100"
