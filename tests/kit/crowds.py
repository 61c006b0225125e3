"""Crowds of processes that share a store: started together, and what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.kit import soft_client

if TYPE_CHECKING:
    from hsmtoll.sandbox.server import Sandbox

PROGRAM = Path(__file__).parents[1] / "protocol" / "crowd.py"


@dataclass
class Member:
    """One process; its lines are read one after another."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self) -> str:
        """Its next line; empty at the end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        self.lines.append(line)
        return line

    def until(self, start: str) -> str:
        """The next line that starts so."""
        while line := self.read():
            if line.startswith(start):
                return line
        raise AssertionError(f"it ended without {start!r}: {self.lines}")

    def go(self) -> None:
        """From the starting line."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> list[str]:
        """What it said, when it is done."""
        while self.read():
            pass
        self.process.wait(60)
        return self.lines


@dataclass
class Crowd:
    """Members with one identity and one store, on one machine, ended with the ``with``."""

    sandbox: Sandbox
    cache: str
    cache_key_file: Path | None = None
    key: rsa.RSAPrivateKey | None = None
    #: What the machine that they run on remembers.
    _state: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))
    _members: list[Member] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:
            member.process.kill()
            member.process.wait(10)
            for pipe in (member.process.stdin, member.process.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self._state)

    def member(self, **order: Any) -> Member:
        """A process that has started; with ``wait=True`` it stands at the starting line."""
        self.sandbox.trust(soft_client.authority())
        key, x5c, identity = soft_client.identity(self.key)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        full = {
            "cache": self.cache,
            "cache_key_file": str(self.cache_key_file),
            "issuer": self.sandbox.issuer,
            "token": self.sandbox.token_endpoint,
            "customs": self.sandbox.customs,
            "ca_file": str(self.sandbox.ca_file),
            "key": pem,
            "x5c": x5c,
            "identity": identity,
            "state": str(self._state / "identity"),
            **order,
        }
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(full)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        member = Member(process)
        self._members.append(member)
        return member

    def run(self, count: int, **order: Any) -> tuple[int, set[str]]:
        """So many at once: signatures spent, and the different things they ended with."""
        members = [self.member(wait=True, **order) for _ in range(count)]
        for member in members:
            member.until("ready")
        for member in members:
            member.go()
        outputs = [member.end() for member in members]
        signed = sum(lines.count("signed") for lines in outputs)
        return signed, {next(line for line in reversed(lines) if line) for lines in outputs}


def fresh_key() -> rsa.RSAPrivateKey:
    """For a second identity."""
    return rsa.generate_private_key(65537, 2048)


def fingerprint(text: str) -> str:
    """SHA-256 as the members tell it."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(text.encode())
    return digest.finalize().hex()
