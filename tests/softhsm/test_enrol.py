"""Enrolment on a device: openssl and pkcs11-tool judge what was made there."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from cryptography import x509
from joserfc.jwk import RSAKey

from hsmtoll import doctor, enrolment
from hsmtoll.cli import main
from hsmtoll.cli.device import key
from hsmtoll.errors import CertificateError, ConfigurationError, DeviceError, UsageError
from hsmtoll.sandbox.pki import Authority, eseal_authority, norwegian_authority, pem, unrelated_ca
from tests.kit.own_device import PIN, Lab, make_lab

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from hsmtoll.app import App
    from tests.softhsm.conftest import DeviceSoftHsm

NOW = datetime.now(UTC)
SUBJECT = {
    "country": "SE",
    "organization": "Exempel Åkeri AB",
    "common_name": "Exempel Åkeri",
    "organization_identifier": "NTRSE-5566778899",
}


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    """An empty device."""
    return make_lab(device_softhsm.module, device_softhsm.environment, "enrol")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return eseal_authority()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def app(lab: Lab, state: Path) -> App:
    """With a key made on the device, called acme."""
    made = lab.app("acme", state)
    enrolment.generate(made.devices[0], bits=2048, id=b"\x01")
    return made


def certified(app: App, authority: Authority) -> x509.Certificate:
    request = x509.load_pem_x509_csr(enrolment.csr(app.devices[0], **SUBJECT).encode())
    key = request.public_key()
    from cryptography.hazmat.primitives.asymmetric import rsa

    assert isinstance(key, rsa.RSAPublicKey)
    return authority.issue(key)


def test_a_key_made_here_signs_and_does_nothing_else(app: App, lab: Lab) -> None:
    del app
    attributes = lab.attributes("acme")
    able = {"DECRYPT", "UNWRAP", "SIGN_RECOVER", "DERIVE", "ENCRYPT", "WRAP", "VERIFY_RECOVER"}
    assert {name for name in able if attributes[name]} == set()
    assert attributes["SENSITIVE"]
    assert attributes["NEVER_EXTRACTABLE"]
    assert attributes["LOCAL"]
    assert attributes["SIGN"]
    assert not attributes["EXTRACTABLE"]
    # The control: a key made by another tool's defaults can do more, and that is seen.
    lab.generate(other={})
    assert lab.attributes("other")["DECRYPT"]


def test_the_uri_that_is_returned_finds_the_key(lab: Lab, state: Path) -> None:
    app = lab.app("uri", state)
    uri = enrolment.generate(app.devices[0], bits=2048)
    assert (uri.token, uri.object, uri.type) == (lab.label, "uri", "private")
    assert uri.id is not None
    assert len(uri.id) == 16
    again = lab.app("uri", state, hsm={"key": [str(uri)]})
    assert again.devices[0].key().uri == uri


def generated(
    lab: Lab, state: Path, monkeypatch: pytest.MonkeyPatch, *argv: str, **named: str
) -> Result:
    """`hsmtoll key generate` with the variables of *named*."""
    pin = state / "pin.txt"
    pin.touch(mode=0o600)
    pin.write_text(PIN)
    settings = {"module": str(lab.module), "pin_file": str(pin), **named}
    for name, value in settings.items():
        monkeypatch.setenv(f"HSMTOLL_HSM__{name.upper()}", value)
    monkeypatch.setenv("HSMTOLL_STATE", str(state))
    argv = ("key", "generate", "--bits", "2048", *argv)
    return CliRunner().invoke(main, argv, catch_exceptions=False)


def test_a_key_that_the_settings_do_not_select_is_followed_by_what_to_set(
    lab: Lab, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The control: the key that the settings name needs no word.
    named = generated(lab, state, monkeypatch, key=f"pkcs11:token={lab.label};object=of%20them")
    assert (named.exit_code, named.stderr) == (0, "")
    # A label with what a shell would take apart, beside attributes that stay as they are.
    ours = f"pkcs11:token={lab.label};object=one?module-path={lab.module}"
    other = generated(lab, state, monkeypatch, "--label", "it's another", key=ours)
    assert other.stdout.startswith("pkcs11:")
    set_to = other.stderr.splitlines()[-1].removeprefix("hint: ")
    done = subprocess.run(
        ["bash", "-c", f'{set_to}; printf %s "$HSMTOLL_HSM__KEY"'],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert f"module-path={lab.module}" in done.stdout
    key = lab.app("-", state, hsm={"key": [done.stdout]}).devices[0].key()
    assert key.label == "it's another"


def test_a_key_beside_others_that_fit_is_named_by_label_or_by_parts(
    lab: Lab, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the device is named: with a second key on it, which one is meant is open.
    key = f"pkcs11:token={lab.label}"
    output = generated(lab, state, monkeypatch, "--label", "x1", key=key).stderr
    assert f"export HSMTOLL_HSM__KEY='pkcs11:token={lab.label};object=x1'" in output
    monkeypatch.delenv("HSMTOLL_HSM__KEY")
    output = generated(lab, state, monkeypatch, "--label", "x2", token_label=lab.label).stderr
    assert "hint: export HSMTOLL_HSM__KEY_LABEL=x2\n" in output
    output = generated(lab, state, monkeypatch, "--id", "0b0b", key_label="x3", key_id="0a").stderr
    assert "hint: export HSMTOLL_HSM__KEY_LABEL=x3 HSMTOLL_HSM__KEY_ID=0b0b\n" in output


def test_nothing_is_overwritten_by_label_or_by_id(app: App, lab: Lab, state: Path) -> None:
    before = lab.listed()
    with pytest.raises(DeviceError) as same_label:
        enrolment.generate(app.devices[0], bits=2048, id=b"\x77")
    with pytest.raises(DeviceError) as same_id:
        enrolment.generate(lab.app("fresh", state).devices[0], bits=2048, id=b"\x01")
    assert same_label.value.code == same_id.value.code == "key-exists"
    assert "label 'acme'" in str(same_label.value)
    assert "id 01" in str(same_id.value)
    assert lab.listed() == before


def test_only_sizes_that_maskinporten_takes_are_made(app: App, lab: Lab, state: Path) -> None:
    with pytest.raises(UsageError, match="1024 bits"):
        enrolment.generate(app.devices[0], bits=1024, label="tiny")
    large = lab.app("large", state)
    enrolment.generate(large.devices[0])
    assert large.devices[0].key().bits == 3072


def test_openssl_verifies_the_request_and_reads_the_subject(app: App) -> None:
    request = enrolment.csr(app.devices[0], **SUBJECT, unit="Tull", serial_number="42")
    argv = ["openssl", "req", "-verify", "-noout", "-subject", "-nameopt", "RFC2253,utf8,-esc_msb"]

    def judged(pem: str) -> list[str]:
        # OpenSSL 3.0 gives its verdict on stderr, 3.5 on stdout.
        done = subprocess.run(
            argv,
            input=pem,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.stdout.splitlines()

    verdict = "Certificate request self-signature verify OK"
    subject = (
        "subject=CN=Exempel Åkeri,serialNumber=42,OU=Tull,organizationIdentifier=NTRSE-5566778899,"
        "O=Exempel Åkeri AB,C=SE"
    )
    assert sorted(judged(request)) == [verdict, subject]
    read = x509.load_pem_x509_csr(request.encode())
    assert read.is_signature_valid
    # The control: a changed request does not verify.
    lines = request.splitlines()
    lines[3] = lines[3][:-1] + ("A" if lines[3][-1] != "A" else "B")
    changed = "\n".join(lines) + "\n"
    assert verdict not in judged(changed)


@pytest.mark.parametrize("alg", ["RS384", "RS512"])
def test_the_request_can_be_signed_with_each_algorithm(app: App, alg: str) -> None:
    read = x509.load_pem_x509_csr(enrolment.csr(app.devices[0], **SUBJECT, alg=alg).encode())
    assert read.is_signature_valid
    assert read.signature_hash_algorithm is not None
    assert read.signature_hash_algorithm.name == f"sha{alg[2:]}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"country": "se"},
        {"country": "SWE"},
        {"organization": " "},
        {"organization_identifier": ""},
        {"unit": "a\0b"},
        {"common_name": "a\nb"},
        {"common_name": "N\udcf8kkel"},
        # A PrintableString has no such letters (X.680 section 41.4).
        {"serial_number": "Åbo@1"},
    ],
)
def test_a_subject_that_no_certificate_can_have_is_refused_by_the_name_of_its_option(
    app: App, wrong: dict[str, str]
) -> None:
    (parameter,) = wrong
    with pytest.raises(UsageError, match=f"^--{parameter.replace('_', '-')}[ :]"):
        enrolment.csr(app.devices[0], **{**SUBJECT, **wrong})
    command = key.commands["csr"]
    assert parameter in {each.name for each in command.params}


def test_the_jwk_is_the_public_key_under_its_thumbprint(app: App) -> None:
    found = enrolment.jwk(app.devices[0])
    judge = RSAKey.import_key({k: v for k, v in found.items() if k in ("kty", "n", "e")})
    assert found["kid"] == judge.thumbprint()
    assert (found["use"], found["alg"]) == ("sig", "RS256")
    assert set(found) == {"kty", "n", "e", "use", "alg", "kid"}
    json.dumps(found)


def test_a_foreign_leaf_is_refused_and_nothing_is_written(
    app: App, lab: Lab, authority: Authority
) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    before = lab.listed()
    with pytest.raises(CertificateError) as caught:
        enrolment.import_chain(
            app.devices[0], pem(authority.issue(other), *authority.chain), now=NOW
        )
    assert caught.value.code == "certificate-foreign"
    assert lab.listed() == before


def test_a_chain_with_a_gap_or_an_unusable_leaf_is_refused(
    app: App, lab: Lab, authority: Authority
) -> None:
    leaf = certified(app, authority)
    key = leaf.public_key()
    from cryptography.hazmat.primitives.asymmetric import rsa

    assert isinstance(key, rsa.RSAPublicKey)
    before = lab.listed()
    old = authority.issue(key, not_before=NOW - timedelta(9), not_after=NOW - timedelta(2))
    for given, code in (
        ((leaf, authority.root), "chain-incomplete"),
        ((old, *authority.chain), "certificate-expired"),
        ((leaf, authority.issue(key), *authority.chain), "certificate-ambiguous"),
    ):
        with pytest.raises(CertificateError) as caught:
            enrolment.import_chain(app.devices[0], pem(*given), now=NOW)
        assert caught.value.code == code
        assert ("import that file" in (caught.value.hint or "")) is (code == "chain-incomplete")
    with pytest.raises(ConfigurationError, match="no certificate"):
        enrolment.import_chain(app.devices[0], b"nothing", now=NOW)
    assert lab.listed() == before


def test_a_norwegian_leaf_is_judged_by_its_own_rules(app: App) -> None:
    authority = norwegian_authority("test")
    key = certified(app, authority).public_key()
    from cryptography.hazmat.primitives.asymmetric import rsa

    assert isinstance(key, rsa.RSAPublicKey)
    signing = authority.issue(key, key_usage=["nonRepudiation"])
    given = pem(signing, *authority.chain)
    with pytest.raises(CertificateError) as caught:
        enrolment.import_chain(app.devices[0], given, now=NOW, identity="norwegian")
    assert caught.value.code == "certificate-usage"


def test_a_chain_is_imported_once_and_then_serves_without_a_file(
    app: App, lab: Lab, state: Path, authority: Authority
) -> None:
    leaf = certified(app, authority)
    given = pem(authority.root, unrelated_ca(), leaf, authority.intermediate)
    done = enrolment.import_chain(app.devices[0], given, now=NOW)
    assert [len(each) for each in (done.written, done.present, done.left)] == [3, 0, 0]
    listed = lab.listed()
    again = enrolment.import_chain(app.devices[0], given, now=NOW)
    assert [len(each) for each in (again.written, again.present, again.left)] == [0, 3, 0]
    assert lab.listed() == listed
    # pkcs11-tool reads what other programs look for: the key's id, subject and serial number.
    blocks = listed.split("Certificate Object")[1:]
    block = next(part for part in blocks if "label:      acme" in "".join(part.splitlines()[:2]))
    assert "ID:         01" in block
    assert "organizationIdentifier=NTRSE-5566778899" in block
    assert f"{leaf.serial_number:X}" in block.replace(":", "").upper()
    report = doctor.run(lab.app("acme", state))
    assert [c for c in report.checks if c.verdict in ("warn", "fail")] == []


def test_a_certificate_for_later_is_imported_before_its_time(
    lab: Lab, state: Path, authority: Authority
) -> None:
    app = lab.app("later", state)
    enrolment.generate(app.devices[0], bits=2048)
    key = certified(app, authority).public_key()
    from cryptography.hazmat.primitives.asymmetric import rsa

    assert isinstance(key, rsa.RSAPublicKey)
    later = authority.issue(key, not_before=NOW + timedelta(days=3))
    done = enrolment.import_chain(app.devices[0], pem(later, *authority.chain), now=NOW)
    assert done.written[0].common_name == "Eksempel AB"


def test_no_pin_stands_in_what_enrolment_says(app: App) -> None:
    with pytest.raises(DeviceError) as caught:
        enrolment.generate(app.devices[0], bits=2048)
    assert PIN not in f"{caught.value!r} {caught.value.hint} {app.settings!r}"


def test_an_identifier_that_no_register_has_is_warned_of(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    enrolment.csr(app.devices[0], **SUBJECT)
    assert caplog.records == []
    enrolment.csr(app.devices[0], **{**SUBJECT, "organization_identifier": "5566778899"})
    (record,) = caplog.records
    assert "5566778899" in record.getMessage()
    assert "NTRSE-" in record.getMessage()
