"""
The commands for an installation, run as they stand on the pages: in new environments, from a copy
of the tree or from a wheel. pip takes dependencies from the index that this machine is set up for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.kit.readers import TOP, blocks, section

PACKAGES: Final = re.compile(r"(?:sudo )?apt-get update && (?:sudo )?apt-get install -y (.+)")

#: The first call of somebody who has installed the extra `sandbox`.
CALL: Final = "hsmtoll sandbox -- hsmtoll test-auth road"

# Whole installations, some of them for the first time on this machine.
pytestmark = pytest.mark.timeout(900)


def given(title: str, kind: str) -> list[str]:
    """The text of each block of one kind in a section."""
    return [each.text for each in blocks(section(title), kind)]


def jobs() -> dict[str, list[str]]:
    """The commands of each example for CI, in order."""
    github, gitlab = (yaml.safe_load(each) for each in given("In CI", "yaml"))
    (clone,) = (each.strip() for each in given("In CI", "sh"))
    steps: list[dict[str, Any]] = github["jobs"]["customs"]["steps"]
    of_github = [step["run"] for step in steps if "run" in step]
    of_gitlab = [*gitlab["customs"]["before_script"], *gitlab["customs"]["script"]]
    replaced = [clone if each.startswith("pip install") else each for each in of_github]
    return {"GitHub Actions": of_github, "GitLab CI": of_gitlab, "a clone": replaced}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked and the new files of the tree, and nothing that git ignores."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=TOP, check=True, capture_output=True, text=True).stdout
    target = tmp_path_factory.mktemp("clone") / "hsmtoll"
    for name in filter(None, listed.split("\0")):
        if (TOP / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, target / name)
    return target


@pytest.fixture
def environment(package_index: dict[str, str]) -> dict[str, str]:
    """A shell whose `python3` is this Python, and which knows this machine's index."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **package_index, "PATH": path, "PYTHONPATH": ""}


def run(script: str, folder: Path, env: dict[str, str], code: int | None = 0) -> str:
    """What a script prints, of which each line must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert code is None or done.returncode == code, f"{script}\n{done.stdout}"
    assert code is not None or done.returncode != 0, f"succeeded:\n{script}\n{done.stdout}"
    return done.stdout


def test_a_clone_is_installed_and_a_wheel_of_it_too(
    clone: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (first,) = given("Install", "sh")
    again, _, wheel, locked, *_ = given("Ways to install", "sh")
    assert again == first
    here = tmp_path / "hsmtoll"
    shutil.copytree(clone, here)
    output = run(
        f"{first}pip uninstall -qy hsmtoll\n{wheel}{CALL}\npip freeze\n", here, environment
    )
    assert output.count("200 OK\n") == 2
    # It runs from the installation, not from the folder that it was called in.
    assert re.search(r"^hsmtoll @ file://.*/dist/hsmtoll-.*\.whl", output, re.MULTILINE)

    shutil.rmtree(here / "venv")
    output = run(f"{locked}{CALL}\npip freeze --exclude hsmtoll\n", here, environment)
    assert "200 OK\n" in output
    pinned = set(re.findall(r"^[\w.-]+==[\w.]+$", output, re.MULTILINE))
    assert len(pinned) > 30
    lock = "".join(
        (TOP / f"scripts/requirements-{kind}.txt").read_text() for kind in ("build", "run")
    )
    assert {each.lower().replace("_", "-") for each in pinned} <= set(
        re.findall(r"^\S+==\S+", lock, re.MULTILINE)
    )


@pytest.mark.parametrize("job", ["GitHub Actions", "a clone"])
def test_an_example_for_ci_runs_as_it_stands_in_the_readme(
    clone: Path, tmp_path: Path, environment: dict[str, str], job: str
) -> None:
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    (example,) = (each for each in given("In CI", "python") if "def test_" in each)
    (project / "tests" / "test_customs.py").write_text(example, "utf-8")
    if job == "a clone":
        (project / "hsmtoll").symlink_to(clone)
        (project / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    else:
        build = "pip wheel -q --no-build-isolation --no-deps -w vendor"
        run(f"{sys.executable} -m {build} '{clone}'", project, environment)
    venv.create(tmp_path / "python", with_pip=True)
    environment["PATH"] = f"{tmp_path}/python/bin:{environment['PATH']}"
    environment["VIRTUAL_ENV"] = str(tmp_path / "python")

    apt, *commands = jobs()[job]
    asked = PACKAGES.fullmatch(apt)
    assert asked
    # To install them takes root. This machine has them, and the test needs no others.
    run(f"dpkg-query -W {asked[1]}", project, environment)
    output = run("\n".join(commands), project, environment)
    assert re.search(r"\b2 passed\b", output), output


def test_the_examples_for_ci_run_the_same_commands() -> None:
    without_sudo = [each.replace("sudo ", "") for each in jobs()["GitHub Actions"]]
    assert without_sudo == jobs()["GitLab CI"]
    assert without_sudo[1:] != jobs()["a clone"][1:]


def test_an_installation_without_a_network_has_what_the_lock_says_and_nothing_else(
    clone: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    online, offline = given("Offline", "sh")
    here, there = tmp_path / "hsmtoll", tmp_path / "there"
    shutil.copytree(clone, here)
    output = run(online, here, environment)
    (wheel,) = (here / "wheels").glob("hsmtoll-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/WHEEL"))
        generator = archive.read(name).decode()
    build = (TOP / "scripts" / "requirements-build.txt").read_text("utf-8")
    backend = re.search(r"^hatchling==(\S+)", build, re.MULTILINE)
    assert backend
    assert f"Generator: hatchling {backend[1]}\n" in generator

    for index in [each for each in environment if each.upper().startswith("PIP_")]:
        del environment[index]
    environment |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "https://127.0.0.1:9/"}
    shutil.copytree(here / "wheels", there / "wheels")
    shown = run(f"{offline}{CALL}\n", there, environment)
    (hashed,) = re.findall(r"^[0-9a-f]{64}  wheels/hsmtoll-.*\.whl$", output, re.MULTILINE)
    assert hashed in shown
    assert "200 OK\n" in shown

    # The control: a file that is not the locked one is refused, and nothing is installed.
    shutil.rmtree(there / "venv")
    (changed,) = (there / "wheels").glob("filelock-*.whl")
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("filelock/more.py", "")
    assert "DO NOT MATCH THE HASHES" in run(offline, there, environment, code=None)
    assert not list((there / "venv" / "lib").glob("python*/site-packages/hsmtoll"))
