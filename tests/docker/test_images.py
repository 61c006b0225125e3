"""What is in the images, and what is not."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.docker.containers import docker, run_docker, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHIPPED: Final = ("hsmtoll", "hsmtoll-sandbox", "hsmtoll-softhsm")

#: Upper bounds in megabytes; the base image is some 80 of them.
LARGEST: Final = {"hsmtoll": 260, "hsmtoll-sandbox": 260, "hsmtoll-softhsm": 150}

#: A private key in PEM with a body; the bare words stand in every TLS library.
KEY: Final = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\\?n?\s+[A-Za-z0-9+/=\s]{64}")

#: Where devices keep their objects and secrets are mounted: nothing may lie there in an image.
KEPT: Final = re.compile(r"^(var/lib/tokens|run/pin|run/secrets|run/p11|run/sandbox)/.+|extra-ca")

COMPILERS: Final = ("gcc", "g++", "cc", "c++", "clang", "tcc", "as", "ld", "make", "rustc", "pip")

pytestmark = pytest.mark.timeout(600)


def sh(image: str, script: str) -> str:
    """What a shell in a fresh container of *image* says."""
    return docker("run", "--rm", "--read-only", "--entrypoint", "sh", image, "-c", script)


def layers(image: str) -> Iterator[tuple[str, bytes]]:
    """Every file of every layer of an image, those removed by a later layer included."""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
        assert saved.stdout
        with tarfile.open(fileobj=saved.stdout, mode="r|") as outer:
            for member in outer:
                blob = outer.extractfile(member)
                content = blob.read() if blob else b""
                if len(content) < 1024 or content[257:262] != b"ustar":
                    yield member.name, content
                    continue
                with tarfile.open(fileobj=io.BytesIO(content)) as layer:
                    for inner in layer:
                        file = layer.extractfile(inner) if inner.isfile() else None
                        yield inner.name, file.read() if file else b""


def secrets_in(image: str, pin: str) -> list[str]:
    """Where a PIN, a private key or a kept object shows, in the history and in all layers."""
    found = []
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    if pin in history:
        found.append("history")
    for name, content in layers(image):
        if pin.encode() in content or KEY.search(content) or KEPT.search(name):
            found.append(name)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_no_pin_and_no_key_lies_in_any_layer(images: dict[str, str], name: str, pin: str) -> None:
    assert secrets_in(images[name], pin) == []


def test_a_pin_and_a_key_in_layers_are_found_although_they_were_removed(
    images: dict[str, str], pin: str, tmp_path: Path
) -> None:
    """The control of the scan: each of the ways in which images leak."""
    key = f"-----BEGIN PRIVATE KEY-----\n{'QUJD' * 32}\n-----END PRIVATE KEY-----\n"
    (tmp_path / "key.pem").write_text(key, "ascii")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {images['hsmtoll-softhsm']}\n"
        "USER 0\n"
        f"RUN printf {pin} > /usr/share/canary\n"
        "RUN rm /usr/share/canary\n"
        "COPY key.pem /usr/share/\n"
        "COPY key.pem /run/secrets/pin\n",
        "utf-8",
    )
    tag = "hsmtoll-tests/leaky"
    docker("build", "-q", "-t", tag, str(tmp_path))
    try:
        found = secrets_in(tag, pin)
    finally:
        docker("rmi", "-f", tag)
    wanted = {"history", "usr/share/canary", "usr/share/key.pem", "run/secrets/pin"}
    assert wanted <= set(found)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_image_is_small_and_belongs_to_nobody_special(images: dict[str, str], name: str) -> None:
    seen = json.loads(docker("inspect", images[name]))[0]
    assert seen["Size"] < LARGEST[name] * 1_000_000
    assert seen["Config"]["User"] == "10001:10001"
    assert seen["Config"]["Healthcheck"]["Test"]
    labels = seen["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == name
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert sh(images[name], "id -u; id -g") == "10001\n10001"


@pytest.mark.parametrize("name", SHIPPED)
def test_no_compiler_and_no_installer_is_in_an_image(images: dict[str, str], name: str) -> None:
    probe = "for each in {}; do command -v $each; done; true"
    assert sh(images[name], probe.format(" ".join(COMPILERS))) == ""
    # The control: the probe finds what is there.
    assert sh(images[name], probe.format("sh tar"))


def test_the_command_runs_on_a_read_only_root(images: dict[str, str]) -> None:
    output = docker("run", "--rm", "--read-only", images["hsmtoll"], "apis")
    assert "toll:eu/movement/road/v2" in output
    wrong = run_docker("run", "--rm", "--read-only", images["hsmtoll"], "no-such-command")
    assert wrong.returncode == 2


@pytest.mark.parametrize(
    ("name", "command"),
    [("hsmtoll", ["sandbox"]), ("hsmtoll-sandbox", []), ("hsmtoll-softhsm", [])],
)
def test_a_container_gets_healthy_and_ends_on_sigterm(
    images: dict[str, str], name: str, command: list[str]
) -> None:
    # The image's check, sooner than the image asks for it.
    asked = ("--health-interval", "1s")
    alone = ("run", "-d", *asked, "--read-only", "--tmpfs", "/tmp")  # noqa: S108 -- the container's own
    container = docker(*alone, images[name], *command)
    try:
        wait_for(container, "healthy")
        # The image's check of a command that is no signing host does not wait for its service.
        while command and "HSMTOLL_" not in docker("logs", container):
            time.sleep(0.1)
        # SIGTERM, then SIGKILL after five seconds: 137 if that was needed.
        docker("stop", "-t", "5", container)
        ended = docker("inspect", "--format", "{{.State.ExitCode}}", container)
        assert ended == "0"
    finally:
        docker("rm", "-f", "-v", container)


def test_a_sandbox_tells_of_its_last_request_although_it_was_stopped_right_after(
    images: dict[str, str],
) -> None:
    container = docker("run", "-d", images["hsmtoll-sandbox"])
    ask_and_stop = """
import http.client, os, signal, ssl
trusted = ssl.create_default_context(cafile="/run/sandbox/ca.pem")
for path in ("/the/one/before", "/the/last/one"):
    asked = http.client.HTTPSConnection("localhost", 8444, context=trusted)
    asked.request("GET", path)
    asked.getresponse().read()
os.kill(1, signal.SIGTERM)
"""
    try:
        wait_for(container, "healthy")
        docker("exec", container, "python", "-c", ask_and_stop)
        assert docker("wait", container) == "0"
        lines = [line.rpartition(" -> ")[0] for line in docker("logs", container).splitlines()]
        assert lines[-2:] == ["sandbox: GET /the/one/before", "sandbox: GET /the/last/one"]
    finally:
        docker("rm", "-f", "-v", container)


def test_a_process_that_ignores_sigterm_is_seen(images: dict[str, str]) -> None:
    """The control of the test above."""
    deaf = "trap '' TERM; while :; do sleep 1; done"
    container = docker("run", "-d", "--entrypoint", "sh", images["hsmtoll"], "-c", deaf)
    try:
        docker("stop", "-t", "1", container)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "137"
    finally:
        docker("rm", "-f", "-v", container)


def test_a_sandbox_that_does_not_listen_is_not_healthy(images: dict[str, str]) -> None:
    check = "/usr/local/lib/hsmtoll-healthcheck.py"
    alone = run_docker("run", "--rm", "--entrypoint", "python", images["hsmtoll-sandbox"], check)
    assert alone.returncode == 1


@pytest.mark.parametrize("name", ["hsmtoll", "hsmtoll-softhsm"])
def test_the_bill_of_materials_is_valid_and_complete(images: dict[str, str], name: str) -> None:
    short = name.removeprefix("hsmtoll-")
    bill = sh(images[name], f"cat /usr/share/sbom/{short}.cdx.json")
    assert _valid(images, bill)
    assert not _valid(images, bill.replace('"CycloneDX"', '"Cyclone"', 1))

    listed = {
        (purl.partition(":")[2].partition("/")[0], each["name"], each["version"])
        for each in json.loads(bill)["components"]
        if (purl := each.get("purl", ""))
    }
    installed = sh(images[name], "dpkg-query -W -f '${Package} ${Version}\\n'")
    debian = {("deb", *line.split()) for line in installed.splitlines()}
    assert debian == {each for each in listed if each[0] == "deb"}
    if name == "hsmtoll":
        seen = {_plain(each[1]): each[2] for each in listed if each[0] == "pypi"}
        assert seen["python-pkcs11"]
        assert {n: v for n, v in _python(images[name]).items() if n != "hsmtoll"} == {
            n: v for n, v in seen.items() if n != "hsmtoll"
        }


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python(image: str) -> dict[str, str]:
    script = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    output = docker("run", "--rm", "--entrypoint", "python", image, "-c", script)
    return {_plain(name): version for name, version in json.loads(output).items()}


def _valid(images: dict[str, str], bill: str) -> bool:
    script = (
        "import sys;"
        "from cyclonedx.schema import SchemaVersion;"
        "from cyclonedx.validation.json import JsonStrictValidator;"
        "judge = JsonStrictValidator(SchemaVersion.V1_6);"
        "sys.exit(judge.validate_str(sys.stdin.read()) is not None)"
    )
    run = ("run", "--rm", "-i", "--entrypoint", "/build/tools/bin/python", images["hsmtoll-sbom"])
    done = run_docker(*run, "-c", script, stdin=bill)
    assert done.returncode in {0, 1}, done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode == 0
