"""Bad input gets one line that says what happened, what to do, the right code, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.sandbox import pki

if TYPE_CHECKING:
    from cryptography import x509

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.softhsm import SoftHsm

EVIL = "Evil\x1b[2J\x1b]0;owned\x07 AB"


@pytest.fixture(scope="module")
def messy(toll_softhsm: SoftHsm) -> SoftHsm:
    """A device with everything that goes wrong on it, each under its own label."""
    authority = pki.eseal_authority()
    now = datetime.now(UTC)

    def store(label: str, *certificates: x509.Certificate) -> None:
        with toll_softhsm.batch():
            for at, each in enumerate(certificates):
                toll_softhsm.store_certificate(
                    each.public_bytes(Encoding.DER),
                    label=f"{label}-{at}",
                    key_id=label.encode() if at == 0 else f"{label}{at}".encode(),
                )

    def key(label: str, key_id: bytes | None = None, **options: Any) -> bytes:
        return toll_softhsm.generate_key(label, key_id or label.encode(), **options)

    key("bare")
    key("twin", b"twin1")
    key("twin", b"twin2")
    toll_softhsm.generate_ec_key("curve", b"curve")
    old = now - timedelta(days=800)
    expired = authority.issue(key("expired"), not_before=old, not_after=now - timedelta(days=1))
    store("expired", expired, *authority.chain)
    other = pki.eseal_authority("Eksempel Borte")
    store("broken", other.issue(key("broken")), other.root)
    store("evil", authority.issue(key("evil"), organization=EVIL, common_name=EVIL))
    store("loose", authority.issue(key("loose", extractable=True, sensitive=False)))
    return toll_softhsm


def run(*argv: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hsmtoll", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **variables},
    )


def refused(code: int, *argv: str, says: str, stdin: str = "", **variables: str) -> str:
    """The command fails with *code*, tells *says*, and tells it as everything is told."""
    done = run(*argv, stdin=stdin, **variables)
    told = done.stderr
    lines = told.splitlines()
    assert done.returncode == code, told
    assert done.stdout == ""
    assert says.lower() in told.lower()
    assert "Traceback" not in told
    said = [line for line in lines if not line.startswith("hint: ")]
    assert all(line.startswith("hsmtoll: ") for line in said)
    # One line about the failure; a warning may go before it.
    assert len([line for line in said if "warning" not in line]) == 1
    assert all(line.isprintable() for line in lines)
    assert Path(os.environ["HSMTOLL_HSM__PIN_FILE"]).read_text() not in told
    return told


def uri(device: SoftHsm, label: str) -> str:
    return f"pkcs11:token={device.label};object={label}"


@pytest.mark.usefixtures("toll_settings")
class TestTheDevice:
    """What lies on the way from the settings to a signature."""

    @pytest.mark.parametrize(
        ("path", "code", "says"),
        [
            ("/nowhere/module.so", 10, "/nowhere/module.so"),
            ("/etc/hostname", 30, "/etc/hostname"),
            ("/usr/lib", 10, "/usr/lib"),
            ("libsofthsm2.so", 10, "HSMTOLL_HSM__MODULE"),
        ],
    )
    def test_a_module_that_is_none(self, path: str, code: int, says: str) -> None:
        refused(code, "sign", "road", says=says, HSMTOLL_HSM__MODULE=path)

    def test_a_library_that_is_no_pkcs11_module(self) -> None:
        library = next(Path("/usr/lib").glob("*-linux-gnu/libz.so.1")).resolve()
        refused(30, "sign", "road", says=library.name, HSMTOLL_HSM__MODULE=str(library))

    def test_no_device_of_that_name_lists_what_is_there(self, messy: SoftHsm) -> None:
        told = refused(30, "sign", "road", says="nobody", HSMTOLL_HSM__KEY="pkcs11:token=nobody")
        assert messy.label in told

    def test_no_key_of_that_name_lists_what_is_there(self, messy: SoftHsm) -> None:
        told = refused(30, "sign", "road", says="absent", HSMTOLL_HSM__KEY=uri(messy, "absent"))
        assert "object=bare" in told

    def test_two_keys_of_that_name(self, messy: SoftHsm) -> None:
        told = refused(30, "sign", "road", says="twin", HSMTOLL_HSM__KEY=uri(messy, "twin"))
        assert "id=" in told

    def test_an_ec_key_cites_what_maskinporten_takes(self, messy: SoftHsm) -> None:
        refused(30, "sign", "road", says="RS256", HSMTOLL_HSM__KEY=uri(messy, "curve"))

    def test_a_key_that_can_be_taken_out(self, messy: SoftHsm) -> None:
        key = uri(messy, "loose")
        told = refused(30, "sign", "road", says="loose", HSMTOLL_HSM__KEY=key)
        assert "ALLOW_EXPORTABLE_KEY" in told

    def test_no_pin_at_all(self) -> None:
        refused(30, "sign", "road", says="HSMTOLL_HSM__PIN_FILE", HSMTOLL_HSM__PIN_FILE="")

    def test_a_wrong_pin_is_tried_once(self, tmp_path: Path) -> None:
        pin = tmp_path / "pin"
        pin.write_text("00000000")
        pin.chmod(0o600)
        state = {"HSMTOLL_STATE": str(tmp_path / "state"), "HSMTOLL_HSM__PIN_FILE": str(pin)}
        first = run("sign", "road", **state)
        again = run("sign", "road", **state)

        assert (first.returncode, again.returncode) == (20, 21)
        assert "00000000" not in first.stderr + again.stderr
        assert "hint: " in again.stderr

    def test_two_sources_of_a_pin(self) -> None:
        refused(10, "sign", "road", says="one source", HSMTOLL_HSM__PIN="1234")

    def test_a_pin_file_that_is_not_there(self) -> None:
        refused(10, "sign", "road", says="/nowhere", HSMTOLL_HSM__PIN_FILE="/nowhere")


@pytest.mark.usefixtures("toll_settings")
class TestTheCertificates:
    """What lies between a key and its chain."""

    def test_no_certificate_for_the_key(self, messy: SoftHsm) -> None:
        refused(40, "sign", "road", says="certificate", HSMTOLL_HSM__KEY=uri(messy, "bare"))

    def test_an_expired_leaf(self, messy: SoftHsm) -> None:
        refused(40, "sign", "road", says="expired", HSMTOLL_HSM__KEY=uri(messy, "expired"))

    def test_a_broken_chain(self, messy: SoftHsm) -> None:
        refused(40, "sign", "road", says="issuer", HSMTOLL_HSM__KEY=uri(messy, "broken"))

    def test_escapes_in_a_name_are_shown_and_not_obeyed(self, messy: SoftHsm) -> None:
        done = run("chain", HSMTOLL_HSM__KEY=uri(messy, "evil"))

        assert done.returncode == 0
        assert "Evil" in done.stdout
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr


@pytest.mark.usefixtures("toll_settings")
class TestTheSettings:
    """What is told before a device is even looked at."""

    @pytest.mark.parametrize(
        ("name", "argv"),
        [
            ("HSMTOLL_ENVIRONMENT", ("token", "road")),
            ("HSMTOLL_IDENTITY", ("token", "road")),
            ("HSMTOLL_HSM__MODULE", ("token", "road")),
            ("HSMTOLL_HSM__KEY", ("token", "road")),
            ("HSMTOLL_ENDPOINTS__ISSUER", ("token", "road")),
        ],
    )
    def test_a_missing_setting_is_named_as_it_must_be_set(
        self, name: str, argv: tuple[str, ...]
    ) -> None:
        refused(10, *argv, says=name, **{name: ""})

    def test_no_scope(self) -> None:
        refused(10, "token", says="HSMTOLL_SCOPE")

    def test_a_misspelt_setting_suggests_the_nearest(self) -> None:
        refused(10, "token", "road", says="HSMTOLL_SCOPE", HSMTOLL_SCOOP="road")

    def test_a_scope_of_the_other_family(self) -> None:
        refused(10, "token", "toll:movement/road/v2", says="toll:eu/movement/road/v2")

    def test_endpoints_outside_the_sandbox(self) -> None:
        refused(10, "token", "road", says="HSMTOLL_ENDPOINTS__", HSMTOLL_ENVIRONMENT="test")

    @pytest.mark.parametrize("host", ["maskinporten.no", "test.maskinporten.no", "x.toll.no"])
    def test_a_sandbox_under_a_real_name(self, host: str) -> None:
        refused(
            10,
            "token",
            "road",
            says="sandbox",
            HSMTOLL_ENDPOINTS__ISSUER=f"https://{host}/",
            HSMTOLL_ENDPOINTS__TOKEN=f"https://{host}/token",
        )

    def test_a_ca_file_that_holds_no_certificates(self) -> None:
        refused(10, "token", "road", says="HSMTOLL_CA_FILE", HSMTOLL_CA_FILE="/etc/hostname")

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (("tokn",), "token"),
            (("token", "rode"), "road"),
            (("token", "road", "--json", "--header"), "--header"),
            (("token", "road", "--min-life", "soon"), "soon"),
            (("token", "road", "--scope", "air"), "one API"),
            (("call", "GET", "/etc/passwd"), "/etc/passwd"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "Host: evil"), "Host"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "authorization: x"), "auth"),
            (("call", "POST", "/api/movement/road/v2/x", "--json-data", "{"), "JSON"),
            (("test-auth", "air"), "no test call"),
            (("upload", "1", "/nowhere.pdf", "--type", "invoice"), "/nowhere.pdf"),
            (("exchange",), "assertion"),
            (("token", "declaration-feed"), "not yet ready"),
        ],
    )
    def test_a_command_line_that_makes_no_sense(self, argv: tuple[str, ...], says: str) -> None:
        refused(2, *argv, says=says)


@pytest.mark.usefixtures("toll_settings")
class TestTheServices:
    """What Maskinporten, Customs and the network do."""

    @pytest.mark.parametrize(
        ("fault", "endpoint", "code", "says"),
        [
            ("html", "token", 60, "not with a JSON object"),
            ("html", "exchange", 70, "not with a JSON object"),
            ("redirect", "token", 80, "redirect"),
            ("redirect", "exchange", 80, "redirect"),
            ("newline-token", "token", 60, "access_token"),
            ("newline-token", "exchange", 70, "access_token"),
            ("echo", "token", 60, "refused"),
            ("echo", "exchange", 70, "Customs"),
            ("truncated", "token", 80, "broke"),
            ("endless", "token", 80, "larger"),
            ("refuse", "token", 80, "connection refused"),
            ("500", "token", 80, "500"),
            ("429", "token", 75, "too many"),
        ],
    )
    def test_a_fault_has_its_class(
        self, toll_sandbox: Sandbox, fault: str, endpoint: str, code: int, says: str
    ) -> None:
        toll_sandbox.fault(fault, endpoint)
        told = refused(code, "token", "road", says=says)

        assert "eyJ" not in told

    def test_a_slow_answer_ends_at_the_deadline(self, toll_sandbox: Sandbox) -> None:
        toll_sandbox.fault("drip", "token", seconds=0.3)
        refused(80, "token", "road", says="after 2 s", HSMTOLL_DEADLINE="2")

    def test_a_refused_grant_says_who_must_act(self, toll_sandbox: Sandbox) -> None:
        toll_sandbox.allow("NTRSE-5566778899", "toll:eu/movement/air")
        told = refused(61, "token", "road", says="MP-250")

        assert "who must act: customs" in told
        assert "trace id" in told
        assert run("token", "air").returncode == 0

    def test_an_unknown_host(self) -> None:
        name = "https://no-such-host.invalid/"
        refused(
            80,
            "token",
            "road",
            says="unknown host",
            HSMTOLL_ENDPOINTS__ISSUER=name,
            HSMTOLL_ENDPOINTS__TOKEN=f"{name}token",
        )

    def test_an_untrusted_certificate_names_the_setting_that_helps(self) -> None:
        refused(80, "token", "road", says="HSMTOLL_CA_FILE", HSMTOLL_CA_FILE="")

    def test_an_api_that_refuses(self, toll_sandbox: Sandbox) -> None:
        toll_sandbox.fault("401", "api")
        refused(71, "test-auth", "road", says="401")


def test_help_is_no_error_and_names_every_command() -> None:
    done = run("--help")

    assert done.returncode == 0
    for command in ("token", "sign", "exchange", "test-auth", "call", "chain", "objects", "doctor"):
        assert command in done.stdout
