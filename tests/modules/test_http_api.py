"""The examples of docs/http-api.md are run as they stand there, by a shell, Node and Java."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

TEXT: Final = (Path(__file__).parents[2] / "hsmtoll/docs/http-api.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def sh(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-ec", script], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_the_examples_of_node_and_java_at_the_sandbox_print_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text(blocks("toml")[0])
    for program in [*blocks("js"), *blocks("java")]:
        name = re.match(r"// (\w+\.(?:js|java))", program)
        assert name is not None
        (tmp_path / name[1]).write_text(program)
    shown = 0
    for script in blocks("sh"):
        done = sh(script, tmp_path)
        expected = script.rstrip().rpartition("# ")[2]
        assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
        shown += 1
    assert shown == 3


def test_a_key_that_was_not_registered_gets_no_token(tmp_path: Path) -> None:
    """The control of the first two examples."""
    (tmp_path / "clients.toml").write_text(blocks("toml")[0].replace("my-key.pub", "other.pub"))
    (tmp_path / "grant.js").write_text(blocks("js")[0])
    (tmp_path / "Grant.java").write_text(blocks("java")[0])
    other = "openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out other.pem\n"
    other += "openssl pkey -in other.pem -pubout -out other.pub.pem\n"
    done = sh(other + blocks("sh")[0], tmp_path)
    assert done.stdout.strip() == "401"
    done = sh(other + blocks("sh")[1], tmp_path)
    assert done.returncode != 0
    assert "IllegalStateException" in done.stderr
    assert "invalid_grant" in done.stderr


def test_the_admin_secret_is_told_where_it_is_asked_for_and_nowhere_else(tmp_path: Path) -> None:
    script = "hsmtoll sandbox {} -- sh -c 'echo ${{SANDBOX_ADMIN_SECRET:-none}}'"
    assert sh(script.format(""), tmp_path).stdout == "none\n"
    output = sh(script.format("--admin --env-file all.env"), tmp_path).stdout.strip()
    assert len(output) > 20
    assert f"SANDBOX_ADMIN_SECRET={output}\n" in (tmp_path / "all.env").read_text()
