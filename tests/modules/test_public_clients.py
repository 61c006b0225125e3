"""Clients that others wrote, as their registries hold them, at the sandbox's default profile."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsmtoll.sandbox import pki
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.sandbox.state import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCOPE = "toll:movement/road/v2"
CLIENT, KID = "a4ac8d05-6f3f-4d32-9d8e-1c1f8a9a2b11", "the-key"

_PYTHON = """
import sys
from pymaskinporten.client import MaskinportenClient
from pymaskinporten.config import MaskinportenSecrets
token_url, audience, client, kid, scope = sys.argv[1:]
secrets = MaskinportenSecrets(
    PRIVATE_KEY=sys.stdin.read(), MASKINPORTEN_CLIENT_ID=client, KID=kid, SCOPE=scope
)
made = MaskinportenClient(secrets, "test", token_url=token_url, audience=audience)
print(made.get_token().count("."))
"""

_NODE = """
const maskinporten = require('@vtfk/maskinporten-auth')
const [url, audience, issuer, scope, pemcert, pemprivateKey] = process.argv.slice(2)
maskinporten({ url, audience, issuer, scope, pemcert, pemprivateKey }).then(
  token => console.log(token.access_token.split('.').length - 1),
  error => { console.error(JSON.stringify(error.response?.data ?? String(error))); process.exit(1) }
)
"""


@pytest.fixture(scope="module")
def signing_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def authority() -> pki.Authority:
    return pki.norwegian_authority()


@pytest.fixture
def judge(signing_key: rsa.RSAPrivateKey, authority: pki.Authority) -> Iterator[Sandbox]:
    with Sandbox(trust=[authority]) as sandbox:
        sandbox.register_client(Client("by-certificate", pki.NORWEGIAN_ORG_NO))
        sandbox.register_client(CLIENT, keys={KID: signing_key.public_key()})
        yield sandbox


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


def pem_of(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def run(*argv: str, **how: str) -> subprocess.CompletedProcess[str]:
    stdin, cwd = how.pop("stdin", ""), how.pop("cwd", None)
    return subprocess.run(
        argv, input=stdin, cwd=cwd, env={**os.environ, **how}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip


def test_pymaskinporten_gets_a_token_by_its_registered_key(
    judge: Sandbox, signing_key: rsa.RSAPrivateKey, folder: Path
) -> None:
    python = folder / "venv" / "bin" / "python"
    assert run(sys.executable, "-m", "venv", str(folder / "venv")).returncode == 0
    # It asks for a newer Python than the oldest one here, on which it runs as well.
    wanted = ("--quiet", "--ignore-requires-python", "pymaskinporten==2.1.0")
    made = run(str(python), "-m", "pip", "install", *wanted)
    assert made.returncode == 0, made.stderr

    def asked(kid: str) -> subprocess.CompletedProcess[str]:
        argv = (judge.token_endpoint, judge.issuer, CLIENT, kid, SCOPE)
        pem = pem_of(signing_key).decode()
        ca = str(judge.ca_file)
        return run(str(python), "-c", _PYTHON, *argv, stdin=pem, SSL_CERT_FILE=ca)

    done = asked(KID)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert (judge.received[-1].header or {})["typ"] == "JWT"
    # The control: a key that is not registered is refused.
    assert asked("another").returncode != 0


def test_vtfk_maskinporten_auth_gets_a_token_by_its_certificate_alone(
    judge: Sandbox, signing_key: rsa.RSAPrivateKey, authority: pki.Authority, folder: Path
) -> None:
    (folder / "package.json").write_text("{}")
    (folder / "ask.js").write_text(_NODE)
    wanted = ("--no-audit", "--no-fund", "@vtfk/maskinporten-auth@2.0.5")
    made = run("npm", "install", *wanted, cwd=str(folder))
    assert made.returncode == 0, made.stderr
    leaf = authority.issue(signing_key.public_key()).public_bytes(Encoding.PEM)

    def asked(certificate: bytes) -> subprocess.CompletedProcess[str]:
        inputs = (base64.b64encode(each).decode() for each in (certificate, pem_of(signing_key)))
        argv = (judge.token_endpoint, judge.issuer, "by-certificate", SCOPE, *inputs)
        ca = str(judge.ca_file)
        return run("node", "ask.js", *argv, cwd=str(folder), NODE_EXTRA_CA_CERTS=ca)

    done = asked(leaf)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert len((judge.received[-1].header or {})["x5c"]) == 1
    # As it makes x5c of a file with carriage returns (a PKCS#12 of its own has them), which RFC
    # 4648 has refused.
    refused = asked(leaf.replace(b"\n", b"\r\n"))
    assert refused.returncode == 1
    assert "MP-123" in refused.stderr
    assert "characters outside the base alphabet" in refused.stderr
