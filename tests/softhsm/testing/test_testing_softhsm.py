"""The throw-away device: one's own, private, and gone with its directory."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmtoll import DeviceError, UsageError
from hsmtoll.testing.softhsm import SoftHsm, find_module

if TYPE_CHECKING:
    from pathlib import Path


def seen(device: SoftHsm, pin: str) -> subprocess.CompletedProcess[str]:
    """What pkcs11-tool, which is not ours, sees with *pin*."""
    return subprocess.run(
        [
            *("pkcs11-tool", "--module", str(device.module), "--token-label", device.label),
            *("--login", "--pin", pin, "--list-objects"),
        ],
        env={"SOFTHSM2_CONF": str(device.conf), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    return SoftHsm.create(tmp_path_factory.mktemp("own") / "softhsm")


def test_a_key_made_on_it_is_protected_and_its_public_half_is_given(device: SoftHsm) -> None:
    public = load_der_public_key(device.generate_key("sealed", b"\x01"))

    assert isinstance(public, rsa.RSAPublicKey)
    assert public.key_size == 2048
    shown = seen(device, device.pin).stdout
    assert "never extractable" in shown
    device.generate_key("loose", b"\x02", extractable=True, sensitive=False)
    assert seen(device, device.pin).stdout.count("never extractable") == 1


def test_only_its_own_pin_opens_it(device: SoftHsm) -> None:
    assert seen(device, device.pin).returncode == 0
    assert seen(device, "00000000").returncode != 0


def test_its_files_are_for_their_owner_alone(device: SoftHsm) -> None:
    assert device.directory.stat().st_mode & 0o777 == 0o700
    assert device.pin_file.stat().st_mode & 0o777 == 0o600
    assert device.pin not in repr(device)


def test_two_devices_differ_in_label_and_pin(tmp_path: Path) -> None:
    one, other = (SoftHsm.create(tmp_path / name) for name in ("one", "other"))

    assert one.label != other.label
    assert one.pin != other.pin


def test_a_batch_is_done_whole_or_not_at_all(device: SoftHsm) -> None:
    def half_way() -> None:
        with device.batch():
            device.delete("sealed")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_way()
    assert "sealed" in seen(device, device.pin).stdout
    with device.batch(), pytest.raises(UsageError):
        device.generate_key("x", b"\x03")
    device.delete("loose")
    assert "loose" not in seen(device, device.pin).stdout


def test_a_uri_escapes_what_labels_may_hold(tmp_path: Path) -> None:
    assert SoftHsm.create(tmp_path / "d", label="a b;c").uri("k%") == (
        "pkcs11:token=a%20b%3Bc;object=k%25"
    )


def test_a_module_that_is_not_there_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_module().is_file()
    monkeypatch.setenv("SOFTHSM2_MODULE", "/nowhere.so")

    with pytest.raises(DeviceError) as caught:
        find_module()
    assert "softhsm2" in (caught.value.hint or "")
