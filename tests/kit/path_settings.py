"""
What hsmtoll does with each setting that is a path: a content that will do, and what uses it.

Made of one certification authority, whose files are as a signing host and its callers have them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from hsmtoll.host.audit import Audit
from hsmtoll.host.emergency_stop import check_stop_directory, stopped_by
from hsmtoll.host.policy import Policy
from hsmtoll.host.sockets import server_context
from hsmtoll.hsm.module import PKCS11_LOCK, open_module
from hsmtoll.hsm.pin import PinCommand, PinFile
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from hsmtoll.hsm.public_key import public_key
from hsmtoll.settings import load
from hsmtoll.tls import client_context, host_context
from hsmtoll.tokens.redis_store import read_key
from hsmtoll.tokens.stores import FileStore
from hsmtoll.x509.reloading import CertificateFile
from tests.kit.signing_host import Authority

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["DIRECTORIES", "FILES", "SECRETS", "Material", "module", "table", "users_of_directories"]

_POLICY: Final = b"""
[profile.acme]
environment = "sandbox"
identity = "eseal"

[caller."uid:5001"]
profile.acme = { scopes = ["road"] }
"""


@dataclass(frozen=True)
class Use:
    """Bytes of a file that will do, and what takes its path."""

    content: bytes
    take: Callable[[Path], object]


class Material:
    """The files of each setting, made once below *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Seconds that a PIN command or a pipe with a PIN in it has.
        self.patience = 60.0
        authority = Authority(folder / "ca")
        self.app, self.ca, self.crl = authority.issue("app"), authority.ca, authority.crl()
        pem, key = self.app.cert.read_bytes(), self.app.key.read_bytes()
        ca, crl = self.ca.read_bytes(), self.crl.read_bytes()
        seal = Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        self.public = load_pem_private_key(_rsa(), None).public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )  # fmt: skip
        self.audit_key = folder / "audit.key"
        self.audit_key.write_bytes(seal)
        self.audit_key.chmod(0o600)
        script = b"#!/bin/sh\necho 1234\n"
        self.files: Mapping[str, Use] = {
            "HSMTOLL_CONFIG": Use(b"timeout = 5", lambda path: load(config=path)),
            "HSMTOLL_CA_FILE": Use(ca, client_context),
            "HSMTOLL_CACHE_KEY_FILE": Use(b"k" * 32, read_key),
            "HSMTOLL_HSM__PIN_FILE": Use(b"1234", self._pin_file),
            "HSMTOLL_HSM__PIN_COMMAND": Use(script, self._pin_command),
            "HSMTOLL_HSM__PUBLIC_KEY": Use(self.public, self._public_key),
            "HSMTOLL_HSM__CERTIFICATES": Use(pem, self._certificates),
            "HSMTOLL_SIGNER__CA_FILE": Use(ca, self._caller("ca_file")),
            "HSMTOLL_SIGNER__CLIENT_CERT": Use(pem, self._caller("certificate")),
            "HSMTOLL_SIGNER__CLIENT_KEY": Use(key, self._caller("key")),
            "HSMTOLL_HOST__POLICY": Use(_POLICY, Policy.load),
            "HSMTOLL_HOST__CERT": Use(pem, self._host("cert")),
            "HSMTOLL_HOST__KEY": Use(key, self._host("key")),
            "HSMTOLL_HOST__CLIENT_CA": Use(ca, self._host("client_ca")),
            "HSMTOLL_HOST__CLIENT_CRL": Use(crl, self._host("crl")),
            "HSMTOLL_HOST__AUDIT_KEY": Use(seal, self._audit),
        }

    def _host(self, name: str) -> Callable[[Path], object]:
        fine: dict[str, Any] = {
            "cert": self.app.cert, "key": self.app.key, "client_ca": self.ca, "crl": None,
        }  # fmt: skip
        return lambda path: server_context(**fine | {name: path})

    def _caller(self, name: str) -> Callable[[Path], object]:
        fine: dict[str, Any] = {
            "certificate": self.app.cert, "key": self.app.key, "ca_file": self.ca, "more": None,
        }  # fmt: skip
        return lambda path: host_context(**fine | {name: path})

    def _audit(self, key: Path) -> None:
        noted = self.folder / "noted" / "checkpoint"
        Audit(self.folder / "log", key, now=lambda: 0.0, noted=noted).close()

    def _pin_file(self, path: Path) -> None:
        assert PinFile(path, timeout=self.patience).read(device="lab").reveal() == "1234"

    def _pin_command(self, path: Path) -> None:
        command = f"sh {shlex.quote(str(path))}"
        assert PinCommand(command, timeout=self.patience).read(device="lab").reveal() == "1234"

    @staticmethod
    def _public_key(path: Path) -> None:
        public_key(load(config="/dev/null", hsm__public_key=path))

    @staticmethod
    def _certificates(path: Path) -> None:
        assert CertificateFile(path, "HSMTOLL_HSM__CERTIFICATES")().certificates


def module(path: Path) -> None:
    """HSMTOLL_HSM__MODULE: loaded as the device does it."""
    with PKCS11_LOCK.held(60):
        open_module(path)


def _rsa() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import rsa

    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def table() -> dict[str, str]:
    """The role of each setting, as `security.md` says."""
    text = resources.files("hsmtoll").joinpath("docs/security.md").read_text(encoding="utf-8")
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(HSMTOLL_[A-Z_]+)`", cells[0]):
            found[name] = cells[1]
    return found


#: The settings that name a file which is read, and those of them that hold a secret.
FILES: Final = (
    "HSMTOLL_CONFIG", "HSMTOLL_CA_FILE", "HSMTOLL_CACHE_KEY_FILE", "HSMTOLL_HSM__PIN_FILE",
    "HSMTOLL_HSM__PIN_COMMAND", "HSMTOLL_HSM__PUBLIC_KEY", "HSMTOLL_HSM__CERTIFICATES",
    "HSMTOLL_SIGNER__CA_FILE", "HSMTOLL_SIGNER__CLIENT_CERT", "HSMTOLL_SIGNER__CLIENT_KEY",
    "HSMTOLL_HOST__POLICY", "HSMTOLL_HOST__CERT", "HSMTOLL_HOST__KEY", "HSMTOLL_HOST__CLIENT_CA",
    "HSMTOLL_HOST__CLIENT_CRL", "HSMTOLL_HOST__AUDIT_KEY",
)  # fmt: skip
SECRETS: Final = (
    "HSMTOLL_CACHE_KEY_FILE", "HSMTOLL_SIGNER__CLIENT_KEY", "HSMTOLL_HOST__KEY",
    "HSMTOLL_HOST__AUDIT_KEY",
)  # fmt: skip


def users_of_directories(material: Material) -> Mapping[str, Callable[[Path], object]]:
    """What keeps something in a directory, or looks into it, by setting."""

    def audit(path: Path) -> None:
        noted = material.folder / "noted for it" / path.name
        Audit(path, material.audit_key, now=lambda: 0.0, noted=noted).close()

    def state(path: Path) -> None:
        with PinLog(path).held(TokenUser("maker", "model", "1", "label", "user")):
            pass

    def cache(path: Path) -> None:
        store = FileStore(path)
        store.put("ab", b"token", ttl=60)
        assert store.get("ab") is not None

    def stop(path: Path) -> None:
        check_stop_directory(path / "stop")
        assert stopped_by(path / "stop") is None

    return {
        "HSMTOLL_HOST__AUDIT_DIR": audit,
        "HSMTOLL_STATE": state,
        "HSMTOLL_CACHE": cache,
        "HSMTOLL_HOST__STOP_FILE": stop,
    }


DIRECTORIES: Final = (
    "HSMTOLL_HOST__AUDIT_DIR", "HSMTOLL_STATE", "HSMTOLL_CACHE", "HSMTOLL_HOST__STOP_FILE",
)  # fmt: skip
