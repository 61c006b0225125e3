"""Bytes of certificates that openssl judges as well."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from hsmtoll import der
from hsmtoll.x509.certificate_files import certificates_in
from hsmtoll.x509.path_building import build
from tests.kit import pki
from tests.kit.pki import NOW
from tests.unit.x509.test_certificate_bytes import _of_length, _padded, _resigned, _version_1

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.x509.certificate import Certificate


def test_certificates_of_every_length_are_proven_as_openssl_proves_them(tmp_path: Path) -> None:
    _, inter, root = pki.good()
    seen = {}
    least = len(der.content(_padded(0).tbs, der.SEQUENCE)) + 8
    for size in range(least, least + 264):
        leaf = _of_length(size)
        judge = x509.load_der_x509_certificate(leaf.der)
        assert leaf.tbs == judge.tbs_certificate_bytes
        assert build(leaf, [root, inter], now=NOW).certificates == (leaf, inter, root)
        seen[len(der.content(leaf.tbs, der.SEQUENCE)) & 0xFF] = leaf
    # An extension's own length may skip one: all endings but a few were made, 0x80 among them.
    assert len(seen) >= 248
    assert 0x80 in seen
    (tmp_path / "above.pem").write_text(inter.pem() + root.pem())
    (tmp_path / "root.pem").write_text(root.pem())
    paths = []
    for ending, leaf in sorted(seen.items()):
        paths.append(tmp_path / f"{ending:02x}.pem")
        paths[-1].write_text(leaf.pem())
    output = _verify(tmp_path, *paths)
    assert output.count(": OK") == len(paths), output


def _verify(where: Path, *paths: Path) -> str:
    done = subprocess.run(
        [
            *("openssl", "verify", "-attime", str(int(NOW.timestamp()))),
            *("-CAfile", str(where / "root.pem"), "-untrusted", str(where / "above.pem")),
            *map(str, paths),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_modulus_without_its_leading_zero_is_positive_and_proves(tmp_path: Path) -> None:
    key = pki.rsa_key(1)
    root = pki.authority("Root", key)
    numbers = key.public_key().public_numbers()
    modulus = numbers.n.to_bytes(256, "big")
    short = _resigned(root, b"\x00" + modulus, modulus, key)
    assert short.public_key == root.public_key
    leaf = pki.issue(pki.name("A"), pki.rsa_key(), pki.name("Root"), key)
    assert build(leaf, [short], now=NOW).certificates == (leaf, short)
    for name, each in (("root", short), ("above", short), ("leaf", leaf)):
        (tmp_path / f"{name}.pem").write_text(each.pem())
    assert ": OK" in _verify(tmp_path, tmp_path / "leaf.pem")


def test_openssl_agrees_about_roots_of_version_1(tmp_path: Path) -> None:
    key = pki.rsa_key(1)
    root = _version_1(pki.authority("Root", key, key_ids=False), key)
    leaf = pki.issue(pki.name("A"), pki.rsa_key(), pki.name("Root"), key)
    for name, each in (("root", root), ("above", root), ("leaf", leaf)):
        (tmp_path / f"{name}.pem").write_text(each.pem())
    assert ": OK" in _verify(tmp_path, tmp_path / "leaf.pem")


@pytest.mark.parametrize(
    ("restricted", "fine"),
    [
        (("md:sha256", "mgf1_md:sha256", "saltlen:32"), True),
        (("md:sha256", "mgf1_md:sha256", "saltlen:20"), True),
        ((), True),
        (("md:sha512", "mgf1_md:sha512", "saltlen:20"), False),
        (("md:sha256", "mgf1_md:sha512", "saltlen:20"), False),
        (("md:sha256", "mgf1_md:sha256", "saltlen:48"), False),
    ],
)
def test_parameters_of_an_issuers_pss_key_are_obeyed_as_openssl_obeys_them(
    tmp_path: Path, restricted: tuple[str, ...], *, fine: bool
) -> None:
    root = _pss_root(tmp_path, restricted)
    assert (root.key_type, root.pss is None) == ("rsa-pss", not restricted)
    signing = load_pem_private_key((tmp_path / "free.pem").read_bytes(), None)
    assert isinstance(signing, rsa.RSAPrivateKey)
    leaf = pki.issue(pki.name("A"), pki.rsa_key(), pki.name("Root"), signing, pss=True)
    found = build(leaf, [root], now=NOW).certificates
    assert found == ((leaf, root) if fine else (leaf,))
    for name, each in (("root", root), ("above", root), ("leaf", leaf)):
        (tmp_path / f"{name}.pem").write_text(each.pem())
    assert (": OK" in _verify(tmp_path, tmp_path / "leaf.pem")) is fine


def _pss_root(where: Path, restricted: tuple[str, ...]) -> Certificate:
    """A root with a restricted key; the same numbers without a restriction are free.pem."""
    options = [word for each in restricted for word in ("-pkeyopt", f"rsa_pss_keygen_{each}")]
    bits = ("-pkeyopt", "rsa_keygen_bits:2048")
    key, out = where / "key.pem", where / "root.der"
    start, end = ("20260101000000Z", "20270101000000Z")
    for command in (
        ("genpkey", "-algorithm", "RSA-PSS", *bits, *options, "-out", key),
        ("req", "-new", "-key", key, "-subj", "/CN=Root", "-out", where / "csr.pem"),
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    (where / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = a\n[a]\ndatabase = {where}/index\nrand_serial = yes\n"
        f"new_certs_dir = {where}\ndefault_md = default\npolicy = p\nx509_extensions = v\n"
        "[p]\ncommonName = supplied\n[v]\nbasicConstraints = critical,CA:true\n"
    )
    (where / "index").touch()
    subprocess.run(
        [
            *("openssl", "ca", "-batch", "-selfsign", "-config", where / "ca.cnf", "-in"),
            *(where / "csr.pem", "-keyfile", key, "-out", out, "-notext"),
            *("-startdate", start, "-enddate", end),
        ],
        check=True,
        capture_output=True,
    )
    private = load_pem_private_key(key.read_bytes(), None)
    free = private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (where / "free.pem").write_bytes(free)
    return certificates_in(out.read_bytes(), "root")[0]
