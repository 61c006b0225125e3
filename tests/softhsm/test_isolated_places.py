"""A device in a process of its own, in programs that are not a plain Python in its environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hsmtoll
from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.isolated import IsolatedDevice
from hsmtoll.hsm.ledger import Ledger
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import SigningInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.testing.identity import ThrowAway

SOURCE = Path(hsmtoll.__file__).parents[1]
PACKAGES = [each for each in sys.path if each.endswith(("site-packages", "dist-packages"))]

#: Signs once, and says with how many bytes, or what went wrong.
PROGRAM = """
import os, sys
sys.path[1:1] = os.environ["PLACES"].split(os.pathsep)
from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.jws import SigningInput
from hsmtoll.settings import load
app = App(load())
try:
    print(len(app.devices[0].sign("RS256", SigningInput(b"a.b"))))
except HsmTollError as exc:
    print(exc.code, exc.exit_code, exc)
finally:
    app.close()
"""


def python() -> str:
    """The interpreter outside of the virtual environment, which knows neither us nor libraries."""
    found: str = getattr(sys, "_base_executable", sys.executable)
    return found


def run(
    who: ThrowAway, state: Path, *argv: str, where: Path, places: list[str], **environ: str
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
    toll_eseal: ThrowAway, tmp_path: Path
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
    toll_eseal: ThrowAway, tmp_path: Path
) -> None:
    """As zipapp makes them; the libraries lie beside it, for some are compiled."""
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
        for each in (SOURCE / "hsmtoll").rglob("*"):
            if each.is_file() and "__pycache__" not in each.parts:
                archive.write(each, each.relative_to(SOURCE))
    argv = (python(), "-I", "app.pyz")
    assert run(toll_eseal, tmp_path, *argv, where=tmp_path, places=PACKAGES) == "256"


@pytest.fixture
def device(
    toll_eseal: ThrowAway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[IsolatedDevice]:
    monkeypatch.setenv("SOFTHSM2_CONF", str(toll_eseal.device.conf))
    made = IsolatedDevice(
        toll_eseal.device.module,
        KeyUri.parse(toll_eseal.device.uri(toll_eseal.key_label)),
        pin=PinValue.of(toll_eseal.device.pin, name="a test"),
        ledger=Ledger(tmp_path / "state"),
        deadline=30.0,
    )
    yield made
    made.close()


def script(where: Path, name: str, text: str) -> str:
    made = where / name
    made.write_text(f"#!/bin/sh\n{text}\n")
    made.chmod(0o755)
    return str(made)


def test_a_program_that_is_no_python_finds_one(
    device: IsolatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In uWSGI, sys.executable is uwsgi."""
    monkeypatch.setattr(sys, "executable", script(tmp_path, "uwsgi", "exit 1"))
    assert len(device.sign("RS256", SigningInput(b"a.b"))) == 256


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo first >&2; echo 'ModuleNotFoundError: no hsmtoll' >&2; exit 1", "no hsmtoll"),
        ("exit 3", "it ended with 3"),
        ("kill -9 $$", "it was ended by SIGKILL"),
    ],
)
def test_what_fails_before_a_module_is_loaded_is_not_the_modules_fault(
    device: IsolatedDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: str,
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "python3", text))
    with pytest.raises(ConfigurationError, match="could not be started") as caught:
        device.sign("RS256", SigningInput(b"a.b"))
    assert words in str(caught.value)
    assert (caught.value.code, caught.value.exit_code) == ("worker-start", 10)
    assert "maker" not in f"{caught.value} {caught.value.hint}"
    monkeypatch.undo()
    monkeypatch.setenv("SOFTHSM2_CONF", str(device._ledger.directory))
    # The next call starts another one, which gets as far as the module.
    with pytest.raises(hsmtoll.HsmTollError) as later:
        device.sign("RS256", SigningInput(b"a.b"))
    assert later.value.code != "worker-start"


def test_sockets_that_do_not_block_are_made_to(
    device: IsolatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a gevent that has patched the program are."""
    real = socket.socketpair

    def pair(*told: Any) -> tuple[socket.socket, socket.socket]:
        ours, theirs = real(*told)
        os.set_blocking(theirs.fileno(), False)
        return ours, theirs

    monkeypatch.setattr(socket, "socketpair", pair)
    assert len(device.sign("RS256", SigningInput(b"a.b"))) == 256
