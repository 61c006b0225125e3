"""The commands of `operations.md` do what it says, on a log of several segments."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.errors import AuditBroken
from hsmtoll.host.audit import Audit
from tests.kit.accounts import importable
from tests.kit.readers import Terminal
from tests.kit.signing_host import PATIENCE, Authority, RunningHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXT = resources.files("hsmtoll").joinpath("docs/operations.md").read_text(encoding="utf-8")

GRANT = {
    "caller": "uid:1001",
    "profile": "acme",
    "scope": "toll:eu/movement/road/v2",
    "policy_sha256": "0" * 64,
    "jti": "0f8fad5b-d9cb-469f-a165-70867728950e",
}


def commands(heading: str, number: int = 0) -> str:
    """The commands below *heading*, of its block *number*."""
    section = TEXT[TEXT.index(f"## {heading}\n") :].partition("\n## ")[0]
    return str(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[number])


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
    found = re.search(r"about (\d+) bytes a grant", TEXT)
    assert found is not None
    audit = machine.open()
    written(audit, 100)
    audit.close()
    size = sum(each.stat().st_size for each in machine.log.iterdir())
    assert 0.5 < size / 100 / int(found[1]) < 1.5


# ------------------------------------------------------------------ with a host that runs


class Site:
    """A signing host with the places of the text, below its home; a custodian's terminal on it."""

    def __init__(self, host: RunningHost, terminal: Terminal) -> None:
        self.host, self.terminal = host, terminal
        self.etc, self.lib, self.backup = host.home / "etc", host.home / "lib", host.home / "backup"
        for folder, mode in ((self.etc / "secret", 0o750), (self.lib, 0o700), (self.backup, 0o700)):
            folder.mkdir(mode=mode)
        for old, new in (
            (host.home / "audit.key", self.etc / "secret/audit.key"),
            (host.home / "audit.pub", self.etc / "audit.pub"),
            (Path(host.environ["HSMTOLL_HOST__KEY"]), self.etc / "secret/signer.key"),
            (Path(host.environ["HSMTOLL_HOST__CERT"]), self.etc / "signer.pem"),
        ):
            old.rename(new)
        (self.etc / "hsmtoll.toml").write_text("")
        host.environ |= {
            "HSMTOLL_STATE": str(self.lib),
            "HSMTOLL_HOST__AUDIT_DIR": str(self.lib / "audit"),
            "HSMTOLL_HOST__AUDIT_KEY": str(self.etc / "secret/audit.key"),
            "HSMTOLL_HOST__CERT": str(self.etc / "signer.pem"),
            "HSMTOLL_HOST__KEY": str(self.etc / "secret/signer.key"),
        }
        host.start()

    def follow(self, text: str) -> None:
        """Type *text*; what it asks of systemd is done with the host."""
        for written, place in (
            ("/etc/hsmtoll", self.etc), ("/var/lib/hsmtoll", self.lib), ("/backup", self.backup),
        ):  # fmt: skip
            text = text.replace(written, str(place))
        if os.geteuid():
            # A file of our own is for nobody's group.
            text = text.replace("0440", "0400")
        for line in text.splitlines():
            match line.split()[:2]:
                case ["systemctl", "stop"]:
                    assert self.host.process is None or self.host.process.poll() or (
                        self.host.end() == 0
                    )  # fmt: skip
                case ["systemctl", "start"]:
                    self.host.start()
                case ["systemctl", "reload"]:
                    self.host.reload()
                case _:
                    code, output = self.terminal.run(line)
                    assert code == 0, f"{line}\n{output}"


@pytest.fixture
def site(make_host: Callable[..., RunningHost], tmp_path: Path) -> Iterator[Site]:
    with Terminal(tmp_path) as terminal:
        yield Site(make_host(), terminal)


def test_a_new_audit_key_begins_a_new_log_and_both_logs_verify(site: Site) -> None:
    assert site.host.ask().status == 200
    old = (site.etc / "audit.pub").read_bytes()
    site.follow(commands("Rotation"))
    assert site.host.ask().status == 200
    assert (site.etc / "audit-1.pub").read_bytes() == old != (site.etc / "audit.pub").read_bytes()
    # The control: neither log verifies with the other's key.
    for key, log in (("audit.pub", "audit-1"), ("audit-1.pub", "audit")):
        code, output = site.terminal.run(
            f"hsmtoll audit verify --public-key {site.etc}/{key} {site.lib}/{log}"
        )
        assert code == AuditBroken.exit_code, output


def test_a_new_certificate_of_the_host_is_shown_after_a_reload(site: Site, tmp_path: Path) -> None:
    def shown() -> str:
        asked = ssl.get_server_certificate(("localhost", site.host.tls_port))
        return x509.load_pem_x509_certificate(asked.encode()).fingerprint(hashes.SHA256()).hex()

    made = Authority(tmp_path / "ca").issue("localhost", server=True)
    shutil.copy(made.cert, tmp_path / "signer.pem")
    shutil.copy(made.key, tmp_path / "signer.key")
    before = shown()
    site.follow(commands("Rotation", 1))
    assert shown() == made.sha256 != before
    # The control: a key of another certificate changes nothing, and the log says so.
    shutil.copy(Authority(tmp_path / "other").issue("localhost").key, tmp_path / "signer.key")
    site.follow(commands("Rotation", 1))
    assert shown() == made.sha256
    assert "HSMTOLL_HOST__CERT and HSMTOLL_HOST__KEY: cannot be used" in site.host.log()


def test_a_copy_of_the_log_verifies_and_a_damaged_log_is_put_away_for_a_new_one(
    site: Site,
) -> None:
    for _ in range(3):
        assert site.host.ask().status == 200
    site.follow(commands("Backup"))
    for _ in range(60):
        site.host.ask()
    assert site.host.end() == 0
    # What is left is older than the host's note.
    for each in (site.lib / "audit").glob("*.jsonl"):
        shutil.copy(site.backup / "audit" / each.name, each)
    site.host.start(ready=False)
    assert site.host.process is not None
    assert site.host.process.wait(PATIENCE) != 0
    assert "cut off" in site.host.log()
    site.follow(commands("Backup", 1))
    assert site.host.ask().status == 200
    assert [each.name for each in (site.lib / "damaged").glob("audit-*.json")] != []


def test_every_block_of_commands_is_run_by_a_test() -> None:
    run = [commands("Retention"), *(commands("Rotation", n) for n in (0, 1))]
    run += [commands("Backup", n) for n in (0, 1)]
    assert re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) == run
    # One line of the log is no command.
    assert TEXT.count("```") == 2 * len(run) + 2


def test_the_line_of_the_log_has_the_members_that_are_explained() -> None:
    (line,) = re.findall(r"```json\n(.*?)\n```", TEXT, re.DOTALL)
    table = TEXT.partition("| member |")[2].partition("\n\n")[0]
    explained = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)))
    )
    assert json.loads(line).keys() <= explained
    assert {"time", "level", "event", "message", "hint", "jti", "trace"} <= explained
