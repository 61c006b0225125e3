"""What a policy allows, and that each refusal has a twin that differs in one thing and passes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsmtoll.errors import ConfigurationError, PolicyDenied
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import Counts, GrantRequest, Policy, decide, explain
from hsmtoll.peer_credentials import OVERFLOW
from hsmtoll.token import details_text

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """[profile.acme]
environment = "prod"
identity = "eseal"

[caller."uid:1001"]
profile.acme = { scopes = ["road"], mode = ["grant"], consumer_org = ["987654321"], per_minute = 6 }
[caller."gid:7"]
profile.acme = { scopes = ["air"], mode = ["token"] }
"""
POLICY = Policy.parse(TEXT.encode())
PEER = Peer.local(1001, 1001)
ROAD = GrantRequest("acme", "road")


def test_what_the_line_allows_is_allowed_and_the_line_is_named() -> None:
    verdict = decide(POLICY, PEER, ROAD, "grant", Counts(minute=5))
    assert (verdict.allowed, verdict.line) == (True, 6)
    assert verdict.scope == "toll:eu/movement/road/v2"


@pytest.mark.parametrize(
    ("peer", "ask", "mode", "counts"),
    [
        (Peer.local(1002, 1002), ROAD, "grant", Counts()),
        (Peer.local(1001, 7), ROAD, "grant", Counts()),
        (PEER, GrantRequest("other", "road"), "grant", Counts()),
        (PEER, GrantRequest("acme", "air"), "grant", Counts()),
        (PEER, GrantRequest("acme", "road", "123456789"), "grant", Counts()),
        (PEER, GrantRequest("acme", "road", None, ("https://a.example",)), "grant", Counts()),
        (PEER, ROAD, "token", Counts()),
        (PEER, ROAD, "grant", Counts(minute=6)),
    ],
)
def test_a_twin_that_differs_in_one_thing_is_denied(
    peer: Peer, ask: GrantRequest, mode: str, counts: Counts
) -> None:
    assert not decide(POLICY, peer, ask, mode, counts).allowed


def test_two_entries_that_match_are_both_named() -> None:
    verdict = decide(POLICY, Peer.local(1001, 7), ROAD, "grant", Counts())
    assert "gid:7" in verdict.why
    assert "uid:1001" in verdict.why


def test_an_account_that_the_kernel_cannot_name_is_nobody() -> None:
    with pytest.raises(PolicyDenied):
        Peer.local(min(OVERFLOW), 1)
    assert Peer.local(1001, 1).account == "uid:1001"


def test_a_revoked_certificate_is_denied_and_another_is_not() -> None:
    text = TEXT.replace("uid:1001", "san:dns:app") + f'revoked_sha256 = ["{"ab" * 32}"]\n'
    policy = Policy.parse(text.encode())
    for sha256, allowed in (("ab" * 32, False), ("cd" * 32, True)):
        peer = Peer(frozenset({"san:dns:app"}), sha256)
        assert decide(policy, peer, ROAD, "grant", Counts()).allowed is allowed


@pytest.mark.parametrize("old", ["scopes", "[caller", "road", "per_minute", '"grant"', "eseal"])
def test_an_unknown_word_is_an_error(old: str) -> None:
    with pytest.raises(ConfigurationError):
        Policy.parse(TEXT.replace(old, old[:-1] + "x" + old[-1:], 1).encode())


@pytest.mark.parametrize(
    "line",
    [
        'config = "/x"',
        'profile = "x"',
        'signer__url = "unix:///x"',
        "host__workers = 9",
        "host = {}",
    ],
)
def test_a_profile_changes_nothing_of_the_host_itself(line: str) -> None:
    with pytest.raises(ConfigurationError, match="profile acme"):
        Policy.parse(TEXT.replace('"eseal"', f'"eseal"\n{line}').encode())
    same = Policy.parse(TEXT.replace('"eseal"', '"eseal"\nalg = "RS512"').encode())
    assert same.profiles["acme"]["alg"] == "RS512"


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("uid:0", True),
        ("uid:4294967294", True),
        ("uid:4294967296", False),
        ("gid:99999999999", False),
        ("uid:01001", False),
        ("uid:00", False),
        ("uid:-1", False),
        ("uid:\u0661\u0660", False),
        ("gid:\uff17", False),
        ("UID:7", False),
        ("san:dns:app.example", True),
        ("san:dns:", False),
    ],
)
def test_a_caller_is_named_as_the_kernel_and_certificates_do(
    tmp_path: Path, name: str, *, good: bool
) -> None:
    text = TEXT.replace("gid:7", name)
    path = tmp_path / "policy.toml"
    path.write_text(TEXT, "utf-8")
    path.chmod(0o644)
    if good:
        assert name in Policy.parse(text.encode()).callers
        assert explain(path, "acme", name, "road")["grant"][1].startswith("denied: no caller")
        return
    with pytest.raises(ConfigurationError, match="uid:N, gid:N"):
        Policy.parse(text.encode())
    with pytest.raises(ConfigurationError, match="uid:N, gid:N"):
        explain(path, "acme", name, "road")


@pytest.mark.parametrize("kind", ["uid", "gid"])
def test_an_account_that_the_kernel_cannot_name_is_denied_whatever_the_policy_says(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT.replace("uid:1001", f"{kind}:65534"))
    path.chmod(0o644)
    allowed, reason = explain(path, "acme", f"{kind}:65534", "road")["grant"]
    assert not allowed
    assert "another user namespace" in reason
    path.write_text(TEXT.replace("uid:1001", f"{kind}:65533"))
    assert explain(path, "acme", f"{kind}:65533", "road")["grant"][0]


@given(st.binary(max_size=300), st.integers(0, len(TEXT)))
def test_any_file_is_a_policy_or_a_configuration_error(noise: bytes, at: int) -> None:
    raw = TEXT.encode()
    try:
        policy = Policy.parse(raw[:at] + noise + raw[at:])
    except ConfigurationError:
        return
    assert not decide(policy, Peer.local(4242, 4242), ROAD, "grant", Counts()).allowed


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT)
    path.chmod(0o644)
    allowed, reason = explain(path, "acme", "uid:1001", "road")["grant"]
    assert allowed
    assert reason.endswith(f"({path}:6)")
    path.chmod(0o666)
    with pytest.raises(ConfigurationError, match="others may change"):
        Policy.load(path)


DETAILS = {
    "type": "urn:altinn:systemuser",
    "systemuser_org": {"authority": "iso6523-actorid-upis", "ID": "0192:910000001"},
}


@pytest.mark.parametrize(
    ("allowed", "asked", "verdict"),
    [
        ("[]", [DETAILS], False),
        ('[{type = "urn:altinn:systemuser"}]', [DETAILS], True),
        ('[{type = "urn:altinn:consent"}]', [DETAILS], False),
        (
            '[{type = "urn:altinn:systemuser", systemuser_org = {ID = "0192:910000001"}}]',
            [DETAILS],
            True,
        ),
        (
            '[{type = "urn:altinn:systemuser", systemuser_org = {ID = "0192:910000002"}}]',
            [DETAILS],
            False,
        ),
        (
            '[{type = "urn:altinn:systemuser"}]',
            [DETAILS, {"type": "urn:altinn:consent", "id": "1"}],
            False,
        ),
        ("[]", [], True),
    ],
)
def test_authorization_details_are_those_that_the_policy_has_members_of(
    allowed: str, asked: list[dict[str, Any]], verdict: bool
) -> None:
    text = f"""
[profile.acme]
environment = "prod"
identity = "norwegian"
[caller."uid:1001"]
profile.acme = {{ scopes = ["road"], mode = ["grant"], authorization_details = {allowed} }}
"""
    policy = Policy.parse(text.encode())
    ask = GrantRequest("acme", "road", authorization_details=details_text(asked))
    decision = decide(policy, Peer(frozenset({"uid:1001"})), ask, "grant", Counts())
    assert decision.allowed == verdict
    assert verdict or "authorization_details" in decision.why


def test_a_policy_with_details_of_no_type_is_wrong() -> None:
    text = """
[profile.acme]
environment = "prod"
identity = "norwegian"
[caller."uid:1001"]
profile.acme = { scopes = ["road"], mode = ["grant"], authorization_details = [{ID = "1"}] }
"""
    with pytest.raises(ConfigurationError, match="authorization_details"):
        Policy.parse(text.encode())


def test_a_policy_is_known_by_the_hash_of_its_bytes_and_an_error_by_its_path(
    tmp_path: Path,
) -> None:
    assert POLICY.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    file = tmp_path / "policy.toml"
    file.write_text("nonsense = 1\n")
    file.chmod(0o600)
    with pytest.raises(ConfigurationError, match=f"policy {file}: nonsense"):
        Policy.load(file)


def test_certificates_that_are_revoked_above_and_below_a_caller_are_all_revoked() -> None:
    first, second = "ab" * 32, ":".join(["CD"] * 32)
    text = f"revoked_sha256 = ['{first}']\n{TEXT}[caller.'san:dns:a.example']\n"
    policy = Policy.parse(f"{text}revoked_sha256 = ['{second}']\n".encode())
    assert policy.revoked == {first, "cd" * 32}


def test_a_policy_without_callers_is_one_and_lets_nobody_in() -> None:
    policy = Policy.parse(TEXT.partition("[caller")[0].encode())
    assert not decide(policy, PEER, ROAD, "grant", Counts()).allowed


@pytest.mark.parametrize("environment", ["test", "prod", "sandbox"])
def test_a_profile_is_of_one_of_three_environments(environment: str) -> None:
    assert Policy.parse(TEXT.replace("prod", environment).encode()).profiles
    with pytest.raises(ConfigurationError, match="test, prod or sandbox"):
        Policy.parse(TEXT.replace("prod", environment.upper()).encode())


@pytest.mark.parametrize("option", ["per_minute", "per_day"])
@pytest.mark.parametrize("value", ["-1", "'6'", "6.0", "true", "[6]"])
def test_a_quota_is_a_whole_number(option: str, value: str) -> None:
    Policy.parse(TEXT.replace("per_minute = 6", f"{option} = 0").encode())
    with pytest.raises(ConfigurationError, match=f"{option} must be a whole number"):
        Policy.parse(TEXT.replace("per_minute = 6", f"{option} = {value}").encode())


@pytest.mark.parametrize(
    ("option", "counts", "span"),
    [("per_minute", Counts(minute=6), "minute"), ("per_day", Counts(day=6), "day")],
)
def test_a_quota_that_is_used_up_is_told_apart_from_a_refusal(
    option: str, counts: Counts, span: str
) -> None:
    policy = Policy.parse(TEXT.replace("per_minute", option).encode())
    full = decide(policy, PEER, ROAD, "grant", counts)
    assert (full.allowed, full.quota, full.caller, full.line) == (False, True, "uid:1001", 6)
    assert full.why == f"the quota of 6 per {span} is used up"
    # The twins: one less, and what the policy refuses whatever was used.
    assert decide(policy, PEER, ROAD, "grant", Counts(minute=5, day=5)).allowed
    refused = decide(policy, PEER, ROAD, "token", counts)
    assert (refused.quota, refused.caller, refused.line) == (False, "uid:1001", 6)


def test_a_refusal_names_the_line_that_it_comes_from() -> None:
    def line(peer: Peer, ask: GrantRequest) -> int:
        return decide(POLICY, peer, ask, "grant", Counts()).line

    assert line(PEER, GrantRequest("acme", "air")) == 6
    assert line(PEER, GrantRequest("acme", "there is no such scope")) == 6
    # No line allows the profile, so it is the caller's; of two callers, the second.
    assert line(PEER, GrantRequest("other", "road")) == 5
    assert line(Peer.local(1001, 7), ROAD) == 5
    assert line(Peer.local(1002, 1002), ROAD) == 0
