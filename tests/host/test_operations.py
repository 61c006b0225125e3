"""The commands of `operations.md` do what it says, on a log of several segments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.errors import AuditBroken
from hsmtoll.host.audit import Audit
from hsmtoll.host.health import exposed
from tests.accounts import importable

if TYPE_CHECKING:
    from pathlib import Path

TEXT = resources.files("hsmtoll").joinpath("docs/operations.md").read_text(encoding="utf-8")

GRANT = {
    "caller": "uid:1001",
    "profile": "acme",
    "scope": "toll:eu/movement/road/v2",
    "policy_sha256": "0" * 64,
    "jti": "0f8fad5b-d9cb-469f-a165-70867728950e",
}


def commands(heading: str) -> str:
    """The commands below *heading*."""
    section = TEXT[TEXT.index(f"## {heading}\n") :]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


class Machine:
    """The places of the text, below a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("var/lib/hsmtoll", "etc/hsmtoll/secret", "archive"):
            (folder / name).mkdir(parents=True)
        self.key = folder / "etc/hsmtoll/secret/audit.key"
        key = Ed25519PrivateKey.generate()
        self.key.write_bytes(
            key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        )
        self.key.chmod(0o400)
        (folder / "etc/hsmtoll/audit.pub").write_bytes(
            key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        )
        self.log = folder / "var/lib/hsmtoll/audit"

    def open(self) -> Audit:
        noted = self.folder / "state" / "noted"
        return Audit(self.log, self.key, now=lambda: 1_800_000_000.0, noted=noted)

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        for place in ("/var/lib", "/etc/hsmtoll", "/archive"):
            text = text.replace(place, f"{self.folder}{place}")
        text = text.replace("hsmtoll audit", f"{sys.executable} -m hsmtoll audit")
        return subprocess.run(
            ["sh", "-euc", text],
            env=os.environ | importable(), capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def written(audit: Audit, grants: int) -> None:
    for _ in range(grants):
        audit.append("intent", **GRANT)
        seq, _ = audit.append("result", **GRANT, outcome="signed")
        audit.sync(seq)
    audit.seal()


def test_old_segments_are_moved_away_and_both_parts_verify(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsmtoll.host.audit._SEGMENT", 20_000)
    audit = machine.open()
    written(audit, 300)
    audit.close()
    before = sorted(each.name for each in machine.log.glob("audit-*.jsonl"))
    assert len(before) > 3
    done = machine.run(commands("Retention"))
    assert done.returncode == 0, done.stderr
    kept = sorted(each.name for each in machine.log.glob("audit-*.jsonl"))
    moved = sorted(each.name for each in (machine.folder / "archive").glob("audit-*.jsonl"))
    assert (moved, kept) == (before[:-2], before[-2:])
    # The host goes on with what is left, and the control: what lies there is still judged.
    audit = machine.open()
    written(audit, 1)
    audit.close()
    last = machine.log / kept[-1]
    last.write_bytes(last.read_bytes().replace(b"uid:1001", b"uid:1002", 1))
    assert machine.run(commands("Retention")).returncode != 0


def test_a_log_that_was_restored_from_a_backup_is_refused(machine: Machine) -> None:
    audit = machine.open()
    written(audit, 60)
    old = {each.name: each.read_bytes() for each in machine.log.iterdir()}
    written(audit, 60)
    audit.close()
    machine.open().close()
    for name, content in old.items():
        (machine.log / name).write_bytes(content)
    with pytest.raises(AuditBroken, match="record 121: cut off"):
        machine.open()


def test_a_grant_takes_as_many_bytes_as_the_text_says(machine: Machine) -> None:
    said = re.search(r"about (\d+) bytes a grant", TEXT)
    assert said is not None
    audit = machine.open()
    written(audit, 100)
    audit.close()
    size = sum(each.stat().st_size for each in machine.log.iterdir())
    assert 0.5 < size / 100 / int(said[1]) < 1.5


def test_what_is_to_be_watched_is_there() -> None:
    named = set(re.findall(r"`hsmtoll_host_(\w+)`", TEXT))
    assert len(named) > 4
    shown = exposed(dict.fromkeys(named, 1.0))
    assert all(f"hsmtoll_host_{name} " in shown for name in named)
    source = resources.files("hsmtoll.host")
    code = "".join(source.joinpath(f).read_text() for f in ("health.py", "server.py"))
    assert [name for name in named if f'"{name}"' not in code] == []
