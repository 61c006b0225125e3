"""Each contract of the tree is held: a copy with a deliberate violation of it is refused."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from scripts.contracts import images, lock, names, words

TOP: Final = Path(__file__).parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS: Final[list[dict[str, Any]]] = PROJECT["tool"]["importlinter"]["contracts"]
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
    verdicts = dict.fromkeys(
        (
            name_of[name]
            for name in re.findall(r"^(.*) KEPT(?: \(.*\))?$", run.stdout, re.MULTILINE)
        ),
        "KEPT",
    )
    # A heading, underlined, then its findings up to the next heading.
    parts = re.split(r"^(\S.*)\n-+$", run.stdout, flags=re.MULTILINE)
    for heading, findings in zip(parts[1::2], parts[2::2], strict=True):
        if heading in name_of:
            verdicts[name_of[heading]] = findings
    assert len(verdicts) == len(CONTRACTS), run.stdout + run.stderr
    assert run.returncode == any(each != "KEPT" for each in verdicts.values())
    return verdicts


@pytest.fixture(scope="module")
def violated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One copy in which every contract is broken, and every module of it where it may not be."""
    top = copied(tmp_path_factory.mktemp("violated"))
    add(top, "signing/grant", "import hsmtoll.client")
    add(top, "sandbox/rules", "import hsmtoll.x509.path_building")
    for contract in CONTRACTS:
        if contract["type"] == "forbidden":
            add(top, FLOOR, *(f"import {name}" for name in contract["forbidden_modules"]))
        elif contract["type"] == "protected":
            add(top, NOBODY, *(f"import {name}" for name in contract["protected_modules"]))
    return linted(top)


def violations() -> list[tuple[str, str]]:
    """Every contract with each import that it must find."""
    found = [
        ("layers", "hsmtoll.signing.grant -> hsmtoll.client"),
        ("layers", "hsmtoll.sandbox.rules -> hsmtoll.x509.path_building"),
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
    # Alone, or the last step of a way that leads there.
    found = re.search(rf"^[ -]*{re.escape(breach)} \(", violated[contract], re.MULTILINE)
    assert found, violated[contract]


def test_every_contract_has_a_violation_here() -> None:
    assert {contract for contract, _ in violations()} == {each["id"] for each in CONTRACTS}


def test_a_new_room_has_to_say_where_it_stands(tmp_path: Path) -> None:
    top = copied(tmp_path)
    (top / "hsmtoll" / "annex.py").write_text('"""A room nobody placed."""\n', encoding="utf-8")
    assert "annex" in linted(top)["layers"]


def test_the_check_runs_what_was_tried_here() -> None:
    check = (TOP / "scripts" / "check").read_text(encoding="utf-8")
    assert 'lint-imports"' in check
    assert '/ruff" check' in check
    assert '/twine" --no-color check --strict' in check
    assert '/check-wheel-contents"' in check


def test_the_source_distribution_has_this_package_and_no_other_of_its_name(tmp_path: Path) -> None:
    shutil.copy(TOP / "README.md", copied(tmp_path))
    for stray in ("venv/lib/hsmtoll/apis.py", "home/.config/hsmtoll/hsmtoll.toml",
                  "other/pyproject.toml", "other/README.md"):  # fmt: skip
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stray).write_text("# none of ours\n")

    with tarfile.open(built(tmp_path, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert "hsmtoll/testing/shim.c" in packaged(tmp_path)
    assert names == packaged(tmp_path) | {"README.md", "pyproject.toml", "PKG-INFO"}


def built(top: Path, kind: str) -> Path:
    """The distribution (sdist or wheel) that the locked build backend makes of a tree."""
    dist = top / f"dist-{kind}"
    argv = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(dist)]
    subprocess.run(argv, cwd=top, check=True, capture_output=True)
    (made,) = dist.iterdir()
    return made


def packaged(top: Path) -> set[str]:
    """The files of the package, as paths from the top of the tree."""
    package = [path for path in (top / "hsmtoll").rglob("*") if path.is_file()]
    return {path.relative_to(top).as_posix() for path in package}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from the unpacked source distribution alone."""
    top = copied(tmp_path_factory.mktemp("tree"))
    shutil.copy(TOP / "README.md", top)
    unpacked = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["tar", "-xf", built(top, "sdist"), "-C", unpacked], check=True)
    (source,) = unpacked.iterdir()
    return built(source, "wheel")


def test_a_wheel_has_the_whole_package_and_the_licence_beside_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        licence = archive.read(f"{info}/licenses/hsmtoll/LICENSE")
    tree = {name for name in packaged(TOP) if "/__pycache__/" not in name}
    assert {name for name in names if not name.startswith(info)} == tree - {"hsmtoll/LICENSE"}
    assert {
        "hsmtoll/docs/changelog.md",
        "hsmtoll/host/systemd/hsmtoll-host.service",
        "hsmtoll/host/systemd/hsmtoll-host.socket",
    } <= names
    assert metadata.get_all("License-File") == ["hsmtoll/LICENSE"]
    assert licence == (TOP / "hsmtoll" / "LICENSE").read_bytes()
    assert b"WITHOUT WARRANTY OF ANY KIND" in licence


def test_an_extra_brings_what_a_user_runs_and_no_tool_of_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    extras = {"host", "httpx2", "metrics", "redis", "sandbox"}
    assert set(metadata.get_all("Provides-Extra") or ()) == extras
    assert "pytest" not in str(metadata.get_all("Requires-Dist"))


def test_two_builds_of_one_tree_are_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    shutil.copy(TOP / "README.md", copied(tmp_path))
    again = built(tmp_path, "wheel")
    assert again.read_bytes() == wheel.read_bytes()
    # The control: one more byte in the tree is seen.
    add(tmp_path, NOBODY, "# one more line")
    shutil.rmtree(again.parent)
    assert built(tmp_path, "wheel").read_bytes() != wheel.read_bytes()


@pytest.fixture
def locked_tree(tmp_path: Path) -> Path:
    """What the lock is judged by: pyproject.toml and the locks, to be spoilt."""
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    for path in (
        *(TOP / "scripts").glob("requirements*.txt"),
        TOP / "docker/tools/requirements.txt",
    ):
        target = tmp_path / path.relative_to(TOP)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def test_the_lock_is_whole_and_the_build_backend_is_in_it(locked_tree: Path) -> None:
    assert list(lock(locked_tree)) == []


@pytest.mark.parametrize(
    ("file", "pattern", "instead", "message"),
    [
        ("scripts/requirements-build.txt", r"(hatchling==\S+ )(.|\n)*?(?=\npackaging)", r"\1",
         "hatchling has no hash"),
        ("scripts/requirements-build.txt", r"hatchling==", "other==",
         "lacks hatchling of pyproject.toml"),
        ("scripts/requirements-build.txt", r"packaging==\S+", "packaging==1.0",
         "packaging 1.0 is "),
        ("scripts/requirements-run.txt", r"asn1crypto==\S+", "asn1crypto==1.5.0",
         "asn1crypto 1.5.0 is not"),
        ("scripts/requirements.txt", r"twine==", "other==", "lacks twine of pyproject.toml"),
        ("pyproject.toml", r"hatchling>=[\d.]+", "hatchling>=999", "is not >=999"),
    ],
)  # fmt: skip
def test_a_lock_that_lacks_something_is_refused(
    locked_tree: Path, file: str, pattern: str, instead: str, message: str
) -> None:
    path = locked_tree / file
    spoilt, count = re.subn(pattern, instead, path.read_text("utf-8"), count=1)
    assert count == 1
    path.write_text(spoilt, "utf-8")
    assert message in "\n".join(lock(locked_tree))


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("pip install {}", True),
        ("pip install '{}[host]'", True),
        ("- run: python3 -m pip install -U {}==0.1.0 pytest", True),
        ("pip download -d wheels '{}[host]>=0.1'", True),
        ("pipx install {}", True),
        ("uv tool install {}", True),
        ("uv add {}", True),
        ("pip install '.[sandbox]'", False),
        ("pip install './{}[sandbox]' pytest", False),
        ("pip install 'vendor/{}-0.1.0-py3-none-any.whl[sandbox]'", False),
        ("pip install --no-index --find-links wheels --no-deps {}", False),
        ("install the extra `host` the way {} was installed", False),
    ],
)
def test_no_text_installs_hsmtoll_by_a_name_that_anybody_may_register(
    tmp_path: Path, line: str, refused: bool
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "some.md").write_text(line.format("hsm" + "toll") + "\n", "utf-8")
    expected = ["some.md:1: an installation of hsmtoll by its name"] if refused else []
    assert list(words(tmp_path)) == expected


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("# Seconds ({} 4.9).".format("DESIG" + "N"), True),
        ('"""Leg one ({} A.7)."""'.format("PROTOCO" + "L"), True),
        ("# see {}".format("HS" + "M.md"), True),
        ("context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)", False),
        ("# Seconds (C11, RFC 6749 section 5.1).", False),
    ],
)
def test_no_text_cites_a_document_outside_the_repository(
    tmp_path: Path, line: str, refused: bool
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "some.py").write_text(line + "\n", "utf-8")
    expected = ["some.py:1: a citation of a document outside the repository"] if refused else []
    assert list(words(tmp_path)) == expected


def test_the_units_are_where_an_installed_package_has_them() -> None:
    units = resources.files("hsmtoll") / "host" / "systemd"
    assert {each.name for each in units.iterdir()} == {
        "hsmtoll-doctor.service",
        "hsmtoll-doctor.timer",
        "hsmtoll-host.service",
        "hsmtoll-host.socket",
    }


@pytest.mark.parametrize(
    ("pattern", "instead", "message"),
    [
        (r"(ARG TOLL_BASE=\S+)@\S+", r"\1", "has no digest"),
        (r"(ARG TOLL_BASE=.*)[0-9a-f]{64}", r"\g<1>" + "0" * 64, "two bases"),
        (r"FROM os AS builder", "FROM debian:sid AS builder", "debian:sid is neither"),
    ],
)
def test_an_image_that_is_not_built_on_the_one_fixed_base_is_refused(
    tmp_path: Path, pattern: str, instead: str, message: str
) -> None:
    for name in ("docker/Dockerfile", "hsmtoll/testing/softhsm_image/Dockerfile"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(TOP / name, tmp_path / name)
    assert list(images(tmp_path)) == []
    path = tmp_path / "docker" / "Dockerfile"
    spoilt, count = re.subn(pattern, instead, path.read_text("utf-8"), count=1)
    assert count == 1
    path.write_text(spoilt, "utf-8")
    assert message in "\n".join(images(tmp_path))


def test_two_stacks_of_containers_share_no_project() -> None:
    files = [TOP / "docker" / name for name in ("compose.yml", "compose.host.yml")]
    names = {yaml.safe_load(path.read_text("utf-8"))["name"] for path in files}
    assert names == {"hsmtoll", "hsmtoll-host"}


@pytest.mark.parametrize(
    ("line", "breaches"),
    [
        ("class Desk: ...", 1),
        ("def take(hands, brake): ...", 2),
        ("page = engine.look()", 1),
        ("desk = 'Desk'  # a Door of the Engine", 0),
    ],
)
def test_a_private_name_is_refused_in_code_and_left_alone_in_prose(
    tmp_path: Path, line: str, breaches: int
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text(f"{line}\n", "utf-8")
    assert len(list(names(tmp_path))) == breaches
