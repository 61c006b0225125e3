"""The units of systemd, judged by systemd itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

PACKAGE: Final = Path(__file__).parents[2] / "hsmtoll"
UNITS: Final = PACKAGE / "host" / "systemd"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """All units, with a program that is there."""
    for path in (*UNITS.iterdir(), *(PACKAGE / "proxy" / "systemd").iterdir()):
        text = path.read_text("utf-8").replace("/opt/hsmtoll/bin/hsmtoll", sys.executable)
        (tmp_path / path.name).write_text(text, "utf-8")
    return tmp_path


def analyze(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze`, which needs no running systemd for this."""
    # Where systemd never ran, only root can make /run/systemd, which it wants even so.
    whose = ("--system",) if os.geteuid() == 0 else ("--user",)
    # And systemd 252 wants a user's directory, which is there where a session is.
    with TemporaryDirectory() as runtime:
        return subprocess.run(
            ["systemd-analyze", "--no-pager", *whose, *argv],
            capture_output=True, text=True, check=False,
            env=os.environ | {"XDG_RUNTIME_DIR": runtime},
        )  # fmt: skip


@pytest.mark.parametrize("name", ["hsmtoll-host", "hsmtoll-proxy"])
def test_the_units_are_what_systemd_understands_and_a_slip_is_seen(units: Path, name: str) -> None:
    service = units / f"{name}.service"
    paths = (units / f"{name}.socket", service)
    done = analyze("verify", "--man=no", *paths)
    assert (done.returncode, done.stderr) == (0, "")
    service.write_text(service.read_text().replace("RestartSec=5", "RestartSec=often"))
    assert "often" in analyze("verify", "--man=no", *paths).stderr


def exposure(unit: Path) -> float:
    """How exposed systemd thinks the service is: 0 to 10."""
    done = analyze("security", "--offline=true", unit)
    found = re.search(r"Overall exposure level .*: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1])


def test_the_timer_of_the_daily_check_is_what_systemd_understands_and_a_slip_is_seen(
    units: Path,
) -> None:
    timer = units / "hsmtoll-doctor.timer"
    paths = (timer, units / "hsmtoll-doctor.service")
    done = analyze("verify", "--man=no", *paths)
    assert (done.returncode, done.stderr) == (0, "")
    timer.write_text(timer.read_text().replace("OnCalendar=daily", "OnCalendar=at-times"))
    assert "at-times" in analyze("verify", "--man=no", *paths).stderr


def test_the_daily_check_has_what_the_host_has() -> None:
    """Account, PIN, audit key and directories: it would check another host else."""
    names = ("User", "Group", "LoadCredential", "Environment", "StateDirectory", "UMask")

    def lines(unit: str) -> list[str]:
        text = (UNITS / unit).read_text("utf-8")
        return [
            line for line in text.splitlines() if line.startswith(tuple(f"{n}=" for n in names))
        ]

    assert lines("hsmtoll-doctor.service") == lines("hsmtoll-host.service") != []
    assert "doctor --all-profiles --strict" in (UNITS / "hsmtoll-doctor.service").read_text("utf-8")


@pytest.mark.parametrize("name", ["hsmtoll-host", "hsmtoll-proxy", "hsmtoll-doctor"])
def test_the_sandbox_of_the_service_is_tight(units: Path, name: str) -> None:
    service = units / f"{name}.service"
    assert exposure(service) <= 2.0
    text = service.read_text()
    service.write_text("\n".join(x for x in text.splitlines() if not x.startswith("SystemCall")))
    assert exposure(service) > 2.0


@pytest.mark.parametrize("name", ["hsmtoll-host", "hsmtoll-proxy", "hsmtoll-doctor"])
def test_the_pin_comes_as_a_credential_and_no_core_is_ever_written(units: Path, name: str) -> None:
    text = (units / f"{name}.service").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert "LoadCredential=pin:/etc/hsmtoll/secret/pin" in lines
    assert "Environment=HSMTOLL_HSM__PIN_FILE=%d/pin" in lines
    assert "LimitCORE=0" in lines
    assert not [line for line in lines if "HSM__PIN=" in line]


def test_the_filter_of_system_calls_lets_the_clock_be_read() -> None:
    """Nothing is signed by a clock that nobody keeps, and adjtimex(2) tells whether one does."""
    text = (UNITS / "hsmtoll-host.service").read_text("utf-8")
    allowed: set[str] = set()
    for value in re.findall(r"^SystemCallFilter=(.*)$", text, re.MULTILINE):
        names = value.removeprefix("~").split()
        allowed = allowed - set(_calls(names)) if value[0] == "~" else allowed | set(_calls(names))
    assert {"adjtimex", "read", "futex"} <= allowed
    assert not {"clock_settime", "mount", "ptrace", "reboot", "init_module"} & allowed
    assert "ProtectClock=yes" not in text.replace("Not ProtectClock=yes", "")


def _calls(names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if not name.startswith("@"):
            found.append(name)
            continue
        listed = analyze("syscall-filter", name).stdout.splitlines()[1:]
        inner = [line.strip() for line in listed if line.strip() and "#" not in line]
        found += _calls([each for each in inner if each != name])
    return found


def test_what_the_units_set_are_settings() -> None:
    from hsmtoll.settings import Settings, variable

    known = {
        variable(name, inner)
        for name, field in Settings.model_fields.items()
        for inner in getattr(field.annotation, "model_fields", {})
    } | {variable(name) for name in Settings.model_fields}
    text = (UNITS / "hsmtoll-host.service").read_text("utf-8")
    named = set(re.findall(r"HSMTOLL_[A-Z_]*[A-Z]", text))
    assert named
    assert named <= known, json.dumps(sorted(named - known))
