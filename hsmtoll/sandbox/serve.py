"""
The sandbox as a program: its files, its ports, and serving until a signal.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import tomllib
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.sandbox import jose
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.sandbox.state import NORWEGIAN_SCOPES, Client

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from hsmtoll.sandbox.settings import Profile

__all__ = ["listening", "ports_from", "read_anchors", "read_clients", "run", "write_env"]


def read_clients(path: Path, *, now: float) -> list[Client]:
    """
    Norwegian clients from a TOML (or, named ``.json``, JSON) file:

        [[client]]
        client_id = "c1d2…"
        org_no = "987654325"
        scopes = ["toll:movement/road/v2"]      # default: every Norwegian scope
        granted = ["toll:movement/road/v2"]     # default: all that stand on the client

        [[client.key]]                          # none: the client uses a certificate (x5c)
        kid = "my-key"
        jwk = { kty = "RSA", n = "…", e = "AQAB" }   # or: pem = "key.pub.pem", a public key
        posted = 1790000000                     # epoch seconds; default: now

    Unknown members are ConfigurationErrors (10), as is everything that cannot be read.
    """
    try:
        text = path.read_text("utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return [_client(entry, path.parent, now) for entry in found["client"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"reading clients from {path}: {type(error).__name__}: {error}",
            hint="the file holds [[client]] tables with client_id and org_no",
            code="sandbox-clients",
        ) from error


def _client(entry: dict[str, Any], folder: Path, now: float) -> Client:
    if unknown := set(entry) - {"client_id", "org_no", "scopes", "granted", "key"}:
        raise ValueError(f"unknown member {', '.join(sorted(unknown))}")
    keys = {}
    for key in entry.get("key", []):
        if "jwk" in key:
            public = jose.public_key(key["jwk"])
        else:
            loaded = load_pem_public_key((folder / key["pem"]).read_bytes())
            if not isinstance(loaded, rsa.RSAPublicKey):
                raise ValueError(f"{key['pem']} is not an RSA key")
            public = loaded
        keys[str(key["kid"])] = (public, float(key.get("posted", now)))
    granted = entry.get("granted")
    return Client(
        str(entry["client_id"]),
        str(entry["org_no"]),
        frozenset(entry.get("scopes", NORWEGIAN_SCOPES)),
        keys,
        None if granted is None else frozenset(granted),
    )


def read_anchors(path: Path) -> list[x509.Certificate]:
    """CA certificates of a PEM file; ConfigurationError (10) for anything else."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"reading trusted certificates from {path}: {error}",
            hint="--trust takes a PEM file with one or more CA certificates",
            code="sandbox-trust",
        ) from error


def run(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    trust_files: Sequence[Path] = (),
    client_file: Path | None = None,
    env_file: Path | None = None,
    profile: Profile = "strict-docs",
    names: Sequence[str] = ("localhost", "127.0.0.1", "::1"),
) -> int:
    """
    Serves until SIGINT or SIGTERM; must be called in the main thread. Returns an exit code.

    With *port* N, Maskinporten has N, Customs N+1, admin N+2. The variables to export go to stdout
    as ``NAME=value`` lines, and to *env_file* (0600) when everything listens.
    """
    anchors = [one for path in trust_files for one in read_anchors(path)]
    clients = read_clients(client_file, now=time.time()) if client_file else []
    sandbox = Sandbox(
        profile=profile,
        trust=anchors,
        clients=clients,
        host=host,
        names=names,
        ports=ports_from(port),
    )
    # Not an Event: the signal may arrive while this thread holds the Event's lock.
    over: SimpleQueue[int] = SimpleQueue()
    before = {
        number: signal.signal(number, lambda ended, _: over.put(ended))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with listening(sandbox):
            variables = sandbox.environ() | sandbox.admin_environ()
            if env_file:
                write_env(env_file, variables)
            sys.stdout.write(_lines(variables))
            sys.stdout.flush()
            over.get()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def ports_from(port: int) -> tuple[int, int, int]:
    """Ports of Maskinporten, Customs and admin: *port* and the next two; 0: any free ones."""
    return (port, port + 1, port + 2) if port else (0, 0, 0)


@contextmanager
def listening(sandbox: Sandbox) -> Iterator[Sandbox]:
    """*sandbox* as a context manager; ConfigurationError (10) if it cannot listen."""
    try:
        sandbox.start()
    except OSError as error:
        raise ConfigurationError(
            f"sandbox: cannot listen ({error.strerror or error})",
            hint="choose other ports with --port, or none for free ones",
            code="sandbox-port",
        ) from error
    try:
        yield sandbox
    finally:
        sandbox.stop()


def _lines(variables: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def write_env(path: Path, variables: Mapping[str, str]) -> None:
    """Write ``NAME=value`` lines, mode 0600. Raises ConfigurationError (10)."""
    try:
        files.replace(path, _lines(variables).encode(), fsync=False)
    except OSError as error:
        raise ConfigurationError(
            f"--env-file {sanitized(path)}: cannot be written ({error.strerror})",
            code="sandbox-env-file",
        ) from error
