"""The sandbox's made-up authorities, judged by openssl."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.sandbox.pki import (
    Authority,
    eseal_authority,
    issue_tls,
    norwegian_authority,
    pem,
    tls_authority,
    unrelated_ca,
)
from tests.kit.rule_cases import key

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography import x509

DAY = timedelta(days=1)
VERIFY = ["openssl", "verify", "-x509_strict", "-CAfile", "root.pem"]


def verified(
    folder: Path, leaf: x509.Certificate, middle: x509.Certificate, root: x509.Certificate
) -> bool:
    for name, cert in (("leaf", leaf), ("middle", middle), ("root", root)):
        (folder / f"{name}.pem").write_bytes(pem(cert))
    done = subprocess.run(
        [
            "openssl",
            "verify",
            "-x509_strict",
            "-CAfile",
            "root.pem",
            "-untrusted",
            "middle.pem",
            "leaf.pem",
        ],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def text(cert: x509.Certificate) -> str:
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-nameopt", "utf8,sep_comma_plus"],
        input=pem(cert),
        capture_output=True,
        check=True,
    )
    return done.stdout.decode()


@pytest.mark.parametrize(
    "authority",
    [
        eseal_authority(),
        eseal_authority(algorithm="ec"),
        eseal_authority(algorithm="rsa-pss"),
        norwegian_authority("test"),
        norwegian_authority("prod"),
    ],
)
def test_openssl_verifies_a_leaf_and_refuses_it_under_another_root(
    authority: Authority, tmp_path: Path
) -> None:
    leaf = authority.issue(key().public_key())
    assert verified(tmp_path, leaf, *authority.chain)
    assert not verified(tmp_path, leaf, authority.intermediate, unrelated_ca())


@pytest.mark.parametrize(
    "options",
    [
        {"not_before": datetime.now(UTC) + DAY},
        {"not_before": datetime.now(UTC) - 9 * DAY, "not_after": datetime.now(UTC) - DAY},
        {"unknown_critical": True},
        {"self_signed_by": key()},
    ],
)
def test_openssl_refuses_the_broken_twins(options: dict[str, Any], tmp_path: Path) -> None:
    authority = eseal_authority()
    assert verified(tmp_path, authority.issue(key().public_key()), *authority.chain)
    assert not verified(tmp_path, authority.issue(key().public_key(), **options), *authority.chain)


def test_openssl_reads_what_was_asked_for() -> None:
    authority = eseal_authority()
    odd = "Øst & Vest \\ \u202eAB\x1b[31m"
    leaf = authority.issue(
        key().public_key(),
        organization=odd,
        organization_id="EI:SE-55 66",
        key_usage=["nonRepudiation"],
        serial=0x1234,
        qualified=True,
    )
    shown = text(leaf)
    assert "EI:SE-55 66" in shown
    assert "Non Repudiation" in shown
    assert "Digital Signature" not in shown
    assert "0x1234" in shown
    assert "qcStatements" in shown
    assert "0.4.0.194112.1.1" in shown
    assert "NTRSE" not in text(authority.issue(key().public_key(), organization_id=None))


def test_the_test_and_production_policies_differ() -> None:
    test, prod = (norwegian_authority(env).issue(key().public_key()) for env in ("test", "prod"))
    assert "2.16.578.1.29.913.210" in text(test)
    assert "2.16.578.1.29.13.210" in text(prod)


def test_the_tls_certificate_is_for_the_names_given(tmp_path: Path) -> None:
    ca, _ = tls_authority()
    leaf, _ = issue_tls(["localhost", "127.0.0.1"])
    (tmp_path / "ca.pem").write_bytes(pem(ca))
    (tmp_path / "leaf.pem").write_bytes(pem(leaf))

    def good(*options: str) -> bool:
        argv = ["openssl", "verify", "-CAfile", str(tmp_path / "ca.pem"), *options]
        done = subprocess.run([*argv, str(tmp_path / "leaf.pem")], capture_output=True, check=False)
        return done.returncode == 0

    assert good("-verify_hostname", "localhost", "-purpose", "sslserver")
    assert good("-verify_ip", "127.0.0.1")
    assert not good("-verify_hostname", "maskinporten.no")
