"""With HSMTOLL_HSM__ISOLATION=process no command loads the module into its own process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from cryptography import x509

from hsmtoll.cli import main
from hsmtoll.sandbox.pki import eseal_authority, pem
from tests.kit.own_device import PIN, Lab, make_lab, workers

if TYPE_CHECKING:
    from click.testing import Result

    from tests.softhsm.conftest import DeviceSoftHsm

SUBJECT = (
    *("--country", "SE", "--organization", "Exempel AB", "--common-name", "Exempel"),
    *("--organization-identifier", "NTRSE-5566778899"),
)


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    return make_lab(device_softhsm.module, device_softhsm.environment, "commands")


@pytest.fixture
def module(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the module that no process has loaded, and the settings for it."""
    copy = tmp_path / "module.so"
    shutil.copy(lab.module, copy)
    pin = tmp_path / "pin"
    pin.touch(mode=0o600)
    pin.write_text(PIN)
    for name, value in {
        "HSMTOLL_STATE": str(tmp_path / "state"),
        "HSMTOLL_HSM__MODULE": str(copy),
        "HSMTOLL_HSM__KEY": f"pkcs11:token={lab.label};object=apart",
        "HSMTOLL_HSM__PIN_FILE": str(pin),
        "HSMTOLL_HSM__ISOLATION": "process",
        "HSMTOLL_ENVIRONMENT": "test",
        "HSMTOLL_IDENTITY": "eseal",
        "SOFTHSM2_CONF": lab.environment["SOFTHSM2_CONF"],
    }.items():
        monkeypatch.setenv(name, value)
    return copy


def hsmtoll(*argv: str) -> Result:
    done = CliRunner().invoke(main, argv, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def is_loaded(module: Path) -> bool:
    return str(module) in Path("/proc/self/maps").read_text()


def test_enrolment_and_what_looks_at_a_device_run_in_the_worker(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hsmtoll("key", "generate", "--bits", "2048").stdout
    assert "object=apart" in made
    request = x509.load_pem_x509_csr(hsmtoll("key", "csr", *SUBJECT).stdout.encode())
    assert request.is_signature_valid
    assert json.loads(hsmtoll("key", "jwk").stdout)["kty"] == "RSA"
    authority = eseal_authority()
    chain = tmp_path / "chain.pem"
    chain.write_bytes(pem(authority.issue(request.public_key()), *authority.chain))  # type: ignore[arg-type]  # an RSA key
    hsmtoll("key", "import", str(chain))
    assert len(json.loads(hsmtoll("chain", "--json").stdout)) == 3
    (device,) = [
        each
        for each in json.loads(hsmtoll("objects", "--json").stdout)["p11_tokens"]
        if each["keys"]
    ]
    assert device["logged_in"]
    assert json.loads(hsmtoll("pin", "clear", "--json").stdout)["devices"] == 1
    report = json.loads(hsmtoll("doctor", "--json").stdout)
    assert {each["check"]: each["verdict"] for each in report["checks"]}["key"] == "ok"
    assert not is_loaded(module)
    assert workers() == []
    # The control: without the setting the module is here.
    monkeypatch.setenv("HSMTOLL_HSM__ISOLATION", "none")
    hsmtoll("objects")
    assert is_loaded(module)
