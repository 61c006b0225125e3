"""`hsmtoll sandbox`, as a server of its own and around a command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from hsmtoll.testing.identity import eseal
from hsmtoll.testing.softhsm import SoftHsm
from tests.kit.commands import hsmtoll

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HSMTOLL = (sys.executable, "-m", "hsmtoll")


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return hsmtoll(*argv, env={**os.environ, **environ})


@pytest.fixture
def device(tmp_path: Path) -> SoftHsm:
    return SoftHsm.create(tmp_path / "softhsm")


def started(tmp_path: Path, *argv: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The server, and the variables it wrote when it listened."""
    env_file = tmp_path / "sandbox.env"
    server = subprocess.Popen(
        [*HSMTOLL, "sandbox", "--env-file", str(env_file), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not env_file.exists() and time.monotonic() < until and server.poll() is None:
        time.sleep(0.05)
    assert server.poll() is None, server.stderr.read() if server.stderr else ""
    assert env_file.stat().st_mode & 0o777 == 0o600
    lines = env_file.read_text().splitlines()
    return server, dict(line.split("=", maxsplit=1) for line in lines)


@pytest.fixture
def stopping() -> Iterator[list[subprocess.Popen[str]]]:
    servers: list[subprocess.Popen[str]] = []
    yield servers
    for each in servers:
        each.kill()
        each.communicate()


def test_a_server_of_its_own_knows_whom_it_was_told_of(
    tmp_path: Path, device: SoftHsm, stopping: list[subprocess.Popen[str]]
) -> None:
    who = eseal(device)
    trusted = tmp_path / "root.pem"
    trusted.write_bytes(who.chain[2].public_bytes(Encoding.PEM))
    public = load_der_public_key(device.generate_key("nokkel", b"\x07"))
    key = tmp_path / "nokkel.pem"
    key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    clients = tmp_path / "clients.toml"
    clients.write_text(
        '[[client]]\nclient_id = "c-1"\norg_no = "987654325"\n'
        '[[client.key]]\nkid = "k-1"\npem = "nokkel.pem"\n'
    )
    server, variables = started(tmp_path, "--trust", str(trusted), "--client", str(clients))
    stopping.append(server)
    named = {name: value for name, value in variables.items() if name.startswith("HSMTOLL_")}

    sealed = run("test-auth", "road", **who.environ(), **named)
    assert (sealed.returncode, sealed.stdout) == (0, "200 OK\n"), sealed.stderr
    norwegian = {
        **device.environ("nokkel"),
        **named,
        "HSMTOLL_IDENTITY": "norwegian",
        "HSMTOLL_ISS": "c-1",
    }
    assert run("test-auth", "road", **norwegian, HSMTOLL_KID="k-1").stdout == "200 OK\n"
    kid = json.loads(run("doctor", "--json", **norwegian, HSMTOLL_KID="k-1").stdout)["checks"]
    assert [each["days"] for each in kid if each["check"] == "kid"] == [364]
    stranger = run("token", "air", **norwegian, HSMTOLL_KID="k-2")
    assert stranger.returncode == 60
    assert "hsmtoll key jwk" in stranger.stderr

    context = ssl.create_default_context(cafile=variables["HSMTOLL_CA_FILE"])
    secret = {"Authorization": f"Bearer {variables['SANDBOX_ADMIN_SECRET']}"}
    with httpx.Client(verify=context, base_url=variables["SANDBOX_ADMIN"]) as admin:
        assert admin.get("/received").status_code == 401
        kinds = [each["kind"] for each in admin.get("/received", headers=secret).json()]
        assert kinds.count("grant") == 3
        fault = {"name": "503", "endpoint": "token"}
        assert admin.post("/faults", headers=secret, json=fault).status_code == 201
    assert run("token", "rail", **who.environ(), **named).returncode == 80

    server.send_signal(signal.SIGTERM)
    assert server.wait(10) == 0


def test_a_command_is_run_in_it_and_its_code_is_kept() -> None:
    done = run("sandbox", "--", "sh", "-c", 'test "$HSMTOLL_ENVIRONMENT" = sandbox && exit 7')

    assert done.returncode == 7
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "code"), [("KILL", 137), ("TERM", 143), ("0", 0)])
def test_a_command_that_a_signal_ends_leaves_with_128_and_its_number(name: str, code: int) -> None:
    assert run("sandbox", "--", "sh", "-c", f"kill -{name} $$").returncode == code


def test_a_command_in_it_finds_it_at_the_port_and_in_the_file_that_were_asked_for(
    tmp_path: Path,
) -> None:
    port, file = free_ports(), tmp_path / "env"
    where = ("--port", str(port), "--env-file", str(file))
    done = run("sandbox", *where, "--", "sh", "-c", 'echo "$HSMTOLL_ENDPOINTS__ISSUER"')

    assert done.stdout == f"https://localhost:{port}/\n", done.stderr
    variables = dict(line.split("=", maxsplit=1) for line in file.read_text().splitlines())
    assert variables["HSMTOLL_ENDPOINTS__ISSUER"] == done.stdout.strip()
    assert "HSMTOLL_HSM__KEY" in variables
    assert file.stat().st_mode & 0o777 == 0o600


def free_ports() -> int:
    """The first of three in a row that nobody has."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                third.bind(("127.0.0.1", port + 2))
                return port


def test_a_command_in_it_knows_nothing_of_a_configuration_of_this_user(tmp_path: Path) -> None:
    (tmp_path / "hsmtoll").mkdir()
    configured = tmp_path / "hsmtoll" / "hsmtoll.toml"
    configured.write_text('kid = "mine"\nenvironment = "prod"\n[hsm]\ntoken_label = "ours"\n')
    mine = {"XDG_CONFIG_HOME": str(tmp_path)}

    done = run("sandbox", "--", *HSMTOLL, "token", "road", **mine)
    assert (done.returncode, done.stderr) == (0, "")
    # The control: outside of it the file is read.
    assert run("doctor", "--json", **mine).returncode != 0


def test_it_works_where_others_may_write_what_is_temporary(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    # The control: a configuration file would not be read from there.
    (tmp_path / "hsmtoll.toml").touch(mode=0o600)
    refused = run("doctor", HSMTOLL_CONFIG=str(tmp_path / "hsmtoll.toml"))
    assert "others may change" in refused.stdout + refused.stderr

    done = run("sandbox", "--", *HSMTOLL, "token", "road", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_is_ended_with_it_and_nothing_of_it_stays(tmp_path: Path) -> None:
    argv = (*HSMTOLL, "sandbox", "--", "sh", "-c", "echo there; exec sleep 100")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as sandbox:
        assert sandbox.stdout is not None
        assert sandbox.stdout.readline() == "there\n"
        assert list(tmp_path.iterdir())
        sandbox.send_signal(signal.SIGTERM)
        assert sandbox.wait(20) == 143
        # The pipe ends when its last writer does: the command.
        assert sandbox.stdout.read() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("--port", "99999"), 2),
        (("--port", "-5"), 2),
        (("--port", "65534"), 2),
        (("--client", "/etc/hostname"), 10),
        (("--trust", "/etc/hostname"), 10),
        (("--client", "/nowhere"), 2),
        (("--identity", "nobody"), 2),
        (("--", "/nowhere/command"), 2),
    ],
)
def test_what_it_cannot_use_is_told_in_a_line(argv: tuple[str, ...], code: int) -> None:
    done = run("sandbox", *argv)

    assert done.returncode == code
    assert done.stderr.startswith("hsmtoll: ")
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("sandbox", "--port", str(taken.getsockname()[1]))

        again = run("sandbox", "--port", str(taken.getsockname()[1]), "--", "true")

    for each in (done, again):
        assert each.returncode == 10
        assert "--port" in each.stderr


@pytest.mark.parametrize("command", [(), ("--", "true")])
@pytest.mark.parametrize("file", ["/nowhere/env", "/etc/hostname/env", "/proc/env"])
def test_a_file_that_cannot_be_written_is_told_as_that(file: str, command: tuple[str, ...]) -> None:
    done = run("sandbox", "--env-file", file, *command)

    assert done.returncode == 10
    assert done.stderr.startswith(
        f"hsmtoll: sandbox-env-file: --env-file {file}: cannot be written ("
    )


@pytest.mark.parametrize(("name", "opening"), [("c.json", "["), ("c.toml", "client = [")])
def test_clients_that_are_nested_without_end_are_told_in_a_line(
    tmp_path: Path, name: str, opening: str
) -> None:
    clients = tmp_path / name
    clients.write_text(opening + "[" * 100_000)
    done = run("sandbox", "--client", str(clients), "--", "true")

    assert done.returncode == 10
    assert done.stderr.startswith(f"hsmtoll: sandbox-clients: reading clients from {clients}")
