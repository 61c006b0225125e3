"""The commands a user runs, judged by a JOSE library and by openssl, never by our own code."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jws as jose
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from tests.kit import commands
from tests.kit.customs_messages import message

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings
    from hsmtoll.testing.identity import TemporaryIdentity
    from hsmtoll.testing.softhsm import SoftHsm

pytestmark = pytest.mark.usefixtures("toll_settings")


def hsmtoll(*argv: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """One command, in a process of its own."""
    return commands.hsmtoll(*argv, stdin=stdin, env={**os.environ, **variables})


def printed(*argv: str, stdin: str = "", **variables: str) -> str:
    """What a command that succeeds prints."""
    done = hsmtoll(*argv, stdin=stdin, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _judge(alg: str) -> jose.JWSRegistry:
    judge = jose.JWSRegistry(algorithms=[alg])
    judge.max_header_length = 32_000  # its default has no room for three certificates
    return judge


def _leaf(assertion: str) -> x509.Certificate:
    header = json.loads(base64.urlsafe_b64decode(assertion.split(".", maxsplit=1)[0] + "=="))
    return x509.load_der_x509_certificate(base64.b64decode(header["x5c"][0], validate=True))


@pytest.mark.parametrize("alg", ["RS256", "RS384", "RS512"])
def test_an_assertion_is_taken_by_a_jose_library_and_not_with_a_changed_byte(alg: str) -> None:
    before = time.time()
    assertion = printed("sign", "road", HSMTOLL_ALG=alg)
    after = time.time()
    key = RSAKey.import_key(
        _leaf(assertion).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )

    claims = json.loads(jose.deserialize_compact(assertion, key, registry=_judge(alg)).payload)

    assert set(claims) == {"aud", "iss", "scope", "iat", "exp", "jti"}
    assert claims["scope"] == "toll:eu/movement/road/v2"
    assert claims["exp"] - claims["iat"] == 120
    assert int(before) <= claims["iat"] <= after
    head, body, signature = assertion.split(".")
    changed = json.dumps({**claims, "scope": "toll:eu/movement/air"}).encode()
    body = base64.urlsafe_b64encode(changed).rstrip(b"=").decode()
    with pytest.raises(JoseError):
        jose.deserialize_compact(f"{head}.{body}.{signature}", key, registry=_judge(alg))


def test_openssl_takes_the_signature_and_the_chain(
    tmp_path: Path, toll_eseal: TemporaryIdentity
) -> None:
    assertion = printed("sign", "road")
    signed, _, signature = assertion.rpartition(".")
    header = json.loads(base64.urlsafe_b64decode(assertion.split(".", maxsplit=1)[0] + "=="))
    chain = [x509.load_der_x509_certificate(base64.b64decode(each)) for each in header["x5c"]]
    assert set(header) == {"alg", "x5c"}
    assert chain == list(toll_eseal.chain)

    for name, certificate in zip(("leaf", "intermediate", "root"), chain, strict=True):
        (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    public = chain[0].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    (tmp_path / "signature").write_bytes(base64.urlsafe_b64decode(signature + "=="))
    (tmp_path / "signed").write_text(signed)
    (tmp_path / "changed").write_text(signed[:-1] + ("A" if signed[-1] != "A" else "B"))

    def openssl(*argv: str) -> int:
        return subprocess.run(
            ["openssl", *argv], cwd=tmp_path, capture_output=True, check=False
        ).returncode

    verify = ("dgst", "-sha256", "-verify", "public.pem", "-signature", "signature")
    assert openssl(*verify, "signed") == 0
    assert openssl(*verify, "changed") != 0
    path = ("verify", "-CAfile", "root.pem", "-untrusted", "intermediate.pem")
    assert openssl(*path, "leaf.pem") == 0
    assert openssl("verify", "-CAfile", "root.pem", "leaf.pem") != 0


def test_a_token_is_customs_own_by_a_jose_library(toll_sandbox: Sandbox) -> None:
    before = time.time()
    output = json.loads(printed("token", "road", "--json"))
    after = time.time()

    assert set(output) == {"schema", "access_token", "token_type", "expires_in", "scope"}
    assert (output["schema"], output["token_type"]) == (1, "Bearer")
    assert output["scope"] == "toll:eu/movement/road/v2"
    assert 0 < output["expires_in"] <= 600
    key = RSAKey.import_key(_customs_key(toll_sandbox))
    claims = json.loads(
        jose.deserialize_compact(output["access_token"], key, algorithms=["RS512"]).payload
    )
    assert claims["sub"] == "NTRSE-5566778899"
    # It may expire later than it says: whole seconds, counted from the moment of asking, and
    # Customs says one second less than remains.
    expires = claims["exp"] - output["expires_in"]
    assert before - 1 <= expires <= after + (after - before) + 2
    stranger = RSAKey.generate_key(2048)
    with pytest.raises(JoseError):
        jose.deserialize_compact(output["access_token"], stranger, algorithms=["RS512"])


def _customs_key(sandbox: Sandbox) -> bytes:
    key: Any = sandbox._services._customs_key
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def test_the_token_is_printed_in_the_form_asked_for() -> None:
    bare = printed("token", "road")

    assert printed("token", "--scope", "road") == bare
    assert printed("token", "--api", "toll:eu/movement/road/v2") == bare
    assert printed("token", HSMTOLL_SCOPE="road") == bare
    assert printed("token", "road", "--header") == f"Authorization: Bearer {bare}"
    assert printed("token", "air") != bare


def test_a_second_command_spends_nothing(toll_sandbox: Sandbox) -> None:
    printed("token", "road")
    printed("token", "road", "--json")
    printed("test-auth", "road")

    kinds = [each.kind for each in toll_sandbox.received]
    assert (kinds.count("grant"), kinds.count("exchange")) == (1, 1)
    time.sleep(1.1)
    assert printed("token", "road", "--renew")
    assert [each.kind for each in toll_sandbox.received].count("grant") == 2


def test_a_warm_cache_needs_neither_device_nor_network(
    toll_sandbox: Sandbox, toll_softhsm: SoftHsm
) -> None:
    first = printed("token", "road")
    toll_sandbox.stop()
    gone = toll_softhsm.conf.with_suffix(".gone")
    toll_softhsm.conf.rename(gone)
    try:
        again = printed("token", "road")
        other = hsmtoll("token", "air")
    finally:
        gone.rename(toll_softhsm.conf)

    assert again == first
    # The control: one that is not there needs both, and looks first whether it could be sent.
    assert other.returncode == 10
    assert "HSMTOLL_CA_FILE" in other.stderr


def test_what_was_signed_on_one_host_is_exchanged_on_another(toll_sandbox: Sandbox) -> None:
    assertion = printed("sign", "road")
    assert toll_sandbox.received == []

    elsewhere = {name: "" for name in os.environ if name.startswith("HSMTOLL_HSM__")}
    output = json.loads(printed("exchange", "--json", stdin=assertion, **elsewhere))

    assert output["scope"] == "toll:eu/movement/road/v2"
    again = hsmtoll("exchange", stdin=assertion, **elsewhere)
    assert again.returncode == 60
    assert "MP-012" in again.stderr


def test_an_assertion_for_another_environment_is_not_sent(toll_sandbox: Sandbox) -> None:
    assertion = printed("sign", "road", HSMTOLL_ENVIRONMENT="test", **_no_endpoints())

    refused = hsmtoll("exchange", stdin=assertion)

    assert refused.returncode == 10
    assert "https://test.maskinporten.no/" in refused.stderr
    assert toll_sandbox.received == []


def _no_endpoints() -> dict[str, str]:
    return {name: "" for name in os.environ if name.startswith("HSMTOLL_ENDPOINTS__")}


def test_the_self_test_scope_stops_before_the_exchange(toll_sandbox: Sandbox) -> None:
    granted = hsmtoll("test-auth", "verksemd.eu")
    refused = hsmtoll("token", "verksemd.eu")

    assert (granted.returncode, granted.stdout) == (0, "granted digdir:verksemd.eu\n")
    assert refused.returncode == 70
    assert "stopped before the exchange" in refused.stderr
    assert "exchange" not in [each.kind for each in toll_sandbox.received]


def test_a_call_prints_its_body_and_finds_its_scope(toll_sandbox: Sandbox) -> None:
    toll_sandbox.signal("NTRSE-5566778899")
    body = json.loads(printed("call", "GET", "/api/movement/routing/v1/house-consignment"))

    assert body[0]["routingResult"]["routing"] == "TO_ENTRY"
    assert toll_sandbox.received[0].claims is not None
    assert toll_sandbox.received[0].claims["scope"] == "toll:eu/movement/entry"


def test_a_submission_prints_its_request_id_and_then_its_mrn(tmp_path: Path) -> None:
    given = message("transport", "X1")
    file = tmp_path / "message.json"
    file.write_text(json.dumps(given))
    done = hsmtoll("submit", "road", "POST", "transport", f"@{file}")

    assert done.returncode == 0
    assert done.stderr.startswith("hsmtoll: accepted, requestId ")
    word, mrn = done.stdout.split()
    assert (word, len(mrn)) == ("SUCCESS", 18)
    bad = json.dumps(message("transport", "X2", consignee={"country": "XX"}))
    failed = hsmtoll("submit", "road", "POST", "transport", stdin=bad)
    assert failed.returncode == 72
    assert "hint: consignee.country: Country is invalid" in failed.stderr


def test_the_chain_is_shown_leaf_first_in_three_forms(toll_eseal: TemporaryIdentity) -> None:
    listed = json.loads(printed("chain", "--json"))

    assert [each["sha256"] for each in listed] == [_sha256(each) for each in toll_eseal.chain]
    members = {"subject", "issuer", "serial", "not_before", "not_after", "sha256"}
    assert members <= set(listed[0])
    assert int(listed[0]["serial"], 16) == toll_eseal.chain[0].serial_number
    pem = x509.load_pem_x509_certificates(printed("chain", "--pem").encode())
    assert pem == list(toll_eseal.chain)
    assert "it ends at a root" in printed("chain")


def test_the_chain_is_shown_as_the_settings_send_it(toll_eseal: TemporaryIdentity) -> None:
    listed = json.loads(printed("chain", "--json", HSMTOLL_X5C="without-root"))
    assert [each["sha256"] for each in listed] == [_sha256(each) for each in toll_eseal.chain[:-1]]
    pem = printed("chain", "--pem", HSMTOLL_X5C="without-root")
    assert x509.load_pem_x509_certificates(pem.encode()) == list(toll_eseal.chain[:-1])
    output = printed("chain", HSMTOLL_X5C="without-root")
    assert "it ends at a root" in output
    assert "sent: the first 2 (HSMTOLL_X5C is without-root)" in output
    assert "sent:" not in printed("chain")


def _sha256(certificate: x509.Certificate) -> str:
    import hashlib

    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def test_objects_shows_uris_that_can_be_pasted(toll_settings: Settings) -> None:
    output = json.loads(printed("objects", "--json"))
    keys = [key for device in output["p11_tokens"] for key in device["keys"]]
    (mine,) = [key for key in keys if "object=eseal;" in key["uri"]]

    assert mine["sensitive"] is True
    assert mine["extractable"] is False
    assert printed("chain", "--json", HSMTOLL_HSM__KEY=mine["uri"])
    without_pin = printed("objects", HSMTOLL_HSM__PIN_FILE="")
    assert "private keys do not show without a PIN" in without_pin
    assert "PIN: not locked" in without_pin
    assert "PIN ok" not in without_pin + printed("objects")
    assert toll_settings.hsm.key[0].split(";", maxsplit=1)[0].partition("token=")[2] in without_pin


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_objects_shows_the_rest_and_fails_where_the_pin_cannot_be_had(
    tmp_path: Path, isolation: str
) -> None:
    variables = {
        "HSMTOLL_HSM__PIN_FILE": str(tmp_path / "none"), "HSMTOLL_HSM__ISOLATION": isolation,
    }  # fmt: skip
    lines, as_json = hsmtoll("objects", **variables), hsmtoll("objects", "--json", **variables)

    assert (lines.returncode, as_json.returncode) == (10, 10)
    assert "PIN: not locked" in lines.stdout
    assert "private keys do not show: the PIN file" in lines.stdout
    assert "  cert pkcs11:" in lines.stdout
    assert lines.stderr.startswith("hsmtoll: pin-source: the PIN file ")
    assert json.loads(as_json.stdout)["p11_tokens"]
    assert json.loads(as_json.stderr)["error"] == "pin-source"


def test_a_test_call_without_a_word_is_of_the_default_as_a_token_is() -> None:
    for command in ("token", "test-auth"):
        done = hsmtoll(command, HSMTOLL_SCOPE="")
        assert (done.returncode, "HSMTOLL_SCOPE: required" in done.stderr) == (10, True)
        assert hsmtoll(command, HSMTOLL_SCOPE="road").returncode == 0


def test_doctor_is_silent_on_what_is_good_and_leaves_with_the_class_of_what_is_not() -> None:
    report = json.loads(printed("doctor", "--json"))

    assert report["schema"] == 1
    assert {each["verdict"] for each in report["checks"]} <= {"ok", "skip"}
    bad = hsmtoll("doctor", "--json", HSMTOLL_HSM__KEY="pkcs11:token=nobody;object=x")
    assert bad.returncode == 30
    assert "fail" in {each["verdict"] for each in json.loads(bad.stdout)["checks"]}


def test_what_is_done_is_one_json_object_where_that_is_asked_for(tmp_path: Path) -> None:
    assert json.loads(printed("test-auth", "road", "--json")) == {
        "schema": 1, "api": "road", "status": 200,
    }  # fmt: skip
    granted = json.loads(printed("test-auth", "verksemd.eu", "--json"))
    assert granted["granted"] == "digdir:verksemd.eu"
    file = tmp_path / "message.json"
    # A file may be written with and without the @.
    for number, name in (("J1", str(file)), ("J2", f"@{file}")):
        file.write_text(json.dumps(message("transport", number)))
        output = json.loads(printed("submit", "road", "POST", "transport", name, "--json"))
        assert (output["schema"], output["result"], len(output["mrn"])) == (1, "SUCCESS", 18)
        assert output["request_id"]
    (tmp_path / "invoice.txt").write_text("4711")
    argv = ("--type", "invoice", "--json")
    output = json.loads(
        printed("upload", "123456789-01092026-1", f"@{tmp_path}/invoice.txt", *argv)
    )
    assert output["answer"]["documentId"]
    assert json.loads(printed("pin", "clear", "--json")) == {
        "schema": 1, "forgotten": 0, "devices": 1,
    }  # fmt: skip


def test_a_call_shows_its_status_and_headers_or_that_there_is_no_body() -> None:
    path = "/api/movement/road/v2/test-auth"
    shown = printed("call", "GET", path, "-i").splitlines()
    assert shown[0].startswith("HTTP/1.1 200")
    assert any(line.lower().startswith("content-") for line in shown)
    plain = hsmtoll("call", "GET", path)
    assert (plain.returncode, plain.stdout) == (0, "")
    assert plain.stderr == "hsmtoll: 200 OK: the body of the answer is empty\n"
    refused = hsmtoll("call", "GET", "/api/movement/road/v2/nowhere", "--include")
    assert refused.returncode == 71
    assert refused.stdout.startswith("HTTP/1.1 404")


def test_a_result_that_does_not_come_in_the_time_given_is_unknown() -> None:
    given = json.dumps(message("transport", "T1"))
    done = hsmtoll("submit", "road", "POST", "transport", given, "--timeout", "0.5")
    assert done.returncode == 73
    assert "accepted, requestId" in done.stderr
    assert "no result after 0 s" in done.stderr
    # The control.
    given = json.dumps(message("transport", "T2"))
    assert hsmtoll("submit", "road", "POST", "transport", given).returncode == 0


def test_a_message_that_is_no_json_is_told_where(tmp_path: Path) -> None:
    file = tmp_path / "message.json"
    file.write_text('{\n  "a": 1,\n  "b" 2\n}')
    done = hsmtoll("submit", "road", "POST", "transport", str(file))
    assert done.returncode == 2
    assert "(line 3, column 7)" in done.stderr
    path = "/api/movement/road/v2/transport"
    done = hsmtoll("call", "POST", path, "--json-data", str(file))
    assert done.returncode == 2
    assert f"did you mean @{file}?" in done.stderr
    done = hsmtoll("submit", "road", "POST", "transport", "@~/message.json")
    assert done.returncode == 2
    assert "~ is not expanded here" in done.stderr


def test_an_import_reads_stdin_and_tells_its_file(
    tmp_path: Path, toll_eseal: TemporaryIdentity
) -> None:
    chain = b"".join(each.public_bytes(Encoding.DER) for each in toll_eseal.chain[:1])
    argv = [sys.executable, "-m", "hsmtoll", "key", "import"]
    done = subprocess.run([*argv, "-"], input=chain, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b": there already\n") == 3
    (tmp_path / "x.p12").write_bytes(bytes.fromhex("3003020103"))
    refused = hsmtoll("key", "import", str(tmp_path / "x.p12"))
    assert refused.returncode == 10
    assert "PKCS#12" in refused.stderr
    assert "hint: take the certificates out: openssl pkcs12" in refused.stderr
    assert hsmtoll("key", "import", str(tmp_path / "nowhere")).returncode == 2


def test_a_pin_that_was_not_meant_so_costs_no_try(tmp_path: Path, toll_settings: Settings) -> None:
    right = toll_settings.hsm.pin_file
    assert right is not None
    pin = tmp_path / "pin"
    for form in ("{} \n", "'{}'", "PIN={}"):
        pin.write_text(form.format(right.read_text().strip()))
        pin.chmod(0o600)
        own = {"HSMTOLL_HSM__PIN_FILE": str(pin), "HSMTOLL_STATE": str(tmp_path / "state")}
        done = hsmtoll("sign", "road", **own)
        assert done.returncode == 10
        assert "pin-form" in done.stderr
    # None of them was tried, or it would not be tried again, or be locked at last.
    pin.write_text(right.read_text())
    assert hsmtoll("sign", "road", **own).returncode == 0
