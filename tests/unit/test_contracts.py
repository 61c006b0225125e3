"""Each contract of the tree is held: a copy with a deliberate violation of it is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

TOP: Final = Path(__file__).parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS: Final[list[dict[str, Any]]] = PROJECT["tool"]["importlinter"]["contracts"]
BANNED: Final[dict[str, Any]] = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
TOOLS: Final = Path(sys.executable).parent

#: A room that may pass through no door at all, and one of the floor.
NOBODY: Final = "remembered"
FLOOR: Final = "errors"


def copied(top: Path) -> Path:
    """The tree, as far as the contracts see it."""
    shutil.copytree(TOP / "hsmtoll", top / "hsmtoll", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TOP / "pyproject.toml", top)
    return top


def add(top: Path, room: str, *lines: str) -> None:
    """Append *lines* to a room of the copy."""
    path = top / "hsmtoll" / f"{room}.py"
    path.write_text(path.read_text(encoding="utf-8") + "".join(f"{line}\n" for line in lines))


def linted(top: Path) -> dict[str, str]:
    """What the import contracts say about the copy: id → KEPT or the violations found."""
    run = subprocess.run(
        [TOOLS / "lint-imports", "--no-cache", "--config", "pyproject.toml"],
        cwd=top, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(top), "COLUMNS": "400", "NO_COLOR": "1"},
    )  # fmt: skip
    name_of = {contract["name"]: contract["id"] for contract in CONTRACTS}
    said = dict.fromkeys(
        (name_of[name] for name in re.findall(r"^(.*) KEPT$", run.stdout, re.MULTILINE)), "KEPT"
    )
    # A heading, underlined, then its findings up to the next heading.
    parts = re.split(r"^(\S.*)\n-+$", run.stdout, flags=re.MULTILINE)
    for heading, findings in zip(parts[1::2], parts[2::2], strict=True):
        if heading in name_of:
            said[name_of[heading]] = findings
    assert len(said) == len(CONTRACTS), run.stdout + run.stderr
    assert run.returncode == any(each != "KEPT" for each in said.values())
    return said


@pytest.fixture(scope="module")
def violated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One copy in which every contract is broken, and every module of it where it may not be."""
    top = copied(tmp_path_factory.mktemp("violated"))
    add(top, "grant", "import hsmtoll.client")
    add(top, "sandbox/rules", "import hsmtoll.chain")
    for contract in CONTRACTS:
        if contract["type"] == "forbidden":
            add(top, FLOOR, *(f"import {name}" for name in contract["forbidden_modules"]))
        elif contract["type"] == "protected":
            add(top, NOBODY, *(f"import {name}" for name in contract["protected_modules"]))
    return linted(top)


def violations() -> list[tuple[str, str]]:
    """Every contract with each import that it must find."""
    found = [
        ("layers", "hsmtoll.grant -> hsmtoll.client"),
        ("layers", "hsmtoll.sandbox.rules -> hsmtoll.chain"),
    ]
    for contract in CONTRACTS:
        if contract["type"] == "forbidden":
            names, room = contract["forbidden_modules"], FLOOR
        else:
            names, room = contract.get("protected_modules", ()), NOBODY
        found += [(contract["id"], f"hsmtoll.{room} -> {name}") for name in names]
    return found


def test_the_tree_keeps_its_contracts(tmp_path: Path) -> None:
    assert set(linted(copied(tmp_path)).values()) == {"KEPT"}


@pytest.mark.parametrize(("contract", "breach"), violations())
def test_a_violation_of_a_contract_is_found_and_named(
    violated: dict[str, str], contract: str, breach: str
) -> None:
    assert re.search(rf"- +{re.escape(breach)} \(", violated[contract]), violated[contract]


def test_every_contract_has_a_violation_here() -> None:
    assert {contract for contract, _ in violations()} == {each["id"] for each in CONTRACTS}


def test_a_new_room_has_to_say_where_it_stands(tmp_path: Path) -> None:
    top = copied(tmp_path)
    (top / "hsmtoll" / "annex.py").write_text('"""A room nobody placed."""\n', encoding="utf-8")
    assert "annex" in linted(top)["layers"]


def test_every_closed_door_is_seen_while_writing(tmp_path: Path) -> None:
    top = copied(tmp_path)
    room = top / "hsmtoll" / "grant.py"
    room.write_text(
        "".join(
            f"from {name.rpartition('.')[0]} import {name.rpartition('.')[2]}\n"
            if "." in name
            else f"import {name}\n"
            for name in BANNED
        ),
        encoding="utf-8",
    )
    run = subprocess.run(
        [TOOLS / "ruff", "check", "--no-cache", "--output-format=json", "hsmtoll"],
        cwd=top, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [each for each in json.loads(run.stdout) if each["code"] == "TID251"]
    assert {Path(each["filename"]).name for each in found} == {"grant.py"}
    assert len(found) == len(BANNED)
    assert run.returncode == 1


def test_the_check_runs_what_was_tried_here() -> None:
    check = (TOP / "scripts" / "check").read_text(encoding="utf-8")
    assert 'lint-imports"' in check
    assert '/ruff" check' in check


def test_the_source_distribution_has_this_package_and_no_other_of_its_name(tmp_path: Path) -> None:
    copied(tmp_path)
    shutil.copy(TOP / "README.md", tmp_path)
    for stray in ("venv/lib/hsmtoll/apis.py", "home/.config/hsmtoll/hsmtoll.toml",
                  "other/pyproject.toml", "other/README.md"):  # fmt: skip
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stray).write_text("# none of ours\n")

    dist = tmp_path / "dist"
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(dist)]
    subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
    (made,) = dist.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    package = [path for path in (tmp_path / "hsmtoll").rglob("*") if path.is_file()]
    ours = {path.relative_to(tmp_path).as_posix() for path in package}
    assert "hsmtoll/testing/shim.c" in ours
    assert names == ours | {"README.md", "pyproject.toml", "PKG-INFO"}
