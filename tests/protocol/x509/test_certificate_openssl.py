"""Certificates for keys that openssl makes and cryptography does not."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_of_a_curve_without_a_name_is_ec(tmp_path: Path) -> None:
    curve = ("ec_paramgen_curve:P-256", "ec_param_enc:explicit")
    made = _openssl(tmp_path, "EC", *(word for item in curve for word in ("-pkeyopt", item)))
    assert (made.key_type, made.key_bits, made.public_key) == ("ec", 256, None)


def test_a_key_that_is_for_pss_alone_is_named(tmp_path: Path) -> None:
    made = _openssl(tmp_path, "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048")
    assert (made.key_type, made.key_bits) == ("rsa-pss", 2048)
    assert made.signature.scheme == "pss"


def _openssl(where: Path, algorithm: str, *options: str) -> Certificate:
    key, out = where / "key.pem", where / "out.der"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", algorithm, *options, "-out", str(key)],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            "openssl",
            *["req", "-x509", "-new", "-subj", "/CN=Root", "-sha256", "-outform", "DER"],
            "-key",
            str(key),
            "-out",
            str(out),
        ],
        check=True,
        capture_output=True,
    )
    return Certificate.load(out.read_bytes())
