"""Completion as shells ask for it, and as a person in bash sees it."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from hsmtoll.cli import main
from hsmtoll.customs.submissions import LEVELS
from hsmtoll.customs.uploads import DOCUMENT_TYPES
from tests.kit.commands import hsmtoll


def completed(line: str, shell: str = "bash", **variables: str) -> list[str]:
    """What hsmtoll answers to the script of a shell: the last word of *line* is completed."""
    words = line.split(" ")
    done = hsmtoll(
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("HSMTOLL_")},
            "_HSMTOLL_COMPLETE": f"{shell}_complete",
            # Fish and zsh hand over the words in the same two variables, fish the word itself.
            "COMP_WORDS": line,
            "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
            "HSMTOLL_CONFIG": os.devnull,
            **variables,
        },
    )
    assert (done.returncode, done.stderr) == (0, "")
    if shell == "zsh":
        return done.stdout.splitlines()[1::3]
    return [each.partition(",")[2] for each in done.stdout.splitlines() if each]


def test_completion_knows_commands_apis_levels_types_and_profiles(tmp_path: Path) -> None:
    assert set(completed("hsmtoll ")) == set(main.list_commands(click.Context(main)))
    assert completed("hsmtoll key im") == ["import"]
    assert completed("hsmtoll help key im") == ["import"]
    assert completed("hsmtoll help devi") == ["devices"]
    assert completed("hsmtoll help topi") == ["topics"]
    assert completed("hsmtoll help key devi") == []
    assert completed("hsmtoll token road") == ["road", "road-query"]
    assert completed("hsmtoll token --scope air-") == ["air-query"]
    assert completed("hsmtoll submit ") == list(LEVELS)
    assert completed("hsmtoll submit presentation POST ") == list(LEVELS["presentation"])
    assert completed("hsmtoll submit road POST re") == ["relation"]
    assert completed("hsmtoll upload 1 x.pdf --type inv") == ["invoice"]
    assert set(completed("hsmtoll upload 1 x.pdf --type ")) < set(DOCUMENT_TYPES)
    assert "--config" in completed("hsmtoll token --")
    assert completed("hsmtoll completion f") == ["fish"]
    assert completed("hsmtoll token rood") == []

    (tmp_path / "c.toml").write_text("[profile.acme]\n[profile.other]\n")
    config = str(tmp_path / "c.toml")
    for line in (
        f"hsmtoll --config {config} --profile ",
        f"hsmtoll --config {config} token --profile ",
        f"hsmtoll token road --config {config} --profile ",
        f"hsmtoll key generate --config {config} --profile ",
    ):
        assert completed(line) == ["acme", "other"]
    assert completed("hsmtoll --profile a", HSMTOLL_CONFIG=config) == ["acme"]
    # What cannot be read completes nothing and says nothing.
    assert completed("hsmtoll --profile ", HSMTOLL_CONFIG=str(tmp_path / "nowhere")) == []
    (tmp_path / "c.toml").write_text("[profile")
    assert completed("hsmtoll --profile ", HSMTOLL_CONFIG=config) == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_answers_the_other_shells_as_well(shell: str) -> None:
    script = subprocess.check_output(
        [sys.executable, "-m", "hsmtoll", "completion", shell], text=True
    )
    assert "_HSMTOLL_COMPLETE" in script
    found = completed("hsmtoll token road-", shell)
    assert [each.partition("\t")[0] for each in found] == ["road-query"]


def in_bash(typed: str, tmp_path: Path) -> str:
    """What an interactive bash makes of keys: the line that is typed is printed, not run."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.environ.update(TERM="dumb", PS1="> ", HSMTOLL_CONFIG=str(tmp_path / "c.toml"))
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])  # noqa: S606 - the child of a pty
    seen = b""
    try:
        for keys, until in (
            ('eval "$(hsmtoll completion bash)"; echo rea"dy"\r', b"\nready"),
            # TAB, then to the beginning of the line.
            (f"{typed}\t\x01echo 'typed:' \r", b"\ntyped: "),
            ("exit\r", b""),
        ):
            os.write(terminal, keys.encode())
            by = time.monotonic() + 60
            while until not in seen.replace(b"\r", b""):
                assert time.monotonic() < by, seen
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 4096)
        while select.select([terminal], [], [], 1)[0]:
            try:
                more = os.read(terminal, 4096)
            except OSError:
                break
            if not more:
                break
            seen += more
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    found = re.search(rb"\ntyped: ([^\n]*)", seen.replace(b"\r", b""))
    assert found, seen
    return found[1].decode().strip()


def test_a_person_in_bash_completes_with_tab(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[profile.acme-production]\n")
    assert in_bash("hsmtoll tok", tmp_path) == "hsmtoll token"
    assert in_bash("hsmtoll token road-", tmp_path) == "hsmtoll token road-query"
    assert in_bash("hsmtoll submit air POST mas", tmp_path).endswith("POST master-consignment")
    assert in_bash("hsmtoll token --profile ac", tmp_path).endswith("--profile acme-production")
    assert in_bash("hsmtoll token rood", tmp_path) == "hsmtoll token rood"
