# ruff: noqa: INP001 -- a program of an image, not part of the package
"""
The sandbox in a container, and the issuer of its test certificates, until SIGTERM.

    /run/sandbox/ca.pem        what a client sets as HSMTOLL_CA_FILE
    /run/sandbox/request.pem   a certificate signing request, written by the client …
    /run/sandbox/chain.pem     … and the reply: leaf, intermediate, root
    /run/sandbox/roots.pem     all trusted roots, kept across restarts
    $SANDBOX_ADMIN_FILE        if set: address and secret of the admin endpoint (faults)

A real issuer checks the identity of the applicant. This one issues to everybody, always for the
same fictitious business.
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

SHARED = Path("/run/sandbox")
NAMES = ("sandbox", "localhost", "127.0.0.1")
PORTS = (8443, 8444, 8445)


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    # Not an Event: this thread may hold its lock when the signal handler runs.
    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.put(number))
    authority = eseal_authority()
    roots = SHARED / "roots.pem"
    known = x509.load_pem_x509_certificates(roots.read_bytes()) if roots.exists() else []
    write(roots, pem(*known, authority.root))
    # A container is reachable only from outside itself, and publishes no port by default.
    all_addresses = "0.0.0.0"  # noqa: S104 -- a container's own network
    with Sandbox(
        trust=[authority, *known], host=all_addresses, names=NAMES, ports=PORTS
    ) as sandbox:
        write(SHARED / "ca.pem", sandbox.ca_file.read_bytes())
        if asked := os.environ.get("SANDBOX_ADMIN_FILE"):
            write_env(Path(asked), sandbox.admin_environ())
        say(f"Maskinporten at {sandbox.issuer}, Customs at {sandbox.customs}")
        logged = 0
        while signals.empty():
            time.sleep(0.1)
            issue(authority)
            logged = log_requests(sandbox, logged)
    # Since the last round: the client may stop this container right after its last request.
    log_requests(sandbox, logged)
    return 0


def log_requests(sandbox: Sandbox, logged: int) -> int:
    """Log the requests after the first *logged*; returns the new number."""
    received = sandbox.received
    for one in received[logged:]:
        say(f"{one.method} {one.path} -> {one.status}")
    return len(received)


def issue(authority: Authority) -> None:
    """Issue a certificate for the signing request, if there is one."""
    request = SHARED / "request.pem"
    if not request.exists():
        return
    try:
        leaf = issued(authority, request.read_bytes())
    except ValueError as exc:
        say(f"a signing request was refused: {exc}")
    else:
        write(SHARED / "chain.pem", pem(leaf, *authority.chain))
        say(f"issued {leaf.subject.rfc4514_string()}")
    request.unlink()


def issued(authority: Authority, request: bytes) -> x509.Certificate:
    """A leaf for the key of *request* (PEM). ValueError if no issuer would accept it."""
    asked = x509.load_pem_x509_csr(request)
    key = asked.public_key()
    if not asked.is_signature_valid or not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("not signed by the RSA key it names")
    return authority.issue(key)


def write(path: Path, content: bytes) -> None:
    """Write atomically: a client that polls for the file never reads a part of it."""
    beside = path.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(path)


def say(line: str) -> None:
    """One line of log."""
    sys.stdout.write(f"sandbox: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
