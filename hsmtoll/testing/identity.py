"""
Identities for the sandbox: a key generated on a device, its certificates, and the settings.

There are three kinds: a foreign eSeal, a Norwegian enterprise certificate, and a Norwegian key
registered under a kid. The organisations do not exist.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from hsmtoll.errors import UsageError
from hsmtoll.sandbox import pki
from hsmtoll.sandbox.serve import (
    listening,
    ports_from,
    read_anchors,
    read_clients,
    write_env,
)
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.sandbox.state import Client
from hsmtoll.testing.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cryptography import x509

    from hsmtoll.sandbox.pki import Authority
    from hsmtoll.sandbox.settings import Profile

__all__ = [
    "TemporaryIdentity",
    "eseal",
    "norwegian",
    "norwegian_key",
    "register_identity",
    "run_as",
]


@dataclass(frozen=True, slots=True)
class TemporaryIdentity:
    """
    A signing identity: the key *key_label* on *device*, and its registration at the sandbox.

    *chain* is (leaf, intermediate, root), empty for a key with a kid. The sandbox must trust
    *authority* and know *client*; each is None if not needed.
    """

    device: SoftHsm
    key_label: str
    settings: dict[str, str]
    chain: tuple[x509.Certificate, ...] = ()
    authority: Authority | None = None
    client: Client | None = None

    def environ(self) -> dict[str, str]:
        """The variables of device and identity; `Sandbox.environ` has the others."""
        return {**self.device.environ(self.key_label), **self.settings}


def eseal(
    device: SoftHsm, *, label: str = "eseal", authority: Authority | None = None
) -> TemporaryIdentity:
    """
    A foreign business with an eSeal: a protected RSA key generated on the device, and a chain of
    three, stored in no order together with an unrelated CA, as on real devices.
    """
    issuer = authority or pki.eseal_authority()
    chain = _certified(device, label, issuer)
    settings = {"HSMTOLL_IDENTITY": "eseal"}
    return TemporaryIdentity(device, label, settings, chain, issuer)


def norwegian(
    device: SoftHsm, *, label: str = "virksomhet", authority: Authority | None = None
) -> TemporaryIdentity:
    """A Norwegian business with an enterprise certificate for test, and its client id."""
    issuer = authority or pki.norwegian_authority()
    chain = _certified(device, label, issuer)
    client = Client(str(uuid.uuid4()), pki.NORWEGIAN_ORG_NO)
    settings = {"HSMTOLL_IDENTITY": "norwegian", "HSMTOLL_ISS": client.client_id}
    return TemporaryIdentity(device, label, settings, chain, issuer, client)


def norwegian_key(device: SoftHsm, *, label: str = "nokkel", posted: float) -> TemporaryIdentity:
    """
    A Norwegian business with a registered key and no certificate at all.

    *posted* is when the key was registered, in epoch seconds: it lives a year from there.
    """
    public = _loaded(device.generate_key(label, _key_id(label)))
    kid = str(uuid.uuid4())
    client = Client(str(uuid.uuid4()), pki.NORWEGIAN_ORG_NO, keys={kid: (public, posted)})
    settings = {
        "HSMTOLL_IDENTITY": "norwegian",
        "HSMTOLL_ISS": client.client_id,
        "HSMTOLL_KID": kid,
    }
    return TemporaryIdentity(device, label, settings, client=client)


def run_as(
    kind: str,
    command: Sequence[str],
    *,
    trust: Sequence[Path] = (),
    client_file: Path | None = None,
    rules: Profile = "strict-docs",
    port: int = 0,
    env_file: Path | None = None,
    admin: bool = False,
) -> int:
    """
    Run *command* with a temporary identity (``eseal``, ``norwegian`` or ``norwegian-key``) and a
    sandbox of its own. Returns its exit code, 128+N if signal N has ended it, as a shell does.
    All temporary files are removed.

    *port* is as for `hsmtoll.sandbox.run`; *env_file* gets the variables that *command* gets,
    and stays. *admin*: *command* gets the variables of the admin endpoint as well. Raises
    UsageError for a command that cannot be run, ConfigurationError for the rest.
    """
    clients = read_clients(client_file, now=time.time()) if client_file else []
    anchors = [each for path in trust for each in read_anchors(path)]
    with (
        tempfile.TemporaryDirectory(prefix="hsmtoll-") as folder,
        listening(
            Sandbox(profile=rules, trust=anchors, clients=clients, ports=ports_from(port))
        ) as sandbox,
    ):
        known = _identity(kind, SoftHsm.create(Path(folder) / "softhsm"))
        register_identity(sandbox, known)
        variables = {
            **known.environ(),
            **sandbox.environ(),
            # Nothing of a configuration file that this user or this machine has.
            "HSMTOLL_CONFIG": os.devnull,
            "HSMTOLL_PROFILE": "",
            "HSMTOLL_STATE": f"{folder}/state",
            "HSMTOLL_CACHE": f"file://{folder}/cache",
        }
        if admin:
            variables |= sandbox.admin_environ()
        if env_file is not None:
            write_env(env_file, {**variables, **sandbox.admin_environ()})
        return _run(command, variables)


def _identity(kind: str, device: SoftHsm) -> TemporaryIdentity:
    makers: dict[str, Callable[[SoftHsm], TemporaryIdentity]] = {
        "eseal": eseal,
        "norwegian": norwegian,
        "norwegian-key": partial(norwegian_key, posted=time.time()),
    }
    return makers[kind](device)


def _run(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """The exit code of *command*, run with *variables* and no other HSMTOLL_ variables."""
    kept = {n: v for n, v in os.environ.items() if not n.upper().startswith("HSMTOLL_")}
    try:
        process = subprocess.Popen(command, env={**kept, **variables})
    except OSError as exc:
        raise UsageError(f"{command[0]}: cannot be run ({exc.strerror})") from exc
    with process:
        try:
            code = process.wait()
        except BaseException:
            # Ctrl-C or SIGTERM: the command gets SIGTERM, and time to clean up.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            raise
    return code if code >= 0 else 128 - code


def register_identity(sandbox: Sandbox, identity: TemporaryIdentity) -> None:
    """Make *sandbox* trust and know *identity*."""
    if identity.authority is not None:
        sandbox.trust(identity.authority)
    if identity.client is not None:
        sandbox.register_client(identity.client)


def _certified(
    device: SoftHsm, label: str, authority: Authority
) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
    key_id = _key_id(label)
    leaf = authority.issue(device.generate_key(label, key_id))
    intermediate, root = authority.chain
    with device.batch():
        for at, each in enumerate((root, pki.unrelated_ca(), leaf, intermediate)):
            device.store_certificate(
                each.public_bytes(Encoding.DER),
                label=label if each is leaf else f"{label}-ca-{at}",
                key_id=key_id if each is leaf else bytes([0xA0 + at, *key_id]),
            )
    return leaf, intermediate, root


def _key_id(label: str) -> bytes:
    # Like the ids that HSM tools give: short, and the same for the key and its leaf.
    return label.encode()[:8]


def _loaded(spki: bytes) -> rsa.RSAPublicKey:
    key = load_der_public_key(spki)
    assert isinstance(key, rsa.RSAPublicKey)
    return key
