"""A device in a process of its own, in programs that are not a plain Python in its environment."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hsmtoll
from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pool import WorkerDevice
from hsmtoll.hsm.uri import KeyUri
from tests.kit.grants import DEFINED, a_grant
from tests.kit.own_device import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

SOURCE = Path(hsmtoll.__file__).parents[1]
UWSGI = Path(sys.executable).with_name("pyuwsgi")
PACKAGES = [each for each in sys.path if each.endswith(("site-packages", "dist-packages"))]

#: `signed` signs once, and returns with how many bytes, or what went wrong.
SIGNED = """
import os, sys
sys.path[1:1] = os.environ["PLACES"].split(os.pathsep)
{DEFINED}
from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.settings import load
app = App(load())
# Some settings name no Maskinporten.
grant = a_grant(audience=app.hsm.audience) if app.hsm.audience else a_grant()

def signed():
    try:
        return str(len(app.devices[0].sign("RS256", grant).value))
    except HsmTollError as exc:
        return f"{exc.code} {exc.exit_code} {exc}"

def loaded():
    with open("/proc/self/maps") as maps:
        return "loaded" if "softhsm" in maps.read() else "isolated"
""".replace("{DEFINED}", DEFINED)
PROGRAM = f"{SIGNED}\nprint(signed())\napp.close()\n"


def python() -> str:
    """The interpreter outside of the virtual environment, which knows neither us nor libraries."""
    found: str = getattr(sys, "_base_executable", sys.executable)
    return found


def run(
    who: TemporaryIdentity, state: Path, *argv: str, where: Path, places: list[str], **environ: str
) -> str:
    given = {
        "PATH": os.environ["PATH"],
        "PLACES": os.pathsep.join(places),
        "HSMTOLL_ENVIRONMENT": "sandbox",
        "HSMTOLL_HSM__ISOLATION": "process",
        "HSMTOLL_STATE": str(state),
        **who.environ(),
        **environ,
    }
    done = subprocess.run(
        argv, cwd=where, env=given, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_program_that_makes_its_own_path_of_imports_is_followed(
    toll_eseal: TemporaryIdentity, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    places = [str(SOURCE), *PACKAGES]
    argv = (python(), "-I", str(program))
    assert run(toll_eseal, tmp_path, *argv, where=tmp_path, places=places) == "256"
    # The control: the worker's Python alone knows neither.
    alone = (python(), "-I", "-c", "import hsmtoll")
    assert subprocess.run(alone, capture_output=True, cwd="/", check=False).returncode != 0


def test_a_program_in_an_archive_that_was_named_by_a_relative_path_is_followed(
    toll_eseal: TemporaryIdentity, tmp_path: Path
) -> None:
    """As zipapp makes them; the libraries lie beside it, for some are compiled."""
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
        for each in (SOURCE / "hsmtoll").rglob("*"):
            if each.is_file() and "__pycache__" not in each.parts:
                archive.write(each, each.relative_to(SOURCE))
    argv = (python(), "-I", "app.pyz")
    assert run(toll_eseal, tmp_path, *argv, where=tmp_path, places=PACKAGES) == "256"


@pytest.mark.parametrize(("isolation", "where"), [("process", "isolated"), ("none", "loaded")])
def test_a_program_that_gevent_has_patched_signs_in_several_greenlets(
    toll_eseal: TemporaryIdentity, tmp_path: Path, isolation: str, where: str
) -> None:
    program = (
        "from gevent import joinall, monkey, socket, spawn\n"
        f"monkey.patch_all()\n{SIGNED}\n"
        "import socket as patched\n"
        "assert patched.socket is socket.socket\n"
        "jobs = [spawn(signed) for _ in range(4)]\n"
        "joinall(jobs, timeout=100)\n"
        "print(*(job.value for job in jobs), loaded())\n"
        "app.close()\n"
    )
    argv = (sys.executable, "-c", program)
    places = [str(SOURCE)]
    set_to = {"HSMTOLL_HSM__ISOLATION": isolation}
    output = run(toll_eseal, tmp_path, *argv, where=tmp_path, places=places, **set_to)
    assert output == f"256 256 256 256 {where}"


def uwsgi_answers(
    who: TemporaryIdentity, folder: Path, *options: str, where: Path, isolation: str
) -> tuple[str, str]:
    """What a program in uWSGI answers, and the name of its sys.executable."""
    (where / "program.py").write_text(
        f"{SIGNED}\n"
        "def application(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [f'{signed()} {loaded()}\\n{sys.executable}'.encode()]\n"
    )
    port = free_port()
    given = {
        **os.environ,
        "PLACES": str(SOURCE),
        "HSMTOLL_ENVIRONMENT": "sandbox",
        "HSMTOLL_HSM__ISOLATION": isolation,
        "HSMTOLL_STATE": str(folder),
        **who.environ(),
    }
    server = subprocess.Popen(
        [
            *(UWSGI, "--need-app", "--master", "--die-on-term", "--wsgi-file", "program.py"),
            *("--http-socket", f"127.0.0.1:{port}", *options),
        ],
        cwd=where, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=20), timeout=60) as client:
            answer, _, executable = client.get(f"http://127.0.0.1:{port}/").text.partition("\n")
    finally:
        server.terminate()
        _, words = server.communicate(timeout=60)
    assert answer, words
    return answer, Path(executable).name


@pytest.mark.parametrize(("isolation", "where"), [("process", "isolated"), ("none", "loaded")])
def test_a_program_in_uwsgi_signs(
    toll_eseal: TemporaryIdentity, tmp_path: Path, isolation: str, where: str
) -> None:
    state = tmp_path / "state"
    answer, executable = uwsgi_answers(toll_eseal, state, where=tmp_path, isolation=isolation)
    assert (answer, executable[:6]) == (f"256 {where}", "python")
    # A uWSGI that is a program of its own gives its own name for Python's.
    options = ("--py-sys-executable", str(UWSGI))
    answer, executable = uwsgi_answers(
        toll_eseal, state, *options, where=tmp_path, isolation=isolation
    )
    assert (answer, executable) == (f"256 {where}", "pyuwsgi")


def distributions(name: str) -> set[str]:
    """*name* and what it needs, by its metadata."""
    needed: set[str] = set()
    open_ = [name]
    while open_:
        one = canonicalize_name(open_.pop())
        if one in needed:
            continue
        needed.add(one)
        required = map(Requirement, metadata.requires(one) or ())
        open_ += [
            each.name
            for each in required
            if each.marker is None or each.marker.evaluate({"extra": ""})
        ]
    return needed


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this tree and what it needs, and nothing else, as ``pip --target`` makes it."""
    folder = tmp_path_factory.mktemp("installed") / "site-packages"
    for name in distributions("hsmtoll"):
        for each in metadata.files(name) or ():
            if ".." not in each.parts and each.suffix not in {".pyc", ".pth"}:
                target = folder / each
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(each.locate()), target)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "hsmtoll", folder / "hsmtoll", ignore=ignored, dirs_exist_ok=True)
    return folder


def shiv(folder: Path, archive: Path) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "shiv", "--site-packages", str(folder)),
        *("--entry-point", "hsmtoll.__main__:main", "--output-file", str(archive)),
    )


def pex(folder: Path, archive: Path) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "pex", "--sources-directory", str(folder)),
        *("--entry-point", "hsmtoll.__main__:main", "--output-file", str(archive)),
        *("--pex-root", str(archive.parent / "build")),
    )


@pytest.mark.parametrize("made_by", [shiv, pex])
def test_a_command_of_an_archive_with_everything_in_it_signs(
    installed: Path,
    toll_settings: Settings,
    toll_faults: Faults,
    tmp_path: Path,
    made_by: Callable[[Path, Path], tuple[str, ...]],
) -> None:
    del toll_settings
    archive = tmp_path / "hsmtoll.pyz"
    result = subprocess.run(
        made_by(installed, archive), capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    variables = {
        **os.environ,
        "SHIV_ROOT": str(tmp_path / "shiv"),
        "PEX_ROOT": str(tmp_path / "pex"),
        "HSMTOLL_HSM__ISOLATION": "process",
    }

    def signs() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python(), "-I", str(archive), "sign", "road"],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    done = signs()
    assert (done.returncode, done.stdout.count(".")) == (0, 2), done.stderr
    # The module is in a process of its own: the command outlives its crash.
    toll_faults.set("crash", function="C_Sign")
    done = signs()
    assert (done.returncode, "module-crashed" in done.stderr) == (30, True), done.stderr
    # What is there comes from the archive alone.
    alone = (python(), "-I", "-c", "import hsmtoll")
    assert subprocess.run(alone, capture_output=True, cwd="/", check=False).returncode != 0


@pytest.fixture
def device(
    toll_eseal: TemporaryIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WorkerDevice]:
    monkeypatch.setenv("SOFTHSM2_CONF", str(toll_eseal.device.conf))
    made = WorkerDevice(
        DeviceSettings(
            toll_eseal.device.module,
            KeyUri.parse(toll_eseal.device.uri(toll_eseal.key_label)),
            deadline=30.0,
        ),
        pin=PinValue.of(toll_eseal.device.pin, name="a test"),
        pin_log=PinLog(tmp_path / "state"),
    )
    yield made
    made.close()


def script(where: Path, name: str, text: str) -> str:
    made = where / name
    made.write_text(f"#!/bin/sh\n{text}\n")
    made.chmod(0o755)
    return str(made)


def test_a_program_that_is_no_python_finds_one(
    device: WorkerDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In uWSGI, sys.executable is uwsgi."""
    monkeypatch.setattr(sys, "executable", script(tmp_path, "uwsgi", "exit 1"))
    assert len(device.sign("RS256", a_grant()).value) == 256


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo first >&2; echo 'ModuleNotFoundError: no hsmtoll' >&2; exit 1", "no hsmtoll"),
        ("exit 3", "it ended with 3"),
        ("kill -9 $$", "it was ended by SIGKILL"),
    ],
)
def test_what_fails_before_a_module_is_loaded_is_not_the_modules_fault(
    device: WorkerDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: str,
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "python3", text))
    with pytest.raises(ConfigurationError, match="could not be started") as caught:
        device.sign("RS256", a_grant())
    assert words in str(caught.value)
    assert (caught.value.code, caught.value.exit_code) == ("worker-start", 10)
    assert "maker" not in f"{caught.value} {caught.value.hint}"
    monkeypatch.undo()
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "state"))
    # The next call starts another one, which gets as far as the module.
    with pytest.raises(hsmtoll.HsmTollError) as later:
        device.sign("RS256", a_grant())
    assert later.value.code != "worker-start"


def test_sockets_that_do_not_block_are_made_to(
    device: WorkerDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a gevent that has patched the program are."""
    real = socket.socketpair

    def pair(*args: Any) -> tuple[socket.socket, socket.socket]:
        ours, theirs = real(*args)
        os.set_blocking(theirs.fileno(), False)
        return ours, theirs

    monkeypatch.setattr(socket, "socketpair", pair)
    assert len(device.sign("RS256", a_grant()).value) == 256
