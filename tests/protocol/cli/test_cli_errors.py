"""Bad input gets one line that says what happened, what to do, the right code, and no more."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

import hsmtoll
from hsmtoll.sandbox import pki
from tests.kit import commands

if TYPE_CHECKING:
    import subprocess

    from cryptography import x509

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.softhsm import SoftHsm

ROAD = "/api/movement/road/v2"

#: What Python's own parser gives up at.
DEEP = 100_000

#: Every code is written somewhere in it.
SOURCE = "".join(path.read_text("utf-8") for path in Path(hsmtoll.__file__).parent.rglob("*.py"))

WIDE = "Žižkov"
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
    store("wide", authority.issue(key("wide"), organization=WIDE))
    store("loose", authority.issue(key("loose", extractable=True, sensitive=False)))
    return toll_softhsm


def run(*argv: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return commands.hsmtoll(*argv, stdin=stdin, env={**os.environ, **variables})


def refused(code: int, *argv: str, says: str, stdin: str = "", **variables: str) -> str:
    """The command fails with *code*, tells *says*, and tells it as everything is told."""
    done = run(*argv, stdin=stdin, **variables)
    output = done.stderr
    lines = output.splitlines()
    assert done.returncode == code, output
    assert done.stdout == ""
    assert says.lower() in output.lower()
    assert "Traceback" not in output
    messages = [line for line in lines if not line.startswith("hint: ")]
    assert all(line.startswith("hsmtoll: ") for line in messages)
    # One line about the failure, with its code; a warning may go before it.
    (error,) = [line for line in messages if "warning" not in line]
    found = re.fullmatch(r"hsmtoll: (?:(MP|http)-\d{3}|([a-z0-9]+(?:-[a-z0-9]+)*)): .*[^.]", error)
    assert found, error
    assert found[1] or f'"{found[2]}"' in SOURCE
    assert lines.count(lines[-1]) == 1
    assert all(line.isprintable() for line in lines)
    assert Path(os.environ["HSMTOLL_HSM__PIN_FILE"]).read_text() not in output
    return output


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
        output = refused(30, "sign", "road", says="nobody", HSMTOLL_HSM__KEY="pkcs11:token=nobody")
        assert messy.label in output

    def test_no_key_of_that_name_lists_what_is_there(self, messy: SoftHsm) -> None:
        output = refused(30, "sign", "road", says="absent", HSMTOLL_HSM__KEY=uri(messy, "absent"))
        assert "object=bare" in output

    def test_two_keys_of_that_name(self, messy: SoftHsm) -> None:
        output = refused(30, "sign", "road", says="twin", HSMTOLL_HSM__KEY=uri(messy, "twin"))
        assert "id=" in output

    def test_an_ec_key_cites_what_maskinporten_takes(self, messy: SoftHsm) -> None:
        refused(30, "sign", "road", says="RS256", HSMTOLL_HSM__KEY=uri(messy, "curve"))

    def test_a_key_that_can_be_taken_out(self, messy: SoftHsm) -> None:
        key = uri(messy, "loose")
        output = refused(30, "sign", "road", says="loose", HSMTOLL_HSM__KEY=key)
        assert "ALLOW_EXPORTABLE_KEY" in output

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

    @pytest.mark.parametrize(
        ("name", "value", "code"),
        [
            ("HSMTOLL_TIMEOUT", "soon", "setting-invalid"),
            ("HSMTOLL_SCOOP", "road", "setting-unknown"),
            ("hsmtoll_environment", "prod", "setting-twice"),
            ("HSMTOLL_IDENTITY", "", "setting-missing"),
        ],
    )
    def test_the_doctor_reports_settings_that_cannot_be_read_like_all_else(
        self, name: str, value: str, code: str
    ) -> None:
        done = run("doctor", "--json", **{name: value})
        report = json.loads(done.stdout)
        first, *others = report["checks"]

        assert (done.returncode, report["exit_code"], done.stderr) == (10, 10, "")
        assert (first["check"], first["code"], first["verdict"]) == ("settings", code, "fail")
        assert name in first["line"]
        assert {each["verdict"] for each in others} == {"skip"}
        lines = run("doctor", **{name: value}).stdout.splitlines()
        assert [line for line in lines if line.startswith(f"fail  settings ({code}): ")]
        assert lines[-2].startswith("0 ok, 0 warnings, 1 failed, ")
        # The control.
        assert json.loads(run("doctor", "--json").stdout)["exit_code"] == 0

    def test_an_auditor_is_shown_no_settings_that_nobody_made(self) -> None:
        refused(10, "doctor", "--evidence", says="HSMTOLL_TIMEOUT", HSMTOLL_TIMEOUT="soon")

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
            says="must not be under",
            HSMTOLL_ENDPOINTS__ISSUER=f"https://{host}/",
            HSMTOLL_ENDPOINTS__TOKEN=f"https://{host}/token",
        )

    def test_a_file_that_is_not_there_is_told_as_that(self) -> None:
        output = refused(10, "token", "road", says="No such file", HSMTOLL_CA_FILE="/nowhere")
        assert "PEM" not in output

    @pytest.mark.parametrize("command", ["token", "sign", "call"])
    def test_all_settings_that_are_missing_are_named_at_once(self, command: str) -> None:
        unset = {name: "" for name in os.environ if name.startswith("HSMTOLL_")}
        path = ("GET", f"{ROAD}/x") if command == "call" else ("road",)
        done = run(command, *path, **{**unset, "HSMTOLL_CONFIG": "/dev/null"})
        error, *hints = done.stderr.splitlines()

        names = ("ENVIRONMENT", "IDENTITY", "HSM__MODULE", "HSM__KEY")
        assert done.returncode == 10
        assert error.startswith("hsmtoll: setting-missing: HSMTOLL_ENVIRONMENT, ")
        assert all(f"HSMTOLL_{name}" in error for name in names)
        assert len(hints) == len(names)

    def test_a_certificate_of_another_key_is_counted_and_not_called_none(
        self, messy: SoftHsm, tmp_path: Path
    ) -> None:
        (tmp_path / "ca.pem").write_bytes(Path(os.environ["HSMTOLL_CA_FILE"]).read_bytes())
        output = refused(
            40,
            "sign",
            "road",
            says="none for this key",
            HSMTOLL_HSM__KEY=uri(messy, "bare"),
            HSMTOLL_HSM__CERTIFICATES=str(tmp_path / "ca.pem"),
        )
        assert "in HSMTOLL_HSM__CERTIFICATES" in output

    def test_a_trace_id_is_told_once(self, toll_sandbox: Sandbox) -> None:
        toll_sandbox.allow("NTRSE-5566778899", "toll:eu/movement/air")
        try:
            assert refused(61, "token", "road", says="trace id").count("trace id") == 1
        finally:
            assert run("token", "air").returncode == 0

    def test_a_ca_file_that_holds_no_certificates(self) -> None:
        refused(10, "token", "road", says="HSMTOLL_CA_FILE", HSMTOLL_CA_FILE="/etc/hostname")

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (("tokn",), "token"),
            (("token", "rode"), "road"),
            (("token", "road", "--min-life", "soon"), "soon"),
            (("token", "road", "--scope", "air"), "one API"),
            (("call", "GET", "/etc/passwd"), "/etc/passwd"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "Host: evil"), "Host"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "authorization: x"), "auth"),
            (("call", "POST", "/api/movement/road/v2/x", "--json-data", "{"), "line 1, column 2"),
            (("token", "road", "--authorization-details", '[{"a"}]'), "line 1, column 6"),
            (("token", "road", "--authorization-details", __file__), "did you mean @/"),
            (("call", "POST", "/api/movement/road/v2/x", "--json-data", '{"a": NaN}'), "NaN"),
            (("call", "POST", "/api/movement/road/v2/x", "--json-data", "[" * DEEP), "levels"),
            (
                ("call", "POST", "/api/movement/road/v2/x", "--json-data", '{"a": 1, "a": 2}'),
                "no name twice",
            ),
            (("call", "POST", "/api/movement/road/v2/x", "--json-data", '"\udcff"'), "JSON"),
            (("call", "POST", "/api/movement/road/v2/x", "--data", "@/nowhere\x1b[2J"), "/nowhere"),
            (("call", "GE T", "/api/movement/road/v2/x"), "method"),
            (("call", "GÉT", "/api/movement/road/v2/x"), "method"),
            (("call", "", "/api/movement/road/v2/x"), "method"),
            (("call", "GET", "/api/movement/road/v2/\udcff"), "path"),
            (("call", "GET", "/api/movement/road/v2/x\n"), "path"),
            (("call", "GET", "/api/movement/road/v2/" + "x" * DEEP), "path"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "X: é"), "ASCII"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "X Y: z"), "NAME: VALUE"),
            (("call", "GET", "/api/movement/road/v2/x", "--header", "Content-Length: 9"), "Length"),
            (("submit", "road", "POST", "transport", "[" * DEEP), "JSON object"),
            (("submit", "road", "POST", "transport", '{"a": ' * 101 + "1" + "}" * 101), "levels"),
            (("submit", "road", "POST", "transport", '{"a": Infinity}'), "Infinity"),
            (("submit", "road", "POST", "transport", '{"a": 1, "a": 2}'), "no name twice"),
            (("submit", "road", "POST", "transport", '{"a": 1e999}'), "too large"),
            (("submit", "road", "POST", "transport", '{"a": "\\ud800"}'), "surrogate"),
            (("submit", "road", "POST", "transport", "\udcff"), "JSON object"),
            (
                ("upload", "123456789-01092026-1", "/nowhere/\udcff.pdf", "--type", "invoice"),
                "name",
            ),
            (("upload", "123456789-01092026-1", "/dev/null", "--type", "invoice"), "regular file"),
            (("token", "road", "--min-life", "nan"), "--min-life"),
            (("token", "road", "--min-life", "inf"), "--min-life"),
            (("test-auth", "maritime"), "no test call"),
            (("upload", "1", "/nowhere.pdf", "--type", "invoice"), "/nowhere.pdf"),
            (("exchange",), "assertion"),
            (("token", "declaration-feed"), "not yet ready"),
        ],
    )
    def test_a_command_line_that_makes_no_sense(self, argv: tuple[str, ...], says: str) -> None:
        refused(2, *argv, says=says)

    @pytest.mark.parametrize(
        ("argv", "exit_code", "code"),
        [
            (("token", "road", "--json", "--header"), 2, "usage"),
            (("token", "rode", "--json"), 2, "usage"),
            (("token", "--json", "--nosuch"), 2, "usage"),
            (("objects", "--json"), 10, "module-path"),
        ],
    )
    def test_with_json_an_error_is_one_json_object(
        self, argv: tuple[str, ...], exit_code: int, code: str
    ) -> None:
        broken = {"HSMTOLL_HSM__MODULE": "/nowhere/Žižkov.so", "PYTHONIOENCODING": "latin-1"}
        done = run(*argv, **broken)

        assert (done.returncode, done.stdout) == (exit_code, "")
        error = json.loads(done.stderr)
        assert (error["schema"], error["error"], error["exit_code"]) == (1, code, exit_code)
        assert error["message"]
        assert set(error) >= {"hint", "who", "retryable", "trace_id", "correlation_id"}
        # The control: without it the same is told in lines.
        lines = run(*(each for each in argv if each != "--json"), **broken).stderr
        assert lines == "" or lines.startswith("hsmtoll: ")

    def test_json_behind_two_dashes_is_the_word_of_another_command(self) -> None:
        assert run("sandbox", "--port", "x", "--", "true", "--json").stderr.startswith("hsmtoll: ")

    @pytest.mark.parametrize(
        "argv",
        [
            ("GET", f"{ROAD}/x y/é?z=%20"),
            ("M-SEARCH", f"{ROAD}/test-auth"),
            ("POST", f"{ROAD}/transport", "--json-data", "[" * 90 + "]" * 90),
            ("POST", f"{ROAD}/transport", "--json-data", '{"half": "\\ud800"}'),
            ("GET", f"{ROAD}/x", "--header", "X-Trace: a b"),
        ],
    )
    def test_what_can_be_sent_is_for_customs_to_refuse(self, argv: tuple[str, ...]) -> None:
        done = run("call", *argv)

        assert done.returncode == 71, done.stderr

    def test_bytes_are_sent_as_they_were_typed(self, toll_sandbox: Sandbox) -> None:
        # So are bytes that are no UTF-8 handed to a program.
        run("call", "POST", f"{ROAD}/transport", "--data", "\udcff\udcfeé")

        assert toll_sandbox.received[-1].body == b"\xff\xfe\xc3\xa9"

    @pytest.mark.parametrize(
        "name",
        [
            "HSMTOLL_HSM__CERTIFICATES",
            "HSMTOLL_HSM__PUBLIC_KEY",
            "HSMTOLL_CA_FILE",
            "HSMTOLL_CACHE_KEY_FILE",
        ],
    )
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path, name: str) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        redis = {"HSMTOLL_CACHE": "redis://localhost/0"} if "CACHE" in name else {}
        refused(10, "token", "road", says=name, **{name: str(pipe)}, **redis)

    def test_nor_is_one_that_is_to_be_uploaded(self, tmp_path: Path) -> None:
        pipe = tmp_path / "invoice.txt"
        os.mkfifo(pipe)
        argv = ("upload", "123456789-01092026-1", str(pipe), "--type", "invoice")
        refused(2, *argv, says="not a regular file")

    def test_a_link_to_a_file_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "link.txt").symlink_to(tmp_path / "file.txt")
        (tmp_path / "file.txt").write_text("Invoice 4711\n")
        argv = ("upload", "123456789-01092026-1", str(tmp_path / "link.txt"), "--type", "invoice")
        assert run(*argv).returncode == 0

        (tmp_path / "ca.pem").symlink_to(os.environ["HSMTOLL_CA_FILE"])
        linked = {"HSMTOLL_CA_FILE": str(tmp_path / "ca.pem")}
        assert run("token", "road", "--renew", **linked).returncode == 0

    def test_a_message_may_come_through_a_pipe(self) -> None:
        # It is read, and refused for what it says.
        argv = ("submit", "road", "POST", "transport", "@/dev/stdin")
        refused(2, *argv, says="JSON object", stdin="[]")
        assert run("submit", "road", "POST", "transport", "@-", stdin="{}").returncode == 71

    def test_escapes_in_the_name_of_a_file_are_not_obeyed(self, tmp_path: Path) -> None:
        for name in ("HSMTOLL_CA_FILE", "HSMTOLL_HSM__CERTIFICATES", "HSMTOLL_HSM__PUBLIC_KEY"):
            file = tmp_path / "evil\x1b[2J"
            refused(10, "token", "road", says=name, **{name: str(file)})
            file.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
            refused(10, "token", "road", says=name, **{name: str(file)})
            file.unlink()

    def test_a_pin_of_the_environment_is_warned_of_and_one_of_a_file_is_not(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "toll.toml").write_text('[hsm]\npin = "98765432"\n')
        (tmp_path / "toll.toml").chmod(0o600)
        own = {"HSMTOLL_HSM__PIN_FILE": "", "HSMTOLL_CONFIG": str(tmp_path / "toll.toml")}
        real = dict.fromkeys(os.environ, "") | {"HSMTOLL_ENVIRONMENT": "test"}
        real = {name: value for name, value in real.items() if name.startswith("HSMTOLL_")}

        assert "warning" not in run("exchange", **{**real, **own}).stderr
        named = run("exchange", **{**real, **own, "hsmtoll_hsm__pin": "98765432"}).stderr
        assert "warning: HSMTOLL_HSM__PIN: every child process" in named
        assert "98765432" not in named


@pytest.mark.usefixtures("toll_settings")
class TestTheLocale:
    """Characters that the terminal or the file cannot hold."""

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
    def test_a_name_that_it_does_not_hold_is_written_in_escapes(
        self, messy: SoftHsm, encoding: str
    ) -> None:
        which = {"HSMTOLL_HSM__KEY": uri(messy, "wide"), "PYTHONIOENCODING": encoding}
        done = run("chain", **which)
        listed = run("chain", "--json", **which)

        assert (done.returncode, done.stderr) == (0, "")
        assert ("O=Ž" in done.stdout) == (encoding == "utf-8")
        assert WIDE in json.loads(listed.stdout)[0]["subject"]

    def test_an_error_is_written_in_escapes_as_well(self) -> None:
        refused(2, "token", WIDE, says="\\u017d", PYTHONIOENCODING="latin-1")


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
        output = refused(code, "token", "road", says=says)

        assert "eyJ" not in output

    def test_a_slow_answer_ends_at_the_deadline(self, toll_sandbox: Sandbox) -> None:
        toll_sandbox.fault("drip", "token", seconds=0.3)
        refused(80, "token", "road", says="within 2 s", HSMTOLL_DEADLINE="2")

    def test_a_refused_grant_says_who_must_act(self, toll_sandbox: Sandbox) -> None:
        toll_sandbox.allow("NTRSE-5566778899", "toll:eu/movement/air")
        output = refused(61, "token", "road", says="MP-250")

        assert "who must act: customs" in output
        assert "trace id" in output
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
