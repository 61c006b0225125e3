"""The plugin as a stranger uses it: the built wheel, an environment of their own, a project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOP = HERE.parents[2]


@pytest.fixture(scope="module")
def strangers_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A fresh environment with the wheel. What the wheel depends on is linked from the locked
    environment, package by package, so that nothing of this tree can be imported by accident.
    """
    folder = tmp_path_factory.mktemp("stranger")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run([sys.executable, *build, "-w", str(folder), str(TOP)], check=True)
    (wheel,) = folder.glob("hsmtoll-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    locked = Path(pytest.__file__).parents[1]
    for each in locked.iterdir():
        if not re.match(r"(__editable__|_?hsmtoll|.*\.pth$)", each.name):
            (site / each.name).symlink_to(each)
    shutil.unpack_archive(wheel, site, "zip")
    return python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The sample project, where nothing of ours is above it."""
    return Path(shutil.copytree(HERE / "sample_project", tmp_path / "sample"))


def run(python: Path, project: Path, *argv: str, code: int = 0) -> str:
    files = ["check_customs.py"] if not argv or argv[0] != "-c" else []
    done = subprocess.run(
        [str(python), *(("-m", "pytest", "-q") if files else ()), *argv, *files],
        cwd=project,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_a_stranger_s_project_passes_with_the_wheel_alone(
    strangers_python: Path, project: Path
) -> None:
    where = run(strangers_python, project, "-c", "import hsmtoll; print(hsmtoll.__file__)")
    assert str(TOP) not in where

    assert "5 passed" in run(strangers_python, project)


def test_it_passes_in_parallel_as_well(strangers_python: Path, project: Path) -> None:
    assert "5 passed" in run(strangers_python, project, "-n", "2")


def test_a_run_that_uses_no_fixture_pays_nothing(strangers_python: Path, project: Path) -> None:
    (project / "check_customs.py").write_text(
        "import sys\n"
        "def test_nothing_heavy_is_there():\n"
        "    heavy = {'cryptography', 'pkcs11', 'httpx', 'aiohttp', 'pydantic', 'asn1crypto'}\n"
        "    assert not heavy & set(sys.modules)\n"
        "    assert 'hsmtoll.testing.plugin' in sys.modules\n"
    )
    # Plugins of this project's own tests, which a stranger does not have.
    ours = ("-p", "no:pytest_httpx", "-p", "no:respx")
    assert "1 passed" in run(strangers_python, project, *ours)


def test_a_fixture_without_the_extra_says_what_to_install(
    strangers_python: Path, project: Path
) -> None:
    (project / "conftest.py").write_text("import sys\nsys.modules['aiohttp'] = None\n")
    for fixture in ("toll_client", "toll_eseal", "toll_norwegian", "toll_sandbox"):
        (project / "check_customs.py").write_text(f"def test_it({fixture}):\n    pass\n")
        output = run(strangers_python, project, code=1)
        assert "install the extra `sandbox` the way hsmtoll was installed" in output
        assert "Traceback" not in output
    # The control: the device alone needs none of it.
    (project / "check_customs.py").write_text("def test_it(toll_softhsm):\n    pass\n")
    assert "1 passed" in run(strangers_python, project)


def test_a_variable_that_a_shell_has_in_small_letters_does_not_contradict_a_fixture(
    strangers_python: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("hsmtoll_state", "/nowhere")
    monkeypatch.setenv("hsmtoll_ca_file", "/nowhere/ca.pem")

    assert "5 passed" in run(strangers_python, project)
