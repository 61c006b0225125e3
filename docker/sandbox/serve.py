# ruff: noqa: INP001 -- a program of an image, not part of the package
"""
The sandbox in a container, and the issuer of its test certificates, until SIGTERM.

    /run/sandbox/ca.pem        what a client sets as HSMTOLL_CA_FILE
    /run/sandbox/request.pem   a signing request that somebody puts there …
    /run/sandbox/chain.pem     … and the answer: leaf, intermediate, root
    /run/sandbox/roots.pem     every root that is trusted, kept over restarts
    $SANDBOX_ADMIN_FILE        if it is set: address and secret of the admin endpoint (faults)

Real issuers look at who asks. This one takes everybody for the same invented business.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from queue import SimpleQueue

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from hsmtoll.sandbox import Authority, Sandbox, eseal_authority
from hsmtoll.sandbox.pki import pem
from hsmtoll.sandbox.serve import write_env

DESK = Path("/run/sandbox")
NAMES = ("sandbox", "localhost", "127.0.0.1")
PORTS = (8443, 8444, 8445)


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    # Not an Event: its lock may be held by this very thread when the signal comes.
    over: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda ended, _: over.put(ended))
    authority = eseal_authority()
    kept = DESK / "roots.pem"
    known = x509.load_pem_x509_certificates(kept.read_bytes()) if kept.exists() else []
    write(kept, pem(*known, authority.root))
    # All addresses: a container's only way to be reached, and nothing is published by itself.
    everywhere = "0.0.0.0"  # noqa: S104 -- a container's own network
    with Sandbox(trust=[authority, *known], host=everywhere, names=NAMES, ports=PORTS) as sandbox:
        write(DESK / "ca.pem", sandbox.ca_file.read_bytes())
        if asked := os.environ.get("SANDBOX_ADMIN_FILE"):
            write_env(Path(asked), sandbox.admin_environ())
        say(f"Maskinporten at {sandbox.issuer}, Customs at {sandbox.customs}")
        logged = 0
        while over.empty():
            time.sleep(0.1)
            issue(authority)
            logged = tell(sandbox, logged)
    # What was answered since the last look: whoever asked may be why this one was stopped.
    tell(sandbox, logged)
    return 0


def tell(sandbox: Sandbox, logged: int) -> int:
    """Log the requests after the first *logged*; returns how many are logged now."""
    received = sandbox.received
    for one in received[logged:]:
        say(f"{one.method} {one.path} -> {one.status}")
    return len(received)


def issue(authority: Authority) -> None:
    """Answer the request that lies on the desk, if one does."""
    request = DESK / "request.pem"
    if not request.exists():
        return
    try:
        leaf = issued(authority, request.read_bytes())
    except ValueError as exc:
        say(f"a signing request was refused: {exc}")
    else:
        write(DESK / "chain.pem", pem(leaf, *authority.chain))
        say(f"issued {leaf.subject.rfc4514_string()}")
    request.unlink()


def issued(authority: Authority, request: bytes) -> x509.Certificate:
    """A leaf for the key of *request* (PEM). ValueError for what no issuer would take."""
    asked = x509.load_pem_x509_csr(request)
    key = asked.public_key()
    if not asked.is_signature_valid or not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("not signed by the RSA key it names")
    return authority.issue(key)


def write(path: Path, content: bytes) -> None:
    """Put *content* there at once: whoever waits for the file never reads half of it."""
    beside = path.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(path)


def say(line: str) -> None:
    """One line of log."""
    sys.stdout.write(f"sandbox: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
