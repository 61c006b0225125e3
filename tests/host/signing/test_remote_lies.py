"""
A signing host is believed as far as it is proven: each lie is refused, its honest twin taken.

The hosts here are of the tests' own making, so that they can lie.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import ssl
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsmtoll import errors
from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.sandbox import pki
from hsmtoll.settings import Settings, SignerHost
from hsmtoll.signing.remote import FailoverHosts
from hsmtoll.signing.signing_host import SigningHost
from hsmtoll.signing.verification import Expected, verify_grant
from hsmtoll.testing.clock import SettableClock
from hsmtoll.token import TokenRequest
from tests.kit.accounts import importable
from tests.kit.scripted_host import (
    ISSUER,
    Ca,
    LyingHost,
    Notary,
    a_key,
    authority,
    error_reply,
    granted,
    honest,
    http,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptography import x509

ROAD = TokenRequest("toll:eu/movement/road/v2")
CANARY = "canary-Zq81pfk3"


def app_of(*urls: str, state: Path, **settings: Any) -> App:
    """An App whose signing hosts are at *urls*."""
    signer = {"url": urls, "profile": "acme", **settings.pop("signer", {})}
    chosen = {
        "environment": "test", "identity": "eseal", "state": state, "deadline": 20.0,
        "signer": signer, **settings,
    }  # fmt: skip
    return App(Settings.model_validate(chosen))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LyingHost]:
    """One that is honest until a test says otherwise."""
    with LyingHost(tmp_path / "host.sock") as made:
        yield made


def refusal(app: App, request: TokenRequest = ROAD) -> HsmTollError:
    """What asking for an assertion raises."""
    with pytest.raises(HsmTollError) as caught:
        app.signer.sign(request, jti="1")
    return caught.value


def asked_of(app: App, request: TokenRequest = ROAD) -> str:
    """The assertion that the host gives, and that is believed."""
    return app.signer.sign(request, jti="not sent").assertion


# ------------------------------------------------------------------ what a grant must show

_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another audience": ({"claims": {"aud": "https://maskinporten.no/"}}, "grant-aud"),
    "an audience without its slash": ({"claims": {"aud": ISSUER[:-1]}}, "grant-aud"),
    "a list of audiences": ({"claims": {"aud": [ISSUER]}}, "grant-aud"),
    "another scope": ({"claims": {"scope": "toll:eu/movement/air"}}, "grant-scope"),
    "a scope more": ({"claims": {"scope": f"{ROAD.scope} toll:x"}}, "grant-scope"),
    "a consumer that nobody named": ({"claims": {"consumer_org": "987654325"}}, "grant-claims"),
    "a resource that nobody named": ({"claims": {"resource": ["https://x/"]}}, "grant-claims"),
    "a claim that nobody knows": ({"claims": {"delegation_source": "x"}}, "grant-claims"),
    "no jti": ({"claims": {"jti": None}}, "grant-jti"),
    "an empty jti": ({"claims": {"jti": ""}}, "grant-jti"),
    "a jti that is a number": ({"claims": {"jti": 1}}, "grant-jti"),
    "no iss": ({"claims": {"iss": None}}, "grant-iss"),
    "no exp": ({"claims": {"exp": None}}, "grant-lifetime"),
    "an exp that is true": ({"claims": {"exp": True}}, "grant-lifetime"),
    "an exp of long ago": ({"claims": {"exp": 1}}, "grant-lifetime"),
    "an exp of next year": ({"claims": {"exp": 4102444800}}, "grant-lifetime"),
    "alg none": ({"header": {"alg": "none"}}, "grant-header"),
    "alg HS256": ({"header": {"alg": "HS256"}}, "grant-header"),
    "an alg that is a list": ({"header": {"alg": ["RS256"]}}, "grant-header"),
    "a crit header": ({"header": {"crit": ["exp"]}}, "grant-header"),
    "a jku header": ({"header": {"jku": "https://x/"}}, "grant-header"),
    "kid and x5c": ({"header": {"kid": "k"}}, "grant-header"),
    "kid for an eSeal": ({"header": {"kid": "k", "x5c": None}}, "grant-header"),
    "neither kid nor x5c": ({"header": {"x5c": None}}, "grant-header"),
    "no certificates": ({"header": {"x5c": []}}, "grant-certificate"),
    "certificates that are none": ({"header": {"x5c": ["AAAA"]}}, "grant-certificate"),
    "certificates that are numbers": ({"header": {"x5c": [1]}}, "grant-certificate"),
    "another key's signature": (
        {"key": rsa.generate_private_key(65537, 2048)},
        "grant-signature",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", _LIES)
def test_a_grant_that_is_not_as_asked_is_refused_and_its_honest_twin_taken(
    host: LyingHost, tmp_path: Path, lie: str
) -> None:
    changes, code = _LIES[lie]
    app = app_of(host.url, state=tmp_path)
    assert asked_of(app).count(".") == 2
    host.answer = honest(Notary(**changes))
    refused = refusal(app)
    assert (refused.exit_code, refused.code) == (90, code)
    host.answer = honest(Notary())
    assert asked_of(app).count(".") == 2


def _sealed(notary: Notary, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
    def answer(path: str, ask: dict[str, Any]) -> bytes:
        del path
        parts = notary.grant(ask).split(".")[:2]
        header, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in parts)
        return granted(change(header, claims))

    return answer


def test_a_claim_that_is_there_twice_is_refused_whatever_it_says(
    host: LyingHost, tmp_path: Path
) -> None:
    notary = Notary()
    app = app_of(host.url, state=tmp_path)

    def twice(header: dict[str, Any], claims: dict[str, Any]) -> str:
        text = json.dumps(claims)
        return notary.sealed(header, f'{{"aud": "https://maskinporten.no/", {text[1:]}')

    host.answer = _sealed(notary, twice)
    assert refusal(app).code == "grant-form"
    host.answer = _sealed(notary, notary.sealed)
    assert asked_of(app)


@pytest.mark.parametrize(
    "assertion",
    [None, 7, "", "a.b", "a.b.c.d", "a.b.c", "..", "e30.e30.", "ä.b.c", "a b.c.d", "A" * 70_000],
)
def test_what_is_no_assertion_is_refused(
    host: LyingHost, tmp_path: Path, assertion: object
) -> None:
    host.answer = lambda _path, _ask: http(200, {"assertion": assertion})
    assert refusal(app_of(host.url, state=tmp_path)).exit_code == 90


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff", b"{" * 100_000])
def test_an_answer_that_is_no_json_object_is_refused(
    host: LyingHost, tmp_path: Path, body: bytes
) -> None:
    host.answer = lambda _path, _ask: http(200, body)
    assert refusal(app_of(host.url, state=tmp_path)).exit_code == 90


def test_a_chain_with_a_stranger_or_out_of_order_is_refused(
    host: LyingHost, tmp_path: Path
) -> None:
    x5c = Notary().x5c
    stranger = base64.b64encode(pki.unrelated_ca().public_bytes(Encoding.DER)).decode()
    app = app_of(host.url, state=tmp_path)
    for shown, taken in (
        (x5c, True),
        (x5c[:2], True),
        (x5c[:1], True),
        ([*x5c, stranger], False),
        ([x5c[0], x5c[2], x5c[1]], False),
        ([x5c[0], x5c[1], x5c[1]], False),
        ([x5c[0], x5c[2]], False),
    ):
        host.answer = honest(Notary(header={"x5c": shown}))
        if taken:
            assert asked_of(app)
        else:
            assert refusal(app).code == "grant-certificate"


def test_a_certificate_of_another_organisation_is_refused_where_one_is_named(
    host: LyingHost, tmp_path: Path
) -> None:
    named = {"organization": pki.ESEAL_ORG_ID}
    app = app_of(host.url, state=tmp_path, signer=named)
    assert asked_of(app)
    host.answer = honest(Notary(leaf={"organization_id": "NTRSE-5500000000"}))
    assert refusal(app_of(host.url, state=tmp_path, signer=named)).code == "grant-organization"
    assert asked_of(app_of(host.url, state=tmp_path))
    # Where none is named, the first grant of a process names it.
    assert refusal(app).code == "grant-organization"


def test_pins_of_leaf_and_root_are_kept_to(host: LyingHost, tmp_path: Path) -> None:
    leaf = authority().issue(a_key().public_key())
    root = authority().root
    shown = [leaf, *authority().chain]
    x5c = [base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in shown]
    host.answer = honest(Notary(header={"x5c": x5c}))
    pins = {"certificate_sha256": leaf, "root_sha256": root}
    for name, pinned in pins.items():
        digest = _sha256(pinned)
        assert (
            app_of(host.url, state=tmp_path, hsm={name: digest})
            .signer.sign(ROAD, jti="1")
            .assertion
        )
        other = app_of(host.url, state=tmp_path, hsm={name: "00" * 32})
        assert refusal(other).code == "grant-certificate"


def _sha256(certificate: x509.Certificate) -> str:
    return str(certificate.fingerprint(hashes.SHA256()).hex())


def test_a_certificate_that_has_ended_is_refused(host: LyingHost, tmp_path: Path) -> None:
    ended = datetime.now(UTC) - timedelta(days=1)
    host.answer = honest(Notary(leaf={"not_after": ended, "not_before": ended - timedelta(9)}))
    assert refusal(app_of(host.url, state=tmp_path)).code == "grant-certificate"


def test_options_that_were_asked_for_must_be_in_the_grant(host: LyingHost, tmp_path: Path) -> None:
    app = app_of(host.url, state=tmp_path, iss="acme")
    asked = TokenRequest(ROAD.scope, ("https://a/", "https://b/"), "987654325")
    assert asked_of(app, asked)
    assert host.asked[-1] == {
        "profile": "acme", "scope": ROAD.scope, "consumer_org": "987654325",
        "resource": ["https://a/", "https://b/"],
    }  # fmt: skip
    for claims, code in (
        ({"resource": ["https://b/", "https://a/"]}, "grant-resource"),
        ({"resource": None}, "grant-resource"),
        ({"consumer_org": "987654326"}, "grant-consumer_org"),
        ({"consumer_org": None}, "grant-consumer_org"),
        ({"iss": "other"}, "grant-iss"),
    ):
        host.answer = honest(Notary(claims=claims))
        assert refusal(app, asked).code == code


def test_a_grant_is_taken_once(host: LyingHost, tmp_path: Path) -> None:
    app = app_of(host.url, state=tmp_path)
    kept = asked_of(app)
    host.answer = lambda _path, _ask: granted(kept)
    assert refusal(app).code == "grant-jti"
    fresh = Notary().grant(host.asked[-1])
    host.answer = lambda _path, _ask: granted(fresh, jti="another")
    assert refusal(app).code == "grant-jti"


@pytest.mark.parametrize("ahead", [-600, -60, 60, 600])
def test_a_host_with_a_wrong_clock_is_named_in_error_50(
    host: LyingHost, tmp_path: Path, ahead: int
) -> None:
    host.answer = honest(Notary(ahead=ahead))
    app = app_of(host.url, state=tmp_path)
    refused = refusal(app)
    assert (refused.exit_code, refused.code) == (50, "host-clock")
    assert host.url in str(refused)
    assert ("ahead of" if ahead > 0 else "behind") in str(refused)
    # What this machine knows of Maskinporten's clock counts, not what its own says.
    app.skew.learn(float(ahead))
    if abs(ahead) <= 300:
        assert asked_of(app)


def test_a_kid_is_taken_if_the_settings_name_it(host: LyingHost, tmp_path: Path) -> None:
    public = a_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    shown = {"x5c": None, "kid": "our-kid"}
    host.answer = honest(Notary(header=shown))
    norwegian: dict[str, Any] = {"identity": "norwegian", "iss": "acme", "state": tmp_path}
    hsm = {"public_key": tmp_path / "public.pem"}
    assert asked_of(app_of(host.url, **norwegian, kid="our-kid"))
    assert (
        app_of(host.url, **norwegian, kid="our-kid", hsm=hsm).signer.sign(ROAD, jti="1").assertion
    )
    assert asked_of(app_of(host.url, **norwegian, hsm=hsm))
    others: tuple[dict[str, Any], ...] = (
        {},
        {"kid": "another"},
        {"kid": "thumbprint"},
        {"kid": "thumbprint", "hsm": hsm},
    )
    for settings in others:
        assert refusal(app_of(host.url, **norwegian, **settings)).code == "grant-header"
    host.answer = honest(Notary(header=shown, key=rsa.generate_private_key(65537, 2048)))
    proven = app_of(host.url, **norwegian, kid="our-kid", hsm=hsm)
    assert refusal(proven).code == "grant-signature"


def test_a_grant_that_came_too_late_is_not_given_out() -> None:
    notary = Notary()
    ask = {"scope": ROAD.scope, "resource": None, "consumer_org": None}
    assertion = notary.grant(ask)
    iat = json.loads(base64.urlsafe_b64decode(assertion.split(".")[1] + "=="))["iat"]
    expected = Expected(audience=ISSUER, family="eseal")
    assert verify_grant(assertion, ROAD, expected, sent=iat, received=iat + 89.0)
    with pytest.raises(errors.DeviceError, match="too late"):
        verify_grant(assertion, ROAD, expected, sent=iat, received=iat + 91.0)


# ------------------------------------------------------------------ what it says instead


@pytest.mark.parametrize(
    ("status", "word", "kind", "wait"),
    [
        (403, "policy_denied", errors.PolicyDenied, None),
        (403, "stopped", errors.PolicyDenied, None),
        (400, "bad_request", errors.PolicyDenied, None),
        (413, "too_large", errors.PolicyDenied, None),
        (415, "unsupported_media_type", errors.PolicyDenied, None),
        (401, "a_word_of_a_newer_host", errors.PolicyDenied, None),
        (429, "quota_exceeded", errors.TryAgainLater, 37.0),
        (503, "busy", errors.TryAgainLater, 37.0),
        (503, "a_word_of_a_newer_host", errors.TryAgainLater, 37.0),
        (503, "device_down", errors.DeviceError, 37.0),
        (503, "audit_broken", errors.AuditBroken, 37.0),
        (503, "clock", errors.ClockError, 37.0),
        (503, "network", errors.NetworkError, 37.0),
        (502, "grant_refused", errors.GrantRefused, None),
        (502, "exchange_refused", errors.ExchangeRefused, None),
        (500, "internal", errors.NetworkError, 37.0),
        (404, "not_found", errors.NetworkError, None),
        (426, "version", errors.NetworkError, None),
        (307, "moved", errors.NetworkError, 37.0),
    ],
)
def test_each_word_of_a_host_is_an_error_of_its_class(
    host: LyingHost, tmp_path: Path, status: int, word: str, kind: type[HsmTollError], wait: float
) -> None:
    host.answer = lambda _path, _ask: error_reply(
        status, word, f"why \x1b[31m {CANARY}", Retry_After="37", Location="http://127.0.0.1:9/"
    )
    refused = refusal(app_of(host.url, state=tmp_path))
    assert type(refused) is kind
    assert refused.retry_after == wait
    assert "\x1b" not in str(refused)
    assert len(host.asked) == 1
    if status not in (404, 426):
        assert CANARY in str(refused)


@pytest.mark.parametrize(("version", "taken"), [("0", 1), ("1", 1), ("2", 1), ("3", 0), ("", 1)])
def test_a_host_one_version_away_is_understood(
    host: LyingHost, tmp_path: Path, version: str, taken: int
) -> None:
    notary = Notary()
    body = {"expires_in": 118, "new": [1], "jti": None}

    def answer(_path: str, ask: dict[str, Any]) -> bytes:
        more = {**body, "assertion": notary.grant(ask)}
        del more["jti"]
        return http(200, more, Hsmtoll_Version=version)

    host.answer = answer
    app = app_of(host.url, state=tmp_path)
    if taken:
        assert asked_of(app)
    else:
        refused = refusal(app)
        assert (refused.exit_code, refused.code) == (80, "host-version")
        assert "version 3" in str(refused)


def _always(answer: bytes) -> Callable[[str, dict[str, Any]], bytes]:
    return lambda _path, _ask: answer


def _slowly(raw: bytes, host: LyingHost) -> Iterator[bytes]:
    for byte in raw:
        yield bytes([byte])
        host.rest(0.5)


def test_an_answer_that_is_cut_off_too_large_or_never_ends_is_a_network_error(
    host: LyingHost, tmp_path: Path
) -> None:
    app = app_of(host.url, state=tmp_path, deadline=3.0)
    whole = http(200, {"assertion": "x" * 200})
    for answer in (b"", whole[:-50], b"SSH-2.0-x\r\n", http(200, b"x" * (1 << 21))):
        host.answer = _always(answer)
        assert refusal(app).exit_code == 80
    host.answer = lambda _path, _ask: _slowly(whole, host)
    refused = refusal(app)
    assert (refused.exit_code, refused.code) == (80, "deadline")
    assert "HSMTOLL_DEADLINE" in str(refused.hint)
    host.answer = honest(Notary())
    assert asked_of(app)


# ------------------------------------------------------------------ mode=token


def test_a_token_of_a_host_is_taken_with_the_time_it_has_left(
    host: LyingHost, tmp_path: Path
) -> None:
    app = app_of(host.url, state=tmp_path, signer={"mode": "token"})
    with app.client() as client:
        token = client.token("road")
        assert (token.value, token.lifetime, token.scope) == ("host-token", 512, ROAD.scope)
        assert client.token("road").value == "host-token"
        assert client.status().signatures == 0
    assert len(host.asked) == 1
    refused = refusal(app)
    assert (refused.exit_code, refused.code) == (10, "mode-token")


@pytest.mark.parametrize(
    "change",
    [
        {"scope": "toll:other"}, {"scope": None}, {"access_token": "a b"}, {"access_token": None},
        {"expires_in": 0}, {"expires_in": -5}, {"expires_in": 86_401}, {"expires_in": "9"},
        {"expires_in": True}, {"token_type": "mac"},
    ],
)  # fmt: skip
def test_a_token_that_cannot_be_right_is_refused(
    host: LyingHost, tmp_path: Path, change: dict[str, Any]
) -> None:
    right = {
        "access_token": CANARY, "token_type": "Bearer", "expires_in": 100, "scope": ROAD.scope
    }  # fmt: skip
    app = app_of(host.url, state=tmp_path, signer={"mode": "token"})
    host.answer = lambda _path, _ask: http(200, {**right, **change})
    with app.client() as client, pytest.raises(errors.PolicyDenied) as caught:
        client.token("road")
    assert CANARY not in f"{caught.value} {caught.value.hint}"
    host.answer = lambda _path, _ask: http(200, {**right, "and": "more"})
    with app_of(host.url, state=tmp_path, signer={"mode": "token"}).client() as client:
        assert client.token("road").value == CANARY


# ------------------------------------------------------------------ who answers


def test_only_the_account_that_is_expected_is_asked(host: LyingHost, tmp_path: Path) -> None:
    me = os.geteuid()
    assert asked_of(app_of(host.url, state=tmp_path, signer={"uid": me}))
    before = len(host.asked)
    refused = refusal(app_of(host.url, state=tmp_path, signer={"uid": me + 4711}))
    assert (refused.exit_code, refused.code) == (90, "host-peer")
    assert len(host.asked) == before


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_socket_that_others_could_replace_is_not_asked(tmp_path: Path, mode: int) -> None:
    inner = tmp_path / "inner"
    inner.mkdir(0o700)
    with LyingHost(inner / "s") as other:
        app = app_of(other.url, state=tmp_path)
        assert asked_of(app)
        inner.chmod(mode)
        refused = refusal(app)
        assert (refused.exit_code, refused.code) == (90, "socket-unsafe")
        inner.chmod(0o750)
        assert asked_of(app)
        assert len(other.asked) == 2


def test_a_link_in_a_place_that_others_may_write_is_not_followed(
    host: LyingHost, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    assert host.place is not None
    (shared / "link").symlink_to(host.place)
    app = app_of(f"unix://{shared}/link", state=tmp_path)
    assert asked_of(app)
    shared.chmod(0o777)
    assert refusal(app).code == "socket-unsafe"


# The interpreter may lie where the other account cannot look: it is started first.
_AS_ANOTHER = """
import sys
from pathlib import Path
from tests.kit.accounts import become
from tests.kit.scripted_host import LyingHost
become(int(sys.argv[2]))
with LyingHost(Path(sys.argv[1])):
    print("up", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def host_of(uid: int, place: Path) -> Iterator[str]:
    """A host that runs as another account; its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", _AS_ANOTHER, str(place), str(uid)], text=True,
        env={**os.environ, **importable()},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield f"unix://{place}"
        finally:
            assert process.stdin is not None
            process.stdin.close()


@pytest.mark.needs_root
def test_a_host_of_another_account_is_known_by_the_directory_that_root_gave_it(
    tmp_path: Path,
) -> None:
    """Root makes the directory and gives it away; in /tmp anybody could have made it."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as top,
        tempfile.TemporaryDirectory(dir="/tmp") as loose,
    ):
        given, taken = Path(top) / "given", Path(loose)
        Path(top).chmod(0o755)
        given.mkdir(0o755)
        for place in (given, taken):
            os.chown(place, 4711, 4711)
        taken.chmod(0o755)
        with host_of(4711, given / "s") as url:
            assert asked_of(app_of(url, state=tmp_path))
            assert (
                app_of(url, state=tmp_path, signer={"uid": 4711})
                .signer.sign(ROAD, jti="1")
                .assertion
            )
            assert refusal(app_of(url, state=tmp_path, signer={"uid": 0})).exit_code == 90
        with host_of(4711, taken / "s") as url:
            assert refusal(app_of(url, state=tmp_path)).code == "socket-unsafe"
            assert (
                app_of(url, state=tmp_path, signer={"uid": 4711})
                .signer.sign(ROAD, jti="1")
                .assertion
            )


@pytest.mark.needs_root
def test_an_account_that_this_side_cannot_name_is_refused_even_if_it_is_expected(
    tmp_path: Path,
) -> None:
    with tempfile.TemporaryDirectory() as top:
        place = Path(top)
        place.chmod(0o755)
        os.chown(place, 65534, 65534)
        with host_of(65534, place / "s") as url:
            refused = refusal(app_of(url, state=tmp_path, signer={"uid": 65534}))
    assert (refused.exit_code, refused.code) == (90, "host-peer")
    assert "namespace" in str(refused)


def test_tokens_of_other_machines_sockets_and_starts_are_never_taken_for_ours(
    tmp_path: Path,
) -> None:
    clock = SettableClock.at_real_time()
    names = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        settings = SignerHost(url=(f"unix://{tmp_path}/{name}/s",), profile="acme")
        hosts = FailoverHosts([SigningHost(settings.url[0], settings, clock=clock)], clock)
        assert hosts.provisional_identity() == hosts.provisional_identity()
        names.add(hosts.provisional_identity())
    clock.reboot()
    names.add(hosts.provisional_identity())
    assert len(names) == 3


def test_no_socket_and_nobody_behind_it_are_network_errors(tmp_path: Path) -> None:
    missing = app_of(f"unix://{tmp_path}/none", state=tmp_path)
    assert (refusal(missing).exit_code, refusal(missing).code) == (80, "unreachable")
    with LyingHost(tmp_path / "gone.sock") as gone:
        gone.stop()
        assert refusal(app_of(gone.url, state=tmp_path)).code == "refused"


@pytest.fixture
def ca(tmp_path: Path) -> Ca:
    """The CA of hosts and callers."""
    return Ca(tmp_path / "ca")


def tls_of(ca: Ca, **more: Any) -> dict[str, Any]:
    """Settings of a caller that *ca* has certified."""
    certificate, key = ca.issue("caller.example")
    return {"client_cert": certificate, "client_key": key, "ca_file": ca.file, **more}


def test_over_tls_both_sides_show_certificates(ca: Ca, tmp_path: Path) -> None:
    with LyingHost(tls=ca.server("localhost")) as host:
        assert (
            app_of(host.url, state=tmp_path, signer=tls_of(ca)).signer.sign(ROAD, jti="1").assertion
        )
        stranger = Ca(tmp_path / "stranger")
        unknown = tls_of(ca, ca_file=stranger.file)
        refused = refusal(app_of(host.url, state=tmp_path, signer=unknown))
        assert (refused.exit_code, refused.code) == (90, "host-untrusted")
        assert "HSMTOLL_SIGNER__CA_FILE" in str(refused.hint)
        assert "is not trusted" in str(refused)
        # Without a CA of its own the system's are asked, which do not know it either.
        refused = refusal(app_of(host.url, state=tmp_path, signer=tls_of(ca, ca_file=None)))
        assert refused.code == "host-untrusted"
        assert len(host.asked) == 1
        not_ours = tls_of(stranger, ca_file=ca.file)
        refused = refusal(app_of(host.url, state=tmp_path, signer=not_ours))
        assert (refused.exit_code, refused.code) == (90, "caller-untrusted")
        assert len(host.asked) == 1


def test_a_certificate_for_another_name_and_an_older_tls_are_refused(
    ca: Ca, tmp_path: Path
) -> None:
    old = ca.server("localhost", newest=ssl.TLSVersion.TLSv1_2)
    name = "its TLS certificate is for another name"
    for context, why in ((ca.server("other.example"), name), (old, "it does not speak TLS 1.3")):
        with LyingHost(tls=context) as host:
            refused = refusal(app_of(host.url, state=tmp_path, signer=tls_of(ca)))
            assert (refused.exit_code, refused.code) == (90, "host-untrusted")
            assert str(refused).endswith(why)
            assert ("HSMTOLL_SIGNER__URL" in str(refused.hint)) == (why == name)
            assert not host.asked


def test_neither_proxies_nor_the_environment_lead_astray(
    host: LyingHost, ca: Ca, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    proxied: dict[str, Any] = {"proxy": "environment", "state": tmp_path}
    with LyingHost(tls=ca.server("localhost")) as other:
        assert asked_of(app_of(other.url, signer=tls_of(ca), **proxied))
        assert asked_of(app_of(host.url, **proxied))
    assert not (tmp_path / "keys").exists()


def test_a_key_file_that_others_may_write_is_refused(ca: Ca, tmp_path: Path) -> None:
    with LyingHost(tls=ca.server("localhost")) as host:
        caller = tls_of(ca)
        caller["client_key"].chmod(0o620)
        assert refusal(app_of(host.url, state=tmp_path, signer=caller)).exit_code == 10
        caller["client_key"].chmod(0o600)
        assert asked_of(app_of(host.url, state=tmp_path, signer=caller))
        caller["client_key"].write_text("no key")
        refused = refusal(app_of(host.url, state=tmp_path, signer=caller))
        assert refused.exit_code == 10
        assert "HSMTOLL_SIGNER__CLIENT_KEY" in str(refused)


# ------------------------------------------------------------------ several hosts


def test_the_second_host_signs_while_the_first_is_down_and_the_first_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "hsmtoll.signing.remote")
    clock = SettableClock.at_real_time()
    with LyingHost(tmp_path / "a.sock") as first, LyingHost(tmp_path / "b.sock") as second:
        app = app_of(first.url, second.url, state=tmp_path)
        app.clock = clock
        first.answer = second.answer = honest(Notary(now=lambda: clock.now().wall))

        def who() -> tuple[int, int]:
            assert asked_of(app)
            return len(first.asked), len(second.asked)

        assert who() == (1, 0)
        first.stop()
        assert who() == (1, 1)
        assert who() == (1, 2)
        # It is back, and left to rest: the second signs on.
        first.start()
        assert who() == (1, 3)
        assert len(caplog.records) == 1
        clock.advance(11)
        assert who() == (2, 3)
        assert who() == (3, 3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert second.url in lines[0]
    assert "2 of 2" in lines[0]
    assert "refused" in lines[0]
    assert first.url in lines[1]


@pytest.mark.parametrize(
    ("status", "word", "goes_on"),
    [
        (503, "device_down", True),
        (503, "audit_broken", True),
        (503, "clock", True),
        (503, "busy", True),
        (500, "internal", True),
        (403, "policy_denied", False),
        (403, "stopped", False),
        (429, "quota_exceeded", False),
        (502, "grant_refused", False),
    ],
)
def test_a_no_is_not_gone_around_and_trouble_is(
    tmp_path: Path, status: int, word: str, goes_on: bool
) -> None:
    with LyingHost(tmp_path / "a.sock") as first, LyingHost(tmp_path / "b.sock") as second:
        first.answer = lambda _path, _ask: error_reply(status, word)
        app = app_of(first.url, second.url, state=tmp_path)
        if goes_on:
            assert asked_of(app)
        else:
            refusal(app)
        assert len(second.asked) == goes_on


def test_a_host_that_lies_is_an_alarm_and_not_gone_around(tmp_path: Path) -> None:
    with LyingHost(tmp_path / "a.sock") as first, LyingHost(tmp_path / "b.sock") as second:
        first.answer = honest(Notary(claims={"aud": "x"}))
        assert refusal(app_of(first.url, second.url, state=tmp_path)).code == "grant-aud"
        assert not second.asked


def test_the_first_hosts_error_is_told_where_none_works(tmp_path: Path) -> None:
    with LyingHost(tmp_path / "a.sock") as first:
        first.answer = lambda _path, _ask: error_reply(503, "device_down")
        app = app_of(first.url, f"unix://{tmp_path}/none", state=tmp_path)
        assert [refusal(app).exit_code for _ in range(3)] == [30, 30, 30]


# ------------------------------------------------------------------ what it costs


def test_a_refusal_gives_its_signature_back_and_a_lost_answer_does_not(
    host: LyingHost, tmp_path: Path
) -> None:
    app = app_of(host.url, state=tmp_path, budget={"per_hour": 2, "per_request": 1})
    ask = app.renewal_by(app.signer).sign
    for word in ("policy_denied", "quota_exceeded", "device_down"):
        host.answer = _always(error_reply(403 if "policy" in word else 503, word))
        for _ in range(3):
            with pytest.raises(HsmTollError):
                ask(ROAD)
    host.answer = lambda _path, _ask: b""
    with pytest.raises(errors.NetworkError):
        ask(ROAD)
    host.answer = honest(Notary())
    ask(ROAD)
    # As long as it was not known who signs, the settings were counted.
    with pytest.raises(errors.TryAgainLater):
        app.rate_limit.acquire(app.selector)
