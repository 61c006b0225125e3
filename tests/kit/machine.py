"""
A machine of its own for tests that need root: a set of namespaces with directories of their own,
without any account, directory or setting of hsmtoll; it is installed in /opt/hsmtoll.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jws as judge
from joserfc.jwk import RSAKey

from hsmtoll.sandbox import pki
from tests.kit.accounts import NEEDS_NAMESPACES
from tests.kit.readers import TOP, Block, Terminal
from tests.kit.signing_host import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Machine", "certify", "verified"]

#: The program that makes the mounts gets namespaces of its own; all in them ends with it.
UNSHARE: Final = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")

#: Directories that the machine has for itself; /etc begins as a copy of ours.
OWN: Final = ("/etc", "/home", "/opt", "/run", "/var/lib")

_LOOPBACK_UP: Final = """
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh22x", b"lo", 0x41))
"""

# In {scratch} everything is made ready, and then laid over what this machine has there.
_MACHINE: Final = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs {scratch}
mkdir -p {scratch}/base {scratch}/root {scratch}/{{home,opt,run,lib}}
mount --bind {base} {scratch}/base
mkdir -p {scratch}/opt/hsmtoll/{{packages,source/hsmtoll}}
mount --bind {packages} {scratch}/opt/hsmtoll/packages
mount --bind {tree}/hsmtoll {scratch}/opt/hsmtoll/source/hsmtoll
cp -a /etc {scratch}/etc
sed -i -E '/^(app|hsmtoll|hsmtoll-callers):/d' {scratch}/etc/{{passwd,shadow,group,gshadow}}
sed -i -E '/^[^:]*:[^:]*:1001:/d' {scratch}/etc/{{passwd,group}}
rm -rf {scratch}/etc/hsmtoll
echo '127.0.0.1 localhost signer.acme.example' > {scratch}/etc/hosts
install -d -g softhsm -m 2770 {scratch}/lib/softhsm {scratch}/lib/softhsm/tokens
for each in etc home opt run; do mount --rbind {scratch}/$each /$each; done
mount --rbind {scratch}/lib /var/lib
# Where other accounts cannot come to the interpreter, it is shown to them where it is.
if ! runuser -u nobody -- {base_python} -c '' 2> /dev/null; then
    mkdir -p {scratch}/root{below}
    mount --rbind {scratch}/root {closed}
    mount --bind {scratch}/base {base}
fi
{base_python} -m venv --without-pip /opt/hsmtoll
printf '/opt/hsmtoll/%s\\n' source packages > /opt/hsmtoll/lib/{version}/site-packages/all.pth
printf '%s\\n' '#!/opt/hsmtoll/bin/python' 'import runpy' \\
    'runpy.run_module("hsmtoll", run_name="__main__")' > /opt/hsmtoll/bin/hsmtoll
chmod 0755 /opt/hsmtoll/bin/hsmtoll
{base_python} -c {loopback}
exec bash
"""


def _machine(scratch: Path) -> str:
    base = Path(sys.base_prefix).resolve()
    closed = next(
        (each for each in reversed(base.parents) if not each.stat().st_mode & 0o001), base
    )
    variables = {
        "scratch": scratch,
        "base": base,
        "base_python": base / "bin" / f"python{sysconfig.get_python_version()}",
        "version": f"python{sysconfig.get_python_version()}",
        "closed": closed,
        "below": f"/{base.relative_to(closed)}",
        "packages": sysconfig.get_path("purelib"),
        "tree": TOP,
        "loopback": _LOOPBACK_UP,
    }
    return _MACHINE.format(**{name: shlex.quote(str(each)) for name, each in variables.items()})


class Machine(Terminal):
    """Root's shell on the machine; *folder* is where root is, and other accounts cannot look."""

    @classmethod
    @contextlib.contextmanager
    def made(cls, factory: pytest.TempPathFactory) -> Iterator[Machine]:
        """One that ends with the block; skips the test where root may not make namespaces."""
        tried = subprocess.run([*UNSHARE, "mount", "--make-rprivate", "/"], check=False, cwd="/")
        if tried.returncode:
            pytest.skip(NEEDS_NAMESPACES)
        folder = factory.mktemp("root")
        with cls(folder, factory.mktemp("scratch")) as one:
            yield one

    def __init__(self, folder: Path, scratch: Path) -> None:
        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        super().__init__(folder, (*UNSHARE, "bash", "-c", _machine(scratch)), environ)
        self.folder = folder

    def do(self, command: str) -> str:
        """What a command of the test says that succeeds."""
        code, output = self.run(command)
        assert code == 0, f"{command}\n{output}"
        return output

    def file(self, block: Block) -> None:
        """Put a file there that the page shows; one that it continues gets longer."""
        first, _, text = block.text.partition("\n")
        path = shlex.quote(first.removeprefix("# ").partition(",")[0])
        self.do(f"printf %s {shlex.quote(text)} >> {path}; chmod 0644 {path}")

    def serve(self, command: str) -> None:
        """Start the daemon by the page's *command*, and wait until it can sign."""
        log = self.folder / "serve.log"
        log.unlink(missing_ok=True)
        self.do(f"{command} > serve.log 2>&1 & daemon=$!")
        until = time.monotonic() + PATIENCE
        while "signing host: ready" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < until, log.read_text()
            assert self.run("kill -0 $daemon")[0] == 0, log.read_text()
            time.sleep(0.1)

    def end(self) -> None:
        """End the daemon, and runuser, which passes SIGTERM on and exits with 143 itself."""
        assert self.run("kill $daemon; wait $daemon")[0] in (0, 143)

    def as_account(self, name: str, script: str, folder: str = "/") -> tuple[int, str]:
        """What an account sees that logs in and types *script*."""
        command = f"cd {folder} && {{ {script.rstrip()}\n}}"
        return self.run(
            f'runuser -u {name} -- env -i HOME=/home/{name} PATH="$PATH" bash -ec '
            f"{shlex.quote(command)}"
        )


def certify(machine: Machine) -> x509.Certificate:
    """What the issuer of eSeals does: a chain for acme.csr, in the place that the page names."""
    request = x509.load_pem_x509_csr((machine.folder / "acme.csr").read_bytes())
    key = request.public_key()
    assert request.is_signature_valid
    assert isinstance(key, rsa.RSAPublicKey)
    authority = pki.eseal_authority()
    leaf = authority.issue(key)
    machine.do(f"echo {shlex.quote(pki.pem(leaf, *authority.chain).decode())} > acme.pem")
    machine.do("install -D -m 0644 acme.pem /etc/hsmtoll/acme.pem")
    return leaf


def verified(grant: str, leaf: x509.Certificate) -> str:
    """The scope of a grant that is signed by the key of *leaf*, which another library says."""
    grant = grant.strip()
    header = json.loads(base64.urlsafe_b64decode(grant.partition(".")[0] + "=="))
    assert base64.b64decode(header["x5c"][0]) == leaf.public_bytes(Encoding.DER)
    pem = leaf.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    registry = judge.JWSRegistry(algorithms=["RS256"])
    registry.max_header_length = 16_384
    token = judge.deserialize_compact(grant, RSAKey.import_key(pem), registry=registry)
    return str(json.loads(token.payload)["scope"])
