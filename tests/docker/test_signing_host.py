"""The signing host between containers: mutual TLS, a policy, an audit, a stop."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from pytest_docker.plugin import DockerComposeExecutor

from tests.docker.containers import PREFIX, PROJECT, Stack, run_docker, wait_for
from tests.kit.signing_host import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The first test builds and starts everything, once for each command.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def hosted(
    docker_compose_command: str, context: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The advertised command has run to its end, and all but the application are up again."""
    folder = tmp_path_factory.mktemp("hosted")
    file = str(context / "docker" / "compose.host.yml")
    compose = DockerComposeExecutor(docker_compose_command, [file], f"{PROJECT}-host")
    # A directory of this machine is what the other stack is about; this one has volumes alone.
    given = {name: os.environ.pop(name, None) for name in ("TOLL_P11_DIR", "TOLL_PIN_FILE")}
    os.environ["TOLL_IMAGE_PREFIX"] = PREFIX
    try:
        compose.execute("down --volumes --remove-orphans")
        log: bytes = compose.execute("up --build --exit-code-from app")
        made = Stack(compose, folder, "", log.decode())
        made.do("up -d softhsm sandbox host")
        wait_for(made.container("host"), "healthy")
        yield made
    finally:
        compose.execute("down --volumes --remove-orphans")
        os.environ.update({name: value for name, value in given.items() if value is not None})


def run_app(stack: Stack, *argv: str, **variables: str) -> tuple[int, str]:
    """One command of the application, in a new container: exit code, and all that it said."""
    options = " ".join(f"-e {name}={value}" for name, value in variables.items())
    try:
        return 0, stack.do(f"run --rm --no-deps {options} app {' '.join(argv)}")
    except Exception as exc:  # noqa: BLE001 - what the executor raises has the output in its text
        return 1, str(exc)


def test_an_application_without_a_device_gets_its_200_through_the_host(hosted: Stack) -> None:
    assert "200 OK" in hosted.log
    app = run_docker(
        "inspect", hosted.container("host"), "--format", "{{.HostConfig.ReadonlyRootfs}}"
    )
    assert app.stdout.strip() == "true"
    listed = hosted.do("exec -T host hsmtoll audit list")
    assert "san:dns:app.example" in listed
    assert "toll:eu/movement/road/v2" in listed


def test_what_the_policy_does_not_allow_is_denied_between_containers(hosted: Stack) -> None:
    code, output = run_app(hosted, "sign", "road")
    assert code == 0, output
    code, output = run_app(hosted, "sign", "air")
    assert code != 0
    assert "403" in output
    code, output = run_app(hosted, "sign", "road", HSMTOLL_SIGNER__ORGANIZATION="NTRSE-5500000000")
    assert code != 0
    assert "not for NTRSE-5500000000" in output


def test_a_caller_without_a_certificate_of_the_ca_is_not_even_heard(hosted: Stack) -> None:
    path = "/run/sandbox/ca.pem"
    code, output = run_app(hosted, "sign", "road", HSMTOLL_SIGNER__CA_FILE=path)
    assert code != 0
    assert "its TLS certificate is not trusted" in output


def test_stop_and_resume_hold_for_the_containers(hosted: Stack) -> None:
    hosted.do("exec -T host hsmtoll stop")
    code, output = run_app(hosted, "sign", "road")
    assert code != 0
    assert "stop" in output
    hosted.do("exec -T host hsmtoll resume")
    code, output = run_app(hosted, "sign", "road")
    assert code == 0, output
    verify = "hsmtoll audit verify --public-key /run/callers/audit.pub /var/lib/hsmtoll/audit"
    assert hosted.do(f"exec -T host {verify}")


def test_a_program_without_hsmtoll_gets_its_200_through_the_proxy(
    hosted: Stack, docker_compose_command: str, context: Path
) -> None:
    files = [str(context / "docker" / name) for name in ("compose.host.yml", "compose.proxy.yml")]
    compose = DockerComposeExecutor(docker_compose_command, files, f"{PROJECT}-host")
    try:
        compose.execute("up -d --no-deps --no-build proxy")
        wait_for(Stack(compose, hosted.folder, "", "").container("proxy"), "healthy")
        output = compose.execute("run --rm --no-deps program").decode()
        assert "200" in output.split()
        # The control: without the proxy's network there is nobody at that address.
        code, output = run_app(
            hosted,
            "python",
            "-c",
            "'import urllib.request as u; u.urlopen(\"http://127.0.0.1:8880/live\")'",
        )
        assert code != 0
        assert "refused" in output
    finally:
        compose.execute("rm --force --stop proxy")


def test_prometheus_beside_the_host_has_an_alert_when_the_device_is_stopped(
    hosted: Stack, docker_compose_command: str, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any port that is free.
    monkeypatch.setenv("TOLL_PROMETHEUS_PORT", "")
    names = ("compose.host.yml", "compose.monitoring.yml")
    files = [str(context / "docker" / name) for name in names]
    compose = DockerComposeExecutor(docker_compose_command, files, f"{PROJECT}-host")
    watched = Stack(compose, hosted.folder, "", "")

    def series(expression: str) -> str:
        url = "http://127.0.0.1:9090"
        command = f"promtool query instant {url} '{expression}'"
        # Until Prometheus listens, promtool fails.
        return watched.do(f'exec -T prometheus sh -c "{command} || true"')

    try:
        watched.do("up -d --build prometheus app")
        wait_for(watched.container("host"), "healthy")
        eventually(lambda: "acme" in series("hsmtoll_host_device_up == 1"))
        assert "HsmtollDeviceDown" not in series("ALERTS or up")
        watched.do("stop softhsm")
        eventually(lambda: "HsmtollDeviceDown" in series("ALERTS"), 120)
        watched.do("start softhsm")
        eventually(lambda: "acme" in series("hsmtoll_host_device_up == 1"), 180)
    finally:
        compose.execute("rm --force --stop prometheus app")
