"""Every fault of the device, and what a user of hsmtoll sees of it."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll import DeviceError, HsmTollError, PinIncorrect, PinNotTried, TollClient, connect
from hsmtoll.app import App
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey
from hsmtoll.settings import load
from hsmtoll.testing.identity import eseal, register_identity
from tests.kit.grants import a_grant
from tests.kit.own_device import accepted
from tests.softhsm.conftest import CROWD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity
    from hsmtoll.testing.softhsm import SoftHsm

_T = TypeVar("_T")
DATA = a_grant()


@pytest.fixture
def device(toll_settings: Settings, toll_faults: Faults) -> Any:
    del toll_faults
    app = App(toll_settings)
    # Without an audience: the grants of this file have one of their own.
    with app.hsm._device(app.hsm._token_settings(app.hsm.uris()[0])) as made:
        yield made


def fails(device: InProcessDevice) -> HsmTollError:
    with pytest.raises(HsmTollError) as caught:
        device.sign("RS256", DATA)
    return caught.value


@pytest.mark.parametrize(
    ("name", "error", "code", "logins"),
    [
        ("pin-wrong", PinIncorrect, "pin-incorrect", 1),
        ("pin-final-try", PinNotTried, "pin-final-try", 0),
        ("pin-locked", PinNotTried, "pin-locked", 0),
        ("token-removed", DeviceError, None, 0),
        ("wrong-signature", DeviceError, "signature-wrong", 1),
    ],
)
def test_a_fault_has_its_class_and_the_pin_is_not_wasted(
    device: InProcessDevice,
    toll_faults: Faults,
    name: str,
    error: type,
    code: str | None,
    logins: int,
) -> None:
    toll_faults.set(name)
    exc = fails(device)

    assert type(exc) is error
    assert code is None or exc.code == code
    assert toll_faults.count("C_Login") == logins


def test_a_low_count_is_a_warning_where_the_pin_was_accepted_before_and_else_a_refusal(
    device: InProcessDevice, toll_faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    toll_faults.set("pin-count-low")
    assert fails(device).code == "pin-count-low"
    assert toll_faults.count("C_Login") == 0

    toll_faults.clear()
    assert accepted(device)
    device.close()
    toll_faults.set("pin-count-low")
    assert device.sign("RS256", DATA).value
    assert "pin-count-low: a wrong PIN was given" in caplog.text


def test_the_status_shows_the_pin_as_the_device_last_reported_it(
    toll_client: TollClient, toll_faults: Faults
) -> None:
    assert toll_client.status().pin is None
    toll_client.token("road")
    assert toll_client.status().pin == "ok"
    toll_faults.set("pin-count-low")
    toll_faults.set("session-lost")
    toll_client.token("road", renew=True)

    assert toll_client.status().pin == "count-low"


def test_the_final_try_is_taken_where_a_person_says_so(
    toll_settings: Settings, toll_faults: Faults
) -> None:
    toll_faults.set("pin-final-try")
    app = App(toll_settings, use_final_try=True)

    assert app.devices[0].sign("RS256", a_grant(audience=app.endpoints.issuer)).value
    assert toll_faults.count("C_Login") == 1
    app.close()


def _sign(**variables: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "hsmtoll", "sign", "road"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def with_pins(
    softhsm: SoftHsm, faults: Faults, state: Path, pin: str, signing: str | None = None
) -> InProcessDevice:
    return InProcessDevice(
        DeviceSettings(faults.module, KeyUri.parse(softhsm.uri("each" if signing else "toll"))),
        pin=PinValue.of(pin),
        signing_pin=PinValue.of(signing, name="SIGNING") if signing else None,
        pin_log=PinLog(state),
    )


@pytest.mark.parametrize("signing", [None, "9999"])
def test_the_wrong_pin_that_locked_a_device_is_not_tried_again_when_it_is_unblocked(
    toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path, signing: str | None
) -> None:
    if signing:
        toll_softhsm.generate_key("each", b"\x5e", always_authenticate=True)
    pin = toll_softhsm.pin if signing else "9999"
    toll_faults.set("pin-last-try")
    with with_pins(toll_softhsm, toll_faults, tmp_path, pin, signing) as device:
        assert fails(device).code == "pin-locked"
    toll_faults.clear()
    with with_pins(toll_softhsm, toll_faults, tmp_path, pin, signing) as device:
        before = toll_faults.count("C_Login")
        assert fails(device).code == "pin-refused"
        # With a PIN of its own for the signature, the other one is good.
        assert toll_faults.count("C_Login") == before + bool(signing)
    right = toll_softhsm.pin
    with with_pins(toll_softhsm, toll_faults, tmp_path, right, signing and right) as device:
        assert accepted(device)


def test_an_answer_of_locked_without_the_flag_says_nothing_about_the_pin(
    toll_softhsm: SoftHsm, toll_faults: Faults, tmp_path: Path
) -> None:
    # As a TPM, which shows no flags.
    toll_faults.set("nth-call-fails", function="C_Login", rv=0xA4)
    with with_pins(toll_softhsm, toll_faults, tmp_path, toll_softhsm.pin) as device:
        with pytest.raises(PinNotTried):
            accepted(device)
        assert accepted(device)


@pytest.mark.usefixtures("toll_settings")
def test_a_wrong_pin_in_run_after_run_is_tried_once(toll_faults: Faults) -> None:
    toll_faults.set("pin-wrong")
    codes = [_sign().returncode for _ in range(CROWD)]

    assert codes == [20] + [21] * (CROWD - 1)
    assert toll_faults.count("C_Login") == 1


@pytest.mark.usefixtures("toll_settings")
def test_a_wrong_pin_in_a_crowd_is_tried_once_and_the_right_one_works(
    toll_faults: Faults, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("00000000")
    wrong.chmod(0o600)
    with ThreadPoolExecutor(CROWD) as pool:
        done = list(pool.map(lambda _: _sign(HSMTOLL_HSM__PIN_FILE=str(wrong)), range(CROWD)))

    codes = [each.returncode for each in done]
    # On a slow machine one may tire of waiting for its turn (30): it did not try either.
    assert codes.count(20) == 1
    assert set(codes) <= {20, 21, 30}
    assert toll_faults.count("C_Login") == 1
    assert _sign(HSMTOLL_HSM__PIN_FILE=str(wrong)).returncode == 21
    assert toll_faults.count("C_Login") == 1
    assert _sign().returncode == 0
    assert (toll_faults.count("C_Login"), toll_faults.count("C_SignInit")) == (2, 1)


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize("after", [False, True])
def test_a_process_killed_inside_the_login_does_not_lock_out_the_next(
    toll_faults: Faults, after: bool
) -> None:
    toll_faults.set("kill-inside-login", after=after)
    assert _sign().returncode == -9
    toll_faults.clear()

    assert _sign().returncode == 0
    assert toll_faults.count("C_Login") == 2


@pytest.mark.usefixtures("toll_settings")
def test_processes_that_keep_dying_in_the_login_stop_trying(toll_faults: Faults) -> None:
    toll_faults.set("kill-inside-login")
    codes = [_sign().returncode for _ in range(5)]
    toll_faults.clear()

    assert set(codes) == {-9, 21}
    assert toll_faults.count("C_Login") <= 3
    assert _sign().returncode == 21


def test_without_the_hashing_mechanism_the_digest_is_made_here(
    device: InProcessDevice, toll_faults: Faults, toll_eseal: TemporaryIdentity
) -> None:
    plain = device.sign("RS256", DATA).value
    device.close()
    toll_faults.set("mechanism-missing")
    toll_faults.reset_counts()

    assert _after_one_error(device) == plain
    key = toll_eseal.chain[0].public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    numbers = key.public_numbers()
    assert RsaPublicKey(numbers.n, numbers.e).verify("RS256", DATA, plain)
    toll_faults.set("mechanism-missing", raw=True)
    device.close()
    assert fails(device).code == "mechanism"


def _after_one_error(device: InProcessDevice) -> bytes:
    """What was cached of the device may cost one error; then it is asked anew."""
    try:
        return device.sign("RS256", DATA).value
    except DeviceError:
        return device.sign("RS256", DATA).value


def test_where_the_public_half_is_hidden_the_first_grant_proves_the_leaf(
    toll_client: TollClient, toll_faults: Faults
) -> None:
    toll_faults.set("hidden-modulus")

    assert toll_client.token("road").value
    # The grant's own signature is the proof: none was made for it.
    assert toll_faults.count("C_SignInit") == 1


@pytest.fixture(scope="module")
def twin(toll_softhsm: SoftHsm) -> TemporaryIdentity:
    """An eSeal beside which lies a newer one of another key, under the same name and id."""
    made = eseal(toll_softhsm, label="twin")
    assert made.authority is not None
    key = rsa.generate_private_key(65537, 2048).public_key()
    other = made.authority.issue(key, not_before=datetime.now(UTC) - timedelta(minutes=1))
    assert other.not_valid_before_utc > made.chain[0].not_valid_before_utc
    der = other.public_bytes(Encoding.DER)
    toll_softhsm.store_certificate(der, label="twin", key_id=b"twin")
    return made


@pytest.mark.parametrize(("hidden", "signatures"), [(False, 1), (True, 2)])
def test_a_leaf_that_was_guessed_wrongly_is_corrected_by_the_first_signature(
    twin: TemporaryIdentity,
    toll_settings: Settings,
    toll_sandbox: Sandbox,
    toll_faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    *,
    hidden: bool,
    signatures: int,
) -> None:
    del toll_settings
    for name, value in {**twin.environ(), **toll_faults.environ()}.items():
        monkeypatch.setenv(name, value)
    register_identity(toll_sandbox, twin)
    if hidden:
        toll_faults.set("hidden-modulus")

    with connect() as client:
        assert client.token("road").value
        assert toll_faults.count("C_SignInit") == signatures
        # What was learned stays: the next token costs one signature.
        assert client.token("air").value
        assert toll_faults.count("C_SignInit") == signatures + 1
    done = _sign()
    assert (done.returncode, done.stderr) == (0, "")
    assert toll_faults.count("C_SignInit") == 2 * signatures + 1


def _when_back(ask: Callable[[], _T]) -> _T:
    """A device that was down is asked again by itself after a pause."""
    end = time.monotonic() + 60
    while True:
        try:
            return ask()
        except HsmTollError:
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.parametrize("name", ["session-lost", "handles-stale", "device-error"])
def test_what_the_device_forgot_is_found_again_within_the_call(
    device: InProcessDevice, toll_faults: Faults, name: str
) -> None:
    first = device.sign("RS256", DATA).value
    toll_faults.set(name)

    assert device.sign("RS256", DATA).value == first


def test_a_card_that_was_pulled_works_again_when_it_is_back(
    device: InProcessDevice, toll_faults: Faults
) -> None:
    first = device.sign("RS256", DATA).value
    toll_faults.set("token-removed")
    assert isinstance(fails(device), DeviceError)
    assert fails(device).code == "device-down"
    toll_faults.clear("token-removed")

    assert _when_back(lambda: device.sign("RS256", DATA).value) == first


def test_a_slot_that_fails_does_not_hide_the_others(
    device: InProcessDevice, toll_faults: Faults
) -> None:
    toll_faults.set("slot-error")

    assert device.sign("RS256", DATA).value


def test_a_thousand_cached_tokens_ask_the_device_nothing(
    toll_client: TollClient, toll_faults: Faults
) -> None:
    toll_client.token("road")
    before = toll_faults.calls()
    for _ in range(1000):
        toll_client.token("road")

    assert toll_faults.calls() == before
    assert before["C_SignInit"] == 1


def test_a_device_that_hangs_ends_at_the_deadline_and_living_tokens_are_still_given(
    toll_settings: Settings, toll_faults: Faults
) -> None:
    del toll_settings
    app = App(load(deadline=3.0))
    client = app.client()
    client.token("road")
    toll_faults.set("hang")
    with pytest.raises(DeviceError) as caught:
        client.token("air")

    assert "ISOLATION=process" in (caught.value.hint or "")
    assert client.token("road").value
    toll_faults.clear("hang")
    assert _when_back(lambda: client.token("air").value)


@pytest.mark.usefixtures("toll_settings")
def test_a_module_that_crashes_takes_one_command_and_no_more(toll_faults: Faults) -> None:
    toll_faults.set("crash", function="C_SignInit")
    assert _sign().returncode == -6
    toll_faults.clear()

    assert _sign().returncode == 0
