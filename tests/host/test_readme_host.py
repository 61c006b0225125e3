"""
The page about the signing host, followed to the letter: by root, on a machine of its
own without systemd, from its accounts to the verified audit.

The machine is a set of namespaces with directories of their own. What the page leaves to others
is done by the test: it is the certificate's issuer, and the name server.
"""

from __future__ import annotations

import base64
import json
import re
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

from hsmtoll.host.system import clock_is_synchronised
from hsmtoll.sandbox import pki
from tests.kit.accounts import NEEDS_NAMESPACES
from tests.kit.readers import TOP, Block, Terminal, blocks, commands, section
from tests.kit.signing_host import PATIENCE, ROAD_SCOPE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs_root


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
        """What an account is told that logs in and types *script*."""
        command = f"cd {folder} && {{ {script.rstrip()}\n}}"
        return self.run(
            f'runuser -u {name} -- env -i HOME=/home/{name} PATH="$PATH" bash -ec '
            f"{shlex.quote(command)}"
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Without any account, directory or setting of hsmtoll; it is installed in /opt/hsmtoll."""
    tried = subprocess.run([*UNSHARE, "mount", "--make-rprivate", "/"], check=False, cwd="/")
    if tried.returncode:
        pytest.skip(NEEDS_NAMESPACES)
    folder = tmp_path_factory.mktemp("root")
    with Machine(folder, tmp_path_factory.mktemp("scratch")) as made:
        yield made


def certify(machine: Machine) -> x509.Certificate:
    """What the issuer of eSeals does: a chain for acme.csr, in the place that the page names."""
    request = x509.load_pem_x509_csr((machine.folder / "acme.csr").read_bytes())
    key = request.public_key()
    assert request.is_signature_valid
    assert isinstance(key, rsa.RSAPublicKey)
    authority = pki.eseal_authority()
    leaf = authority.issue(key)
    machine.do(f"echo {shlex.quote(pki.pem(leaf, *authority.chain).decode())} > acme.pem")
    machine.do("install -m 0644 acme.pem /etc/hsmtoll/acme.pem")
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


def test_the_signing_host_of_the_readme_signs_for_its_callers(machine: Machine) -> None:
    serve = ""
    for block in blocks(section("Set up the host")):
        if block.kind == "toml":
            machine.file(block)
            if block.text.rstrip().endswith('audit.key"') and not clock_is_synchronised():
                # As the page says for a machine whose kernel does not know who keeps the clock.
                machine.do("echo 'clock = \"unchecked\"' >> /etc/hsmtoll/hsmtoll.toml")
        elif "key import" in block.text:
            leaf = certify(machine)
            machine.follow(block)
        elif " serve" in block.text:
            *before, (serve, _) = commands(block)
            for command, _ in before:
                machine.do(command)
            machine.serve(serve)
        else:
            machine.follow(block)

    at_socket, make, settings, over_tls, caller, keys = blocks(section("Callers"))
    # On the machine itself, as an account that the policy knows.
    result = machine.as_account("app", at_socket.text, "/home/app")
    assert result[0] == 0, result[1]
    assert verified(machine.do("cat /home/app/grant"), leaf) == ROAD_SCOPE
    # The control: an account that is no member of the group does not reach the socket.
    machine.do("useradd --create-home mallory")
    code, output = machine.as_account("mallory", at_socket.text, "/home/mallory")
    assert code != 0
    assert "custodian" in output, output
    # Over TLS, which needs a restart.
    machine.follow(make)
    machine.file(settings)
    machine.end()
    machine.do(
        "install -d -o app /home/app/tls && install -m 0600 -o app app.pem app.key /home/app/tls"
    )
    machine.do("install -m 0644 ca.pem /home/app/tls")
    machine.serve(serve)
    result = machine.as_account("app", over_tls.text, "/home/app/tls")
    assert result[0] == 0, result[1]
    assert verified(machine.do("cat /home/app/tls/grant"), leaf) == ROAD_SCOPE
    # By ssh: what sshd runs for the key.
    machine.file(caller)
    (forced,) = re.findall(r'command="([^"]+)"', keys.text)
    code, grant = machine.as_account("app", forced)
    assert code == 0, grant
    assert verified(grant, leaf) == ROAD_SCOPE

    (custody,) = blocks(section("While it runs"))
    shown = {command: machine.do(command) for command, _ in commands(custody)}
    listed = next(output for command, output in shown.items() if "audit list" in command)
    assert " signed" in listed
    for name in ("uid:1001", "san:dns:app.acme.example"):
        assert name in listed
    # The stop is typed as the page has it, and holds until it is taken back.
    machine.do("hsmtoll stop")
    assert "stop" in machine.as_account("app", forced)[1]
    machine.do("hsmtoll resume")
    assert machine.as_account("app", forced)[0] == 0
    # The control: a record that was altered is found.
    machine.end()
    verify = next(command for command in shown if "audit verify" in command)
    machine.do("sed -i s/uid:1001/uid:1002/ /var/lib/hsmtoll/audit/*.jsonl")
    assert machine.run(verify)[0] == 91
