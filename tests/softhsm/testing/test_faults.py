"""Every fault shows at the PKCS#11 call what its name says, and is over when it is cleared."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pkcs11 import TokenFlag

from hsmtoll import UsageError
from hsmtoll.testing.faults import FUNCTIONS, NAMES, Faults
from tests.kit.signing_host import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.testing.softhsm import SoftHsm

# Written without hsmtoll: what is judged is the call, as python-pkcs11 makes it.
_SIGN = """
import sys, pkcs11
from pkcs11 import Attribute, Mechanism, ObjectClass, TokenFlag
module, label, pin = sys.argv[1], sys.argv[2], sys.stdin.readline().strip()
lib = pkcs11.lib(module)
p11_token = lib.get_token(token_label=label)
session = p11_token.open(user_pin=pin)
key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="k")
"""
_ONCE = _SIGN + "print(len(key.sign(b'abc', mechanism=Mechanism.SHA256_RSA_PKCS)))\n"


def run(
    faults: Faults, device: SoftHsm, program: str = _ONCE, timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(faults.module), device.label],
        input=f"{device.pin}\n",
        env={**os.environ, "SOFTHSM2_CONF": str(device.conf)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@contextlib.contextmanager
def started(faults: Faults, device: SoftHsm) -> Iterator[subprocess.Popen[str]]:
    """As run, while it goes on; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", _ONCE, str(faults.module), device.label],
        env={**os.environ, "SOFTHSM2_CONF": str(device.conf)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{device.pin}\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def says(done: subprocess.CompletedProcess[str]) -> str:
    """The last line: what was printed, or the exception."""
    return (done.stdout or done.stderr).strip().splitlines()[-1] if done.returncode >= 0 else ""


@pytest.mark.parametrize(
    ("name", "options", "answer", "asked"),
    [
        ("pin-wrong", {}, "PinIncorrect", {"C_Login": 1, "C_SignInit": 0}),
        ("pin-locked", {}, "PinLocked", {"C_Login": 1, "C_SignInit": 0}),
        ("token-removed", {}, "NoSuchToken", {"C_Login": 0}),
        ("mechanism-missing", {}, "MechanismInvalid", {"C_SignInit": 1}),
        ("nth-call-fails", {"function": "C_Login"}, "DeviceError", {"C_Login": 1}),
        ("nth-call-fails", {"function": "C_SignInit", "rv": 0x101}, "UserNotLoggedIn", {}),
        ("nth-call-fails", {"function": "C_Sign", "n": 2, "rv": 0x31}, "DeviceMemory", {}),
    ],
)
def test_a_fault_answers_as_its_name_says_and_clears(
    faults: Faults,
    device: SoftHsm,
    name: str,
    options: dict[str, object],
    answer: str,
    asked: dict[str, int],
) -> None:
    faults.set(name, **options)  # type: ignore[arg-type]  # the table above
    assert answer in says(run(faults, device))
    for function, count in asked.items():
        assert faults.count(function) == count
    faults.clear(name)

    assert says(run(faults, device)) == "256"


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("pin-count-low", TokenFlag.USER_PIN_COUNT_LOW),
        ("pin-final-try", TokenFlag.USER_PIN_FINAL_TRY),
        ("pin-locked", TokenFlag.USER_PIN_LOCKED),
    ],
)
def test_the_flags_of_the_pin_are_shown_before_any_login(
    faults: Faults, device: SoftHsm, name: str, flag: TokenFlag
) -> None:
    program = _SIGN.split("session", maxsplit=1)[0] + "print(int(p11_token.flags))\n"
    assert not int(says(run(faults, device, program))) & flag
    faults.set(name)
    assert int(says(run(faults, device, program))) & flag
    assert faults.count("C_Login") == 0


def test_lost_sessions_are_gone_and_new_ones_work(faults: Faults, device: SoftHsm) -> None:
    program = (
        _SIGN
        + """
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
try:
    key.sign(b"abc", mechanism=Mechanism.SHA256_RSA_PKCS)
except pkcs11.PKCS11Error as exc:
    first = type(exc).__name__
session = p11_token.open(user_pin=pin)
key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="k")
print(first, len(key.sign(b"abc", mechanism=Mechanism.SHA256_RSA_PKCS)))
"""
    )
    for name, answer in (
        ("session-lost", "SessionHandleInvalid 256"),
        ("device-error", "DeviceError"),
    ):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(faults.module), device.label],
            env={**os.environ, "SOFTHSM2_CONF": str(device.conf)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as child:  # fmt: skip
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(f"{device.pin}\n")
            child.stdin.flush()
            assert child.stdout.readline() == "ready\n"
            faults.set(name)
            child.stdin.write("\n")
            child.stdin.flush()
            assert answer in child.stdout.read()
    # Another process initialises anew, and knows of neither.
    assert says(run(faults, device)) == "256"


def test_stale_handles_are_void_until_the_key_is_found_again(
    faults: Faults, device: SoftHsm
) -> None:
    program = (
        _SIGN
        + """
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
try:
    key.sign(b"abc", mechanism=Mechanism.SHA256_RSA_PKCS)
except pkcs11.PKCS11Error as exc:
    first = type(exc).__name__
key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="k")
print(first, len(key.sign(b"abc", mechanism=Mechanism.SHA256_RSA_PKCS)))
"""
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(faults.module), device.label],
        env={**os.environ, "SOFTHSM2_CONF": str(device.conf)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{device.pin}\n")
        child.stdin.flush()
        assert child.stdout.readline() == "ready\n"
        faults.set("handles-stale")
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.read().strip() == "ObjectHandleInvalid 256"


def test_a_flipped_bit_is_seen_by_openssl(
    faults: Faults, device: SoftHsm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("signed")
    program = (
        _SIGN
        + f"""
from pkcs11.util.rsa import encode_rsa_public_key
public = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label="k")
open("{folder}/public.der", "wb").write(encode_rsa_public_key(public))
open("{folder}/data", "wb").write(b"abc")
open("{folder}/signature", "wb").write(key.sign(b"abc", mechanism=Mechanism.SHA256_RSA_PKCS))
"""
    )

    def verdict() -> int:
        assert run(faults, device, program).returncode == 0
        convert = ("rsa", "-RSAPublicKey_in", "-inform", "DER", "-in", "public.der")
        subprocess.run(
            ["openssl", *convert, "-pubout", "-out", "public.pem"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        verify = ("dgst", "-sha256", "-verify", "public.pem", "-signature", "signature", "data")
        return subprocess.run(
            ["openssl", *verify], cwd=folder, check=False, capture_output=True
        ).returncode

    assert verdict() == 0
    faults.set("wrong-signature")
    assert verdict() != 0


def test_the_list_of_mechanisms_agrees_with_what_signs(faults: Faults, device: SoftHsm) -> None:
    program = (
        _SIGN.split("session", maxsplit=1)[0]
        + "print(sorted(m.name for m in p11_token.slot.get_mechanisms() if 'RSA_PKCS' in m.name))\n"
    )
    assert "'SHA256_RSA_PKCS'" in says(run(faults, device, program))
    faults.set("mechanism-missing")
    listed = says(run(faults, device, program))
    assert "'SHA256_RSA_PKCS'" not in listed
    assert "'RSA_PKCS'" in listed
    faults.set("mechanism-missing", raw=True)
    assert "'RSA_PKCS'" not in says(run(faults, device, program))


def test_no_public_half_can_be_read(faults: Faults, device: SoftHsm) -> None:
    program = (
        _SIGN
        + """
public = len(list(session.get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY})))
try:
    modulus = len(key[Attribute.MODULUS])
except pkcs11.PKCS11Error as exc:
    modulus = type(exc).__name__
print(public, modulus, len(key.sign(b"abc", mechanism=Mechanism.SHA256_RSA_PKCS)))
"""
    )
    assert says(run(faults, device, program)) == "1 256 256"
    faults.set("hidden-modulus")
    assert says(run(faults, device, program)) == "0 AttributeTypeInvalid 256"


def test_a_slow_call_takes_its_time(faults: Faults, device: SoftHsm) -> None:
    faults.set("slow", function="C_Login", ms=600_000)
    with started(faults, device) as slow:
        eventually(lambda: faults.count("C_Login") == 1)
        # Who came later is done before it.
        faults.clear("slow")
        assert says(run(faults, device)) == "256"
        assert slow.poll() is None
    # The control: the time is what it was told.
    faults.set("slow", function="C_Login", ms=1)
    assert says(run(faults, device)) == "256"


def test_with_latency_a_call_of_any_kind_takes_its_time(faults: Faults, device: SoftHsm) -> None:
    faults.set("latency", ms=600_000)
    with started(faults, device) as slow:
        eventually(lambda: faults.calls() == {"C_Initialize": 1})
        # Who came later is done before it.
        faults.clear("latency")
        assert says(run(faults, device)) == "256"
        assert slow.poll() is None
    # The control: the time is what it was told.
    faults.set("latency", ms=1)
    assert says(run(faults, device)) == "256"


def test_a_hang_lasts_until_it_is_cleared(faults: Faults, device: SoftHsm) -> None:
    faults.set("hang")
    with pytest.raises(subprocess.TimeoutExpired):
        run(faults, device, timeout=3)
    faults.clear("hang")

    assert says(run(faults, device)) == "256"


def test_a_rate_holds_for_all_processes_together(faults: Faults, device: SoftHsm) -> None:
    faults.set("rate", ms=600_000)
    # The first signature of all has its turn at once; the next one, of another process, has not.
    assert says(run(faults, device)) == "256"
    with started(faults, device) as second:
        eventually(lambda: faults.count("C_SignInit") == 2)
        faults.clear("rate")
        assert says(run(faults, device)) == "256"
        assert second.poll() is None
    # The control: a rate that a machine cannot exceed keeps nobody waiting.
    faults.set("rate", ms=1)
    for _ in range(2):
        assert says(run(faults, device)) == "256"


@pytest.mark.parametrize(
    ("name", "options", "code", "logins"),
    [
        ("crash", {"function": "C_SignInit"}, -6, 1),
        ("kill-inside-login", {}, -9, 1),
        ("kill-inside-login", {"after": True}, -9, 1),
    ],
)
def test_a_process_dies_where_it_is_told_to(
    faults: Faults,
    device: SoftHsm,
    name: str,
    options: dict[str, object],
    code: int,
    logins: int,
) -> None:
    faults.set(name, **options)  # type: ignore[arg-type]  # the table above
    assert run(faults, device).returncode == code
    assert faults.count("C_Login") == logins
    faults.clear()

    assert says(run(faults, device)) == "256"


def test_a_slot_that_fails_is_there_and_fails(faults: Faults, device: SoftHsm) -> None:
    program = """
import sys, pkcs11
sys.stdin.readline()
for slot in pkcs11.lib(sys.argv[1]).get_slots():
    try:
        print(slot.get_token().label.strip() or "empty", end=" ")
    except pkcs11.PKCS11Error as exc:
        print(type(exc).__name__, end=" ")
"""
    assert "DeviceError" not in says(run(faults, device, program))
    faults.set("slot-error")
    listed = says(run(faults, device, program))
    assert "DeviceError" in listed
    assert device.label in listed


def test_counts_are_of_all_processes_and_agree_with_the_spy(
    faults: Faults, device: SoftHsm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The spy's log shows the PIN: it lies in a directory of its own, and goes.
    folder = tmp_path_factory.mktemp("spy")
    folder.chmod(0o700)
    log = folder / "log"
    spy = "/usr/lib/x86_64-linux-gnu/pkcs11/pkcs11-spy.so"
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _ONCE, spy, device.label],
            input=f"{device.pin}\n",
            env={
                **os.environ,
                "SOFTHSM2_CONF": str(device.conf),
                "PKCS11SPY": str(faults.module),
                "PKCS11SPY_OUTPUT": str(log),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert says(done) == "256"
    log_text = log.read_text(errors="replace")
    log.unlink()

    for function in ("C_Login", "C_SignInit", "C_Sign", "C_OpenSession", "C_FindObjectsInit"):
        assert faults.count(function) == log_text.count(f": {function}\n") > 0
    faults.reset_counts()
    assert faults.calls() == {}


def test_a_pin_is_not_in_the_shared_memory(faults: Faults, device: SoftHsm) -> None:
    assert says(run(faults, device)) == "256"
    control = faults.module.with_name("control").read_bytes()

    assert device.pin.encode() not in control
    assert faults.module.parent.stat().st_mode & 0o777 == 0o700


def test_a_fault_that_is_none_is_refused(faults: Faults) -> None:
    assert len(FUNCTIONS) == 68
    assert len(set(FUNCTIONS)) == 68
    for name in NAMES:
        faults.set(name)
    with pytest.raises(UsageError):
        faults.set("bad-mood")
    with pytest.raises(UsageError):
        faults.count("C_Nothing")
