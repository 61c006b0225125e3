"""The shim counts what all processes ask, and changes nothing else of what the module does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsmtoll import DeviceError, UsageError
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.softhsm import SoftHsm

# Written without hsmtoll. `order` waits until the test has set a fault; `entry` calls the function
# list itself, for what python-pkcs11 does not offer.
_HEAD = """
import ctypes, sys, pkcs11
from pkcs11 import Attribute, Mechanism, ObjectClass
module, label, pin = sys.argv[1], sys.argv[2], sys.stdin.readline().strip()
p11_token = pkcs11.lib(module).get_token(token_label=label)
session = p11_token.open(rw=True, user_pin=pin)
key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="k")

def order(name):
    print(name, flush=True)
    sys.stdin.readline()

def sign(data=b"abc"):
    try:
        return key.sign(data, mechanism=Mechanism.SHA256_RSA_PKCS).hex()
    except pkcs11.PKCS11Error as exc:
        return type(exc).__name__

def entry(number, *arguments):
    table = ctypes.c_void_p()
    ctypes.CDLL(module).C_GetFunctionList(ctypes.byref(table))
    address = ctypes.cast(table.value + 8, ctypes.POINTER(ctypes.c_void_p))[number]
    return ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(address)(*arguments)
"""


def tells(module: Path, device: SoftHsm, program: str, faults: Faults | None = None) -> list[str]:
    """The words of the last line; each line before it names a fault that is set."""
    with subprocess.Popen(
        [sys.executable, "-c", _HEAD + program, str(module), device.label],
        env={**os.environ, "SOFTHSM2_CONF": str(device.conf)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(f"{device.pin}\n")
        child.stdin.flush()
        last = ""
        for line in child.stdout:
            last = line
            if faults is not None and line.startswith("set "):
                faults.set(line.split()[1])
                child.stdin.write("\n")
                child.stdin.flush()
        errors = child.stderr.read()
        assert child.wait(30) == 0, errors
    return last.split()


def test_processes_at_once_lose_no_count(faults: Faults, device: SoftHsm) -> None:
    program = _HEAD + "order('in')\nfor _ in range(50): sign()\n"
    argv = [sys.executable, "-c", program, str(faults.module), device.label]
    children: list[subprocess.Popen[str]] = []
    try:
        # One by one: SoftHSM rewrites its token at a login, and who reads it then finds none.
        for _ in range(4):
            child = subprocess.Popen(
                argv,
                env={**os.environ, "SOFTHSM2_CONF": str(device.conf)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            children.append(child)
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(f"{device.pin}\n")
            child.stdin.flush()
            assert child.stdout.readline() == "in\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        assert [child.wait(60) for child in children] == [0] * 4
    finally:
        for child in children:
            child.kill()
            child.communicate()

    assert (faults.count("C_Login"), faults.count("C_SignInit")) == (4, 200)


def test_a_copied_object_is_the_same_with_and_without_the_shim(
    faults: Faults, device: SoftHsm
) -> None:
    program = """
template = {Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: "a", Attribute.TOKEN: False}
print(session.create_object(template).copy({Attribute.LABEL: "b"})[Attribute.LABEL])
"""
    assert tells(device.module, device, program) == ["b"]
    assert tells(faults.module, device, program) == ["b"]
    faults.set("handles-stale")
    assert tells(faults.module, device, program) == ["b"]


def test_a_device_error_ends_with_finalize_and_initialize_and_not_with_one_of_them(
    faults: Faults, device: SoftHsm
) -> None:
    program = """
order("set device-error")
first, answer, second = sign(), entry(0, None), sign()
assert entry(1, None) == entry(0, None) == 0
p11_token = pkcs11.lib(module).get_token(token_label=label)
session = p11_token.open(user_pin=pin)
key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="k")
print(first, hex(answer), second, len(sign()))
"""
    lines = tells(faults.module, device, program, faults)

    assert lines == ["DeviceError", "0x191", "DeviceError", "512"]


@pytest.mark.parametrize(
    "before", ["pass", "entry(0, None)", "more = [p11_token.open() for _ in range(20)]"]
)
def test_sessions_are_lost_whatever_was_called_before(
    faults: Faults, device: SoftHsm, before: str
) -> None:
    program = f"{before}\norder('set session-lost')\nprint(sign())\n"

    assert tells(faults.module, device, program, faults) == ["SessionHandleInvalid"]


def test_sessions_are_lost_at_every_device_of_the_module(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    two = SoftHsm.create(tmp_path_factory.mktemp("two") / "softhsm")
    two.generate_key("k", b"\x01")
    made = ("--init-token", "--free", "--label", "other", "--pin", "12345678")
    subprocess.run(
        ["softhsm2-util", *made, "--so-pin", "12345678"],
        env={**os.environ, "SOFTHSM2_CONF": str(two.conf)},
        check=True,
        capture_output=True,
    )
    program = """
more = [p11_token.open() for _ in range(20)]
other = pkcs11.lib(module).get_token(token_label="other").open()
assert list(other.get_objects()) == []
order("set session-lost")
try:
    print(list(other.get_objects()))
except pkcs11.PKCS11Error as exc:
    print(type(exc).__name__)
"""
    with Faults(two.module, tmp_path_factory.mktemp("both")) as faults:
        assert tells(faults.module, two, program, faults) == ["SessionHandleInvalid"]


def test_a_signature_in_parts_is_wrong_as_well(faults: Faults, device: SoftHsm) -> None:
    program = """
right = sign()
assert sign([b"a", b"bc"]) == right
order("set wrong-signature")
print(sign() == right, sign([b"a", b"bc"]) == right)
"""
    assert tells(faults.module, device, program, faults) == ["False", "False"]


def test_a_relative_directory_serves_processes_that_stand_elsewhere(
    device: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Faults(device.module, Path("relative")) as faults:
        monkeypatch.chdir("/")

        assert len(tells(faults.module, device, "print(sign())\n")[0]) == 512
        assert faults.count("C_SignInit") == 1


def test_a_misspelt_fault_is_not_cleared_in_silence(faults: Faults) -> None:
    faults.clear("pin-wrong")
    with pytest.raises(UsageError):
        faults.clear("pin-worng")


def test_where_there_is_no_compiler_the_package_is_named(
    device: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError) as caught, Faults(device.module, tmp_path / "faults"):
        pass

    assert caught.value.code == "compiler-missing"
    assert "gcc" in (caught.value.hint or "")
