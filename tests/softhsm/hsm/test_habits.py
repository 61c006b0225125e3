"""
What modules do that SoftHSM does not, each imitated by a fault of its name, in this process and
isolated: certificates and searches behind the login, logins that end, answers that leave a PIN's
fate open, objects and slots that cannot be read, signatures made another way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pkcs11.exceptions import PinLocked

from hsmtoll import CertificateError, DeviceError, HsmTollError, PinNotTried, doctor
from hsmtoll.app import App
from hsmtoll.hsm.codes import NOT_TRIED
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.module import open_module
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.settings import load
from hsmtoll.testing.identity import eseal, register_identity
from hsmtoll.testing.softhsm import SoftHsm
from hsmtoll.token import TokenRequest
from tests.kit.grants import a_grant
from tests.kit.own_device import accepted, copied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.doctor import Check
    from hsmtoll.jws import SigningInput
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings
    from hsmtoll.testing.clock import SettableClock
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

ROAD = TokenRequest(scope="toll:eu/movement/road/v2")
NOT_LOGGED_IN, DEVICE_ERROR, GENERAL_ERROR = 0x101, 0x30, 0x5

_HIDE = """
import sys, pkcs11
from pkcs11 import Attribute as A, ObjectClass
module, token, pin, label = sys.argv[1:5]
kept = (A.CLASS, A.CERTIFICATE_TYPE, A.TOKEN, A.LABEL, A.ID, A.SUBJECT, A.ISSUER, A.SERIAL_NUMBER,
        A.VALUE)
with pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    for one in list(session.get_objects({A.CLASS: ObjectClass.CERTIFICATE})):
        if one[A.LABEL].startswith(label):
            copy = {name: one[name] for name in kept}
            one.destroy()
            session.create_object({**copy, A.PRIVATE: True})
"""

_MANY = """
import sys, pkcs11
from pkcs11 import KeyType
with pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2]).open(
    rw=True, user_pin=sys.argv[3]
) as session:
    for number in range(40):
        session.generate_keypair(
            KeyType.RSA, 1024, id=b"many%d" % number, label=f"many-{number}", store=True
        )
"""


_OTHERS = """
import sys, pkcs11
from pkcs11 import Attribute as A, CertificateType, ObjectClass
module, token, pin, last = sys.argv[1:5]
names = (A.LABEL, A.ID, A.SUBJECT, A.VALUE)
with pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    there = list(session.get_objects({A.CLASS: ObjectClass.CERTIFICATE}))
    values = [one[A.VALUE] for one in there]
    for number in range(60):
        session.create_object({
            A.CLASS: ObjectClass.CERTIFICATE, A.CERTIFICATE_TYPE: CertificateType.X_509,
            A.TOKEN: True, A.PRIVATE: False, A.LABEL: "other-%d" % number, A.ID: b"o%d" % number,
            A.SUBJECT: bytes((0x30, 0)), A.VALUE: values[number % len(values)][:-1] + bytes(1),
        })
    if last == "renamed":
        for one in there:
            copy = {name: one[name] for name in names} | {A.LABEL: "renamed", A.ID: b"renamed"}
            one.destroy()
            session.create_object({
                A.CLASS: ObjectClass.CERTIFICATE, A.CERTIFICATE_TYPE: CertificateType.X_509,
                A.TOKEN: True, A.PRIVATE: False, **copy,
            })
"""


@pytest.fixture(params=["none", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def data(app: App, jti: str = "one") -> SigningInput:
    return a_grant(audience=app.endpoints.issuer, jti=jti)


def long(app: App) -> SigningInput:
    """As long as an assertion with a whole chain."""
    return a_grant(audience=app.endpoints.issuer, size=6500)


@contextmanager
def program(isolation: str, **settings: Any) -> Iterator[App]:
    """A program that lives on, by the environment's settings."""
    app = App(load(hsm__isolation=isolation, **settings))
    try:
        yield app
    finally:
        app.close()


def signed(app: App) -> str:
    return app.local_signer(app.devices[0]).sign(ROAD, jti="1").assertion


def command(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hsmtoll", *argv],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# ---------------------------------------------------------------------- before and after the login


@pytest.fixture(scope="module")
def hidden(toll_softhsm: SoftHsm) -> TemporaryIdentity:
    """An eSeal whose certificates show to nobody before the login."""
    made = eseal(toll_softhsm, label="hidden")
    argv = [str(toll_softhsm.module), toll_softhsm.label, toll_softhsm.pin, "hidden"]
    subprocess.run([sys.executable, "-c", _HIDE, *argv], check=True, timeout=60)
    return made


def test_certificates_that_show_after_the_login_alone_are_found(
    hidden: TemporaryIdentity,
    toll_settings: Settings,
    toll_sandbox: Sandbox,
    toll_faults: Faults,
    isolation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register_identity(toll_sandbox, hidden)
    key = hidden.device.uri("hidden")
    with program(isolation, hsm__key=key) as app:
        assert app.chain().leaf.public_key is not None
        assert toll_faults.count("C_Login") == 1
        with app.client() as client:
            assert client.token("road").value
    # The control: without a PIN nobody sees them.
    monkeypatch.delenv("HSMTOLL_HSM__PIN_FILE")
    with program(isolation, hsm__key=key) as app:
        assert app.chain().leaf.der != _der(hidden)
    assert toll_settings.hsm.key


def test_the_commands_find_them_too_and_print_no_traceback(
    hidden: TemporaryIdentity, toll_settings: Settings, isolation: str
) -> None:
    del toll_settings
    variables = {
        "HSMTOLL_HSM__KEY": hidden.device.uri("hidden"),
        "HSMTOLL_HSM__ISOLATION": isolation,
    }
    for argv in (["sign", "road"], ["chain"], ["doctor"], ["objects"], ["key", "jwk"]):
        done = command(*argv, **variables)
        assert done.returncode == 0, (argv, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("reads", [False, True])
def test_a_module_that_refuses_to_search_before_the_login_is_logged_in_to(
    toll_settings: Settings,
    toll_faults: Faults,
    isolation: str,
    reads: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del toll_settings
    toll_faults.set("login-needed", after=reads)
    with program(isolation) as app:
        assert signed(app)
        assert toll_faults.count("C_Login") == 1
    monkeypatch.delenv("HSMTOLL_HSM__PIN_FILE")
    with program(isolation) as app, pytest.raises(HsmTollError) as caught:
        signed(app)
    assert caught.value.code == "not-logged-in"
    assert "HSMTOLL_HSM__PIN_FILE" in (caught.value.hint or "")


def test_what_a_module_says_to_the_end_of_a_refused_search_is_not_printed(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    for code in (NOT_LOGGED_IN, DEVICE_ERROR, 0xB3):
        toll_faults.set("call-fails", function="C_FindObjectsInit", rv=code)
        done = command("sign", "road", HSMTOLL_HSM__ISOLATION=isolation)
        assert done.returncode == 30
        assert "hsmtoll: " in done.stderr
        assert "Exception ignored" not in done.stderr
        assert "Traceback" not in done.stderr


def test_a_device_that_does_not_say_that_it_wants_a_login_is_logged_in_to(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("login-unflagged")
    with program(isolation) as app:
        assert signed(app)
        assert toll_faults.count("C_Login") == 1


def test_a_login_that_the_device_ended_is_made_anew_once(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("login-ended", n=2)
    with program(isolation) as app:
        for _ in range(8):
            assert signed(app)
        assert toll_faults.count("C_Login") == 4
        # Nothing is left open of the logins that were ended.
        assert toll_faults.sessions() <= 2
    # The control: one that ends before its first signature is not made for ever.
    toll_faults.set("login-ended", n=0)
    with program(isolation) as app:
        toll_faults.reset_counts()
        with pytest.raises(DeviceError) as caught:
            signed(app)
        assert caught.value.code == "signing-pin"
        assert "HSMTOLL_HSM__SIGNING_PIN_FILE" in (caught.value.hint or "")
        assert toll_faults.count("C_Login") == 2


def test_a_role_of_the_makers_own_logs_in_where_it_is_named(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("user-type", n=0x80000001)
    with program(isolation, hsm__user_type="0x80000001") as app:
        assert signed(app)
        assert all(token.problem is None for token in app.hsm.inspect().tokens if token.keys)
    with program(isolation) as app, pytest.raises(HsmTollError) as caught:
        signed(app)
    # It was no try, and no other mechanism of the module's is to blame.
    assert not isinstance(caught.value, PinNotTried)
    with pytest.raises(HsmTollError):
        load(hsm__user_type="0")


_IN_ANOTHER_PROCESS = """
import sys, pkcs11
from pkcs11 import Attribute as A, ObjectClass
module, here, there, pin, label = sys.argv[1:6]
kept = (A.CLASS, A.CERTIFICATE_TYPE, A.TOKEN, A.PRIVATE, A.LABEL, A.ID, A.SUBJECT, A.ISSUER,
        A.SERIAL_NUMBER, A.VALUE)
lib = pkcs11.lib(module)
with lib.get_token(token_label=here).open(rw=True, user_pin=pin) as session:
    found = list(session.get_objects({A.CLASS: ObjectClass.CERTIFICATE}))
    copies = [{name: one[name] for name in kept} for one in found]
    for one in found:
        one.destroy()
with lib.get_token(token_label=there).open(rw=True, user_pin=pin) as session:
    for copy in copies:
        session.create_object(copy)
"""


def test_certificates_on_another_device_of_the_module_are_found(
    toll_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_side = SoftHsm.create(tmp_path / "two")
    made = eseal(key_side, label="apart")
    tool = ["softhsm2-util", "--init-token", "--free", "--label", "certs", "--so-pin", "12345678"]
    environment = {**os.environ, "SOFTHSM2_CONF": str(key_side.conf)}
    subprocess.run([*tool, "--pin", key_side.pin], env=environment, check=True, timeout=60)
    argv = [str(key_side.module), key_side.label, "certs", key_side.pin, "apart"]
    subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS, *argv], env=environment, check=True, timeout=60
    )
    register_identity(toll_sandbox, made)
    variables = {
        **made.environ(),
        **toll_sandbox.environ(),
        "HSMTOLL_CONFIG": os.devnull,
        "HSMTOLL_STATE": str(tmp_path / "state"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command("sign", "road").returncode == 0
    assert command("chain").returncode == 0
    result = command("doctor")
    assert result.returncode == 0, result.stdout
    # The key itself, looked for where the certificates are, is named where it is.
    elsewhere = made.environ()["HSMTOLL_HSM__KEY"].replace(f"token={key_side.label}", "token=certs")
    missing = command("sign", "road", HSMTOLL_HSM__KEY=elsewhere)
    assert missing.returncode == 30
    assert "Another device of the module has a key of that name" in missing.stderr
    assert key_side.label in missing.stderr


# ---------------------------------------------------------------------- a PIN's fate


def test_a_pin_that_was_accepted_outlives_an_outage_of_the_login(
    toll_settings: Settings, toll_faults: Faults, toll_clock: SettableClock, isolation: str
) -> None:
    del toll_settings
    with program(isolation) as app:
        app.clock = toll_clock
        assert signed(app)
        for code in (DEVICE_ERROR, GENERAL_ERROR, 0x6, 0xB0, 0x80000384):
            toll_faults.set("call-fails", function="C_Login", rv=code)
            toll_faults.set("session-lost")
            for _ in range(3):
                with pytest.raises(DeviceError):
                    signed(app)
                toll_clock.advance(60)
            toll_faults.clear()
            _later(app.state)
            if isolation == "process":
                # A child has a clock of its own.
                app.devices[0].close()
            assert signed(app)


def test_two_commands_during_an_outage_do_not_lock_the_pin_out(
    toll_settings: Settings, toll_faults: Faults, isolation: str, tmp_path: Path
) -> None:
    assert command("sign", "road", HSMTOLL_HSM__ISOLATION=isolation).returncode == 0
    toll_faults.set("call-fails", function="C_Login", rv=0x6)
    codes = []
    for _ in range(4):
        codes.append(command("sign", "road", HSMTOLL_HSM__ISOLATION=isolation).returncode)
        _later(tmp_path / "toll-state")
    toll_faults.clear()
    assert codes == [30] * 4
    assert command("sign", "road", HSMTOLL_HSM__ISOLATION=isolation).returncode == 0
    assert toll_settings.state == tmp_path / "toll-state"


def _later(state: Path | None) -> None:
    """As if two minutes had passed since the last try."""
    assert state is not None
    for each in (state / "pin").iterdir():
        if each.suffix != ".lock":
            record = json.loads(each.read_text())
            record["doubts"] = [[origin, at - 121] for origin, at in record.get("doubts", ())]
            each.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "code",
    [0x32, 0xE0, 0x3, 0xB3, 0xB1, 0xB5, 0x2, 0x50, 0x54, 0x200, 0x103, 0x7, 0x82, 0x90, 0x190],
    ids=hex,
)
def test_an_answer_that_cannot_come_after_the_pin_was_looked_at_spends_nothing(
    toll_settings: Settings, toll_faults: Faults, code: int
) -> None:
    del toll_settings
    for _ in range(4):
        toll_faults.set("call-fails", function="C_Login", rv=code)
        with program("none") as app, pytest.raises(HsmTollError) as caught:
            signed(app)
        assert not isinstance(caught.value, PinNotTried)
    toll_faults.clear()
    with program("none") as app:
        assert signed(app)
    assert NOT_TRIED


def test_a_person_who_said_no_at_the_device_is_not_asked_again_for_the_same_call(
    toll_settings: Settings, toll_faults: Faults
) -> None:
    del toll_settings
    toll_faults.set("call-fails", function="C_Login", rv=0x50)
    with program("none") as app, pytest.raises(DeviceError):
        signed(app)
    assert toll_faults.count("C_Login") == 1


def test_a_pin_that_has_expired_was_right(toll_settings: Settings, toll_faults: Faults) -> None:
    del toll_settings
    toll_faults.set("call-fails", function="C_Login", rv=0xA3)
    for _ in range(3):
        with program("none") as app, pytest.raises(HsmTollError) as caught:
            signed(app)
        assert caught.value.code == "pin-state"
        assert "it was correct but has expired" in (caught.value.hint or "")
    toll_faults.clear()
    with program("none") as app:
        assert signed(app)


# ---------------------------------------------------------------------- one bad thing hides nothing


@pytest.mark.parametrize("code", [0x5, 0x7, 0x13, 0x30, 0x54, 0x60, 0x81000001], ids=hex)
def test_an_object_that_cannot_be_read_hides_no_other(
    toll_settings: Settings,
    toll_softhsm: SoftHsm,
    toll_faults: Faults,
    toll_eseal: TemporaryIdentity,
    code: int,
) -> None:
    toll_softhsm.generate_key("damaged", b"\xda")
    try:
        toll_softhsm.store_certificate(_der(toll_eseal), label="damaged", key_id=b"\xda")
        toll_faults.set("object-unreadable", label="damaged", rv=code)
        with program("none") as app:
            assert signed(app)
            seen = app.hsm.inspect().tokens
            assert any("eseal" in key.label for token in seen for key in token.keys)
        assert toll_settings.hsm.key
    finally:
        toll_faults.clear()
        toll_softhsm.delete("damaged")


def test_objects_that_the_device_cannot_decrypt_hide_none_of_its_own(
    toll_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No imitation: files of another SoftHSM lie among this one's."""
    own, other = SoftHsm.create(tmp_path / "own"), SoftHsm.create(tmp_path / "other")
    made = eseal(own, label="mine")
    eseal(other, label="strange")
    (here,) = (own.directory / "tokens").iterdir()
    (there,) = (other.directory / "tokens").iterdir()
    moved = [each for each in there.iterdir() if not each.name.startswith("token.")]
    for each in moved:
        shutil.copy(each, here)
    assert len(moved) > 4
    register_identity(toll_sandbox, made)
    variables = {
        **made.environ(),
        **toll_sandbox.environ(),
        "HSMTOLL_CONFIG": os.devnull,
        "HSMTOLL_STATE": str(tmp_path / "state"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    signs = command("sign", "road")
    assert signs.returncode == 0, signs.stderr
    assert "device-down" not in signs.stderr
    seen = command("objects")
    assert "object=mine" in seen.stdout
    assert command("doctor").returncode == 0
    fresh = made.environ()["HSMTOLL_HSM__KEY"].replace("object=mine", "object=fresh")
    generated = command("key", "generate", HSMTOLL_HSM__KEY=fresh)
    assert generated.returncode == 0, generated.stderr


def _der(made: TemporaryIdentity) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return made.chain[0].public_bytes(Encoding.DER)


@pytest.mark.parametrize("code", [0x5, 0x6, 0x54, 0x30, 0x7, 0x81000001], ids=hex)
def test_an_attribute_that_a_module_does_not_know_takes_nothing_away(
    toll_settings: Settings, toll_faults: Faults, code: int, isolation: str
) -> None:
    del toll_settings
    for attribute in (0x202, 0x163, 0x108):  # ALWAYS_AUTHENTICATE, LOCAL, SIGN
        toll_faults.set("attribute-fails", attribute=attribute, rv=code)
        with program(isolation) as app:
            assert signed(app)
    # The control: what protects the key is not guessed.
    toll_faults.set("attribute-fails", attribute=0x103, rv=code)
    with program(isolation) as app, pytest.raises(DeviceError) as caught:
        signed(app)
    assert caught.value.code == "key-exportable"


def test_a_certificate_that_is_there_and_cannot_be_read_is_named_with_the_reason(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    assert toll_settings.hsm.key
    toll_faults.set("attribute-fails", attribute=0x11, rv=GENERAL_ERROR)
    with program(isolation) as app, pytest.raises(CertificateError) as caught:
        signed(app)
    assert "certificate 'eseal' on the device cannot be read" in str(caught.value)
    assert "GeneralError" in str(caught.value)
    result = command("doctor", HSMTOLL_HSM__ISOLATION=isolation)
    assert result.returncode == 40
    assert "'eseal' on the device cannot be read" in result.stdout
    assert "there is no certificate" not in result.stdout


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x30])
def test_a_certificate_with_padding_behind_it_is_cut(
    toll_settings: Settings, toll_faults: Faults, fill: int
) -> None:
    del toll_settings
    toll_faults.set("value-padded", n=4096, rv=fill)
    with program("none") as app:
        assert signed(app)


def test_a_slot_that_cannot_be_described_hides_no_other(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("slot-info-error")
    with program(isolation) as app:
        assert signed(app)
        problems = [each.problem for each in app.hsm.inspect().tokens if each.problem]
    assert problems == ["the slot answers 0x30"]


def test_a_label_with_a_nul_in_it_is_printed_as_it_can_be_pasted(
    toll_settings: Settings, toll_softhsm: SoftHsm, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("label-nul")
    with program(isolation) as app:
        assert signed(app)
        every = [str(key.uri) for token in app.hsm.inspect().tokens for key in token.keys]
    # Other tests of the room leave keys of other names and devices behind.
    uris = [uri for uri in every if "object=eseal" in uri]
    assert uris
    assert all(f"token={toll_softhsm.label};" in uri for uri in uris)
    assert not [uri for uri in uris if "%00" in uri.partition(";object=")[0]]
    assert all(KeyUri.parse(uri) for uri in every)


def test_a_device_that_does_not_say_that_it_is_initialised_is_read_all_the_same(
    toll_settings: Settings, toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> None:
    del toll_settings
    toll_faults.set("token-unflagged")
    with program("none") as app:
        assert signed(app)
        settings = DeviceSettings(toll_faults.module, KeyUri())
        seen = InProcessDevice(settings, pin=None, pin_log=PinLog(tmp_path)).inspect()
    assert any(token.certificates for token in seen.tokens)
    assert toll_softhsm.label


# ---------------------------------------------------------------------- how it is signed


@pytest.mark.parametrize("code", [0x30, 0x21, 0x2, 0x31, 0x68, 0x54, 0x6], ids=hex)
def test_a_hashing_mechanism_that_cannot_take_an_assertion_is_replaced_once_for_all(
    toll_settings: Settings, toll_faults: Faults, code: int, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("data-limit", n=1000, rv=code)
    with program(isolation) as app:
        (device,) = app.devices
        assert device.sign("RS256", data(app)).value
        for _ in range(3):
            assert device.sign("RS256", long(app)).value
        # One for the short one, one in vain, and then one for each.
        assert toll_faults.count("C_SignInit") == 1 + 1 + 3
        assert signed(app)


def test_the_self_test_of_a_signing_host_shows_what_cannot_take_a_grant(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("data-limit", n=8000)
    with program(isolation) as app:
        (device,) = app.devices
        public = device.key().public
        assert public
        # By the mechanism that hashes, in vain, and by the other.
        assert device.self_test("RS256", candidates=[public]) == public
        assert toll_faults.count("C_SignInit") == 2


def test_doctor_makes_one_signature_of_the_size_of_a_grant_where_it_is_asked_to(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings

    def examined(*, signing: bool) -> tuple[dict[str, Check], int]:
        toll_faults.reset_counts()
        with program(isolation) as app:
            report = doctor.run(app, signing=signing)
        return {each.check: each for each in report.checks}, report.exit_code

    checks, code = examined(signing=False)
    assert (checks["signature"].verdict, code) == ("skip", 0)
    assert "no signature was made" in checks["signature"].line
    assert toll_faults.count("C_SignInit") == 0
    checks, code = examined(signing=True)
    assert (checks["signature"].verdict, code) == ("ok", 0)
    assert "it verifies" in checks["signature"].line
    assert toll_faults.count("C_SignInit") == 1
    # Too little for a digest, too: what no check of flags and attributes shows.
    toll_faults.set("data-limit", n=10)
    checks, code = examined(signing=False)
    assert (checks["signature"].verdict, code) == ("skip", 0)
    checks, code = examined(signing=True)
    assert (checks["signature"].verdict, code) == ("fail", 30)
    assert checks["certificate"].code == "not-reached"


@pytest.mark.parametrize("code", [0xA0, 0xA4, 0x50, 0xE0], ids=hex)
def test_a_word_about_pin_person_or_presence_is_no_reason_for_another_mechanism(
    toll_settings: Settings, toll_faults: Faults, code: int
) -> None:
    del toll_settings
    with program("none") as app:
        (device,) = app.devices
        assert accepted(device)
        toll_faults.set("call-fails", function="C_SignInit", rv=code)
        toll_faults.reset_counts()
        with pytest.raises(HsmTollError):
            device.sign("RS256", long(app))
        toll_faults.clear()
        toll_faults.reset_counts()
        with program("none") as fresh:
            assert fresh.devices[0].sign("RS256", long(fresh)).value
    assert toll_faults.count("C_SignInit") == 1


def test_a_signature_without_the_zeros_that_it_begins_with_is_whole_again(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    with program("none") as app:
        (device,) = app.devices
        public = device.key().public
        assert public is not None
        begins_with_zero = next(
            each
            for each in (data(app, str(n)) for n in range(20_000))
            if device.sign("RS256", each).value[0] == 0
        )
    toll_faults.set("signature-short")
    with program(isolation) as app:
        signature = app.devices[0].sign("RS256", begins_with_zero, candidates=[public]).value
    assert len(signature) == 256
    assert public.verify("RS256", begins_with_zero, signature)


@pytest.fixture(scope="module")
def own_pin(toll_softhsm: SoftHsm) -> str:
    """The URI of a key that wants its PIN for each signature."""
    toll_softhsm.generate_key("own-pin", b"\x5f", always_authenticate=True)
    return toll_softhsm.uri("own-pin")


def test_a_signing_pin_that_is_set_is_given_although_the_device_asks_for_none(
    toll_settings: Settings, toll_faults: Faults, own_pin: str, isolation: str
) -> None:
    toll_faults.set("context-login-untold")
    pin = toll_settings.hsm.pin_file
    assert pin is not None
    with program(isolation, hsm__key=own_pin, hsm__signing_pin_file=pin) as app:
        assert app.devices[0].sign("RS256", data(app)).value
    # Without one the setting is named, and the user's PIN is not tried in its place.
    toll_faults.reset_counts()
    with program(isolation, hsm__key=own_pin) as app, pytest.raises(DeviceError) as caught:
        app.devices[0].sign("RS256", data(app))
    assert caught.value.code == "signing-pin"
    assert "HSMTOLL_HSM__SIGNING_PIN_FILE" in (caught.value.hint or "")
    assert toll_faults.count("C_Login") == 2


def test_a_device_that_knows_no_pin_for_a_single_signature_signs_without(
    toll_settings: Settings, toll_faults: Faults, isolation: str
) -> None:
    del toll_settings
    toll_faults.set("context-login-unknown")
    with program(isolation) as app:
        (device,) = app.devices
        for _ in range(3):
            assert device.sign("RS256", data(app)).value
        # Asked for once.
        assert toll_faults.count("C_Login") == 2


# ---------------------------------------------------------------------- few sessions

_OPENS_TWO = """
import sys, pkcs11
token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])
first = token.open()
try:
    token.open(rw=True)
except pkcs11.PKCS11Error as exc:
    print(type(exc).__name__)
"""


@pytest.mark.parametrize(
    ("fault", "options", "answer"),
    [
        ("session-limit", {"n": 1}, "SessionCount"),
        ("session-limit", {"n": 2}, "None"),
        ("session-exclusive", {"rv": 0xB1}, "SessionCount"),
        ("session-exclusive", {"rv": 0xB7}, "SessionReadOnlyExists"),
    ],
)
def test_a_device_with_few_sessions_signs_and_lists_and_makes_keys(
    partition: SoftHsm,
    toll_faults: Faults,
    isolation: str,
    fault: str,
    options: dict[str, Any],
    answer: str,
) -> None:
    toll_faults.set(fault, **options)
    result = subprocess.run(
        [sys.executable, "-c", _OPENS_TWO, str(toll_faults.module), partition.label],
        env=os.environ | partition.environ(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == answer.replace("None", "")
    with program(isolation) as app:
        (device,) = app.devices
        for _ in range(2):
            assert signed(app)
        made = device.generate(bits=2048, label="made", key_id=None, always_authenticate=False)
        assert made.object == "made"
        # It goes on with as few as before.
        assert signed(app)
        assert {key.label for key in device.private_keys()} == {"acme", "made"}
    if isolation == "none":
        assert toll_faults.sessions() == 0
    seen = command("objects", HSMTOLL_HSM__ISOLATION=isolation)
    assert (seen.returncode, "object=made" in seen.stdout) == (0, True), seen.stderr
    assert "do not show" not in seen.stdout
    looked = command("doctor", HSMTOLL_HSM__ISOLATION=isolation)
    assert looked.returncode == 0, looked.stdout


def test_a_login_that_is_answered_with_the_number_of_sessions_is_not_made_twice(
    toll_settings: Settings, toll_faults: Faults
) -> None:
    del toll_settings

    def logins(answer: int) -> int:
        toll_faults.reset_counts()
        toll_faults.set("call-fails", function="C_Login", rv=answer)
        # Each time in a process that has not loaded the module before.
        with program("process") as app, pytest.raises(DeviceError):
            app.devices[0].sign("RS256", data(app))
        return toll_faults.count("C_Login")

    # CKR_SESSION_COUNT, and CKR_SESSION_HANDLE_INVALID, which is about no number of them.
    assert logins(0xB1) == logins(0xB3)


def test_a_login_that_is_refused_leaves_no_session_open(
    toll_settings: Settings, toll_faults: Faults, toll_softhsm: SoftHsm
) -> None:
    del toll_settings
    # CKR_PIN_LOCKED without the flag for it, as a TPM in its pause: every call tries again.
    toll_faults.set("call-fails", function="C_Login", rv=0xA4)
    with program("none") as app:
        for _ in range(4):
            with pytest.raises(PinNotTried):
                app.devices[0].sign("RS256", data(app))
        assert (toll_faults.count("C_Login"), toll_faults.sessions()) == (4, 0)
        # The library by itself leaves one.
        (token,) = open_module(toll_faults.module).lib.get_tokens(token_label=toll_softhsm.label)
        with pytest.raises(PinLocked):
            token.open(user_pin=toll_softhsm.pin)
        assert toll_faults.sessions() == 1


def test_a_command_says_once_that_the_device_is_away(
    toll_settings: Settings,
    toll_faults: Faults,
    isolation: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del toll_settings
    toll_faults.set("call-fails", function="C_OpenSession", rv=DEVICE_ERROR)
    result = command("chain", HSMTOLL_HSM__ISOLATION=isolation)
    assert result.returncode == 30
    assert "device-gone" in result.stderr
    assert "device-down" not in result.stderr
    # A program that lives on is told in its log.
    with program(isolation) as app:
        for _ in range(2):
            with pytest.raises(DeviceError):
                app.devices[0].certificates()
    assert "device-down" in caplog.text


# ---------------------------------------------------------------------- big partitions


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> TemporaryIdentity:
    """What the device of each test here is a copy of."""
    device = SoftHsm.create(
        tmp_path_factory.mktemp("common") / "own", label="many", pin="4711471147"
    )
    return eseal(device, label="acme")


@pytest.fixture
def partition(
    toll_settings: Settings,
    toll_faults: Faults,
    common: TemporaryIdentity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SoftHsm:
    """A device of its own: what other tests left on the common one costs calls as well."""
    del toll_settings
    own = copied(common.device, tmp_path / "own")
    for name, value in (own.environ("acme") | common.settings | toll_faults.environ()).items():
        monkeypatch.setenv(name, value)
    return own


def filled(device: SoftHsm, text: str, *more: str) -> None:
    subprocess.run(
        [sys.executable, "-c", text, str(device.module), device.label, device.pin, *more],
        env=os.environ | device.environ(), check=True, timeout=120,
    )  # fmt: skip


def cost(faults: Faults) -> int:
    """The calls of a token's assertion, in a program that has just started."""
    faults.reset_counts()
    with program("process") as app:
        assert signed(app)
    return sum(faults.calls().values())


def test_a_partition_full_of_keys_costs_a_token_no_more_calls(
    partition: SoftHsm, toll_faults: Faults
) -> None:
    cost(toll_faults)
    few = cost(toll_faults)
    filled(partition, _MANY)
    many = cost(toll_faults)
    # At 5 ms a call two seconds are 400 calls.
    assert many == few
    assert many < 400


def test_of_a_partition_full_of_certificates_those_of_other_keys_stay_unread(
    partition: SoftHsm, toll_faults: Faults
) -> None:
    cost(toll_faults)
    filled(partition, _OTHERS, "kept")
    with program("process") as app:
        (device,) = app.devices
        # A chain of three, and a stranger's.
        assert len(device.certificates()) == 60 + 4
        assert len(device.certificates(near=True)) == 3
    many = cost(toll_faults)
    filled(partition, _OTHERS, "kept")
    assert cost(toll_faults) == many
    assert many < 400


def test_a_certificate_with_neither_id_nor_label_of_its_key_is_found_in_a_full_partition(
    partition: SoftHsm,
) -> None:
    filled(partition, _OTHERS, "renamed")
    with program("none") as app:
        assert signed(app)
