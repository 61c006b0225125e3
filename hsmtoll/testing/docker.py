"""
A SoftHSM device in a container, as a fixture for projects with pytest-docker.

The process under test uses p11-kit's client module and a socket, as for a remote device. Nothing
but pytest is imported before the fixture is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from hsmtoll.errors import DeviceError
from hsmtoll.testing.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DockerSoftHsm", "docker_softhsm", "find_client", "toll_softhsm_docker"]

IMAGE_FOLDER: Final = Path(__file__).parent / "softhsm_image"
_START_TIMEOUT: Final = 60.0
_MODULE_PATHS: Final = (
    "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
    "/usr/lib/aarch64-linux-gnu/pkcs11/p11-kit-client.so",
    "/usr/lib64/pkcs11/p11-kit-client.so",
    "/usr/lib/pkcs11/p11-kit-client.so",
)


def find_client() -> Path:
    """The path of p11-kit-client.so on this machine. DeviceError if there is none."""
    for place in _MODULE_PATHS:
        if Path(place).is_file():
            return Path(place)
    raise DeviceError(
        "p11-kit: its client module is not on this machine",
        hint="install it (Debian: apt-get install p11-kit-modules)",
        code="p11-kit-missing",
    )


@dataclass(frozen=True, slots=True)
class DockerSoftHsm(SoftHsm):
    """
    A `SoftHsm` whose *module* is p11-kit's client: keys and certificates are made the same way.

    *directory* holds the PIN file (0600) and the socket's folder. Processes find the device
    by P11_KIT_SERVER_ADDRESS, which `environ` and the fixture set.
    """

    @property
    def socket(self) -> Path:
        """Where the container's p11-kit server listens."""
        return self.directory / "p11" / "pkcs11.sock"

    def environ(self, key_label: str | None = None) -> dict[str, str]:
        """Variables for a process that uses the device, and the key called *key_label*."""
        named = {"HSMTOLL_HSM__KEY": self.uri(key_label)} if key_label else {}
        return {
            "P11_KIT_SERVER_ADDRESS": f"unix:path={self.socket}",
            "HSMTOLL_HSM__MODULE": str(self.module),
            "HSMTOLL_HSM__PIN_FILE": str(self.pin_file),
            **named,
        }


@contextlib.contextmanager
def docker_softhsm(
    folder: Path, *, command: str = "docker compose", project: str = "toll-softhsm"
) -> Iterator[DockerSoftHsm]:
    """
    A new device in a container, removed at the end with everything that it kept.

    *folder* must be private to this user; *command* is ``docker compose`` or ``docker-compose``.
    What an interrupted run left under *project* is removed first. The image is built from this
    package, unless TOLL_SOFTHSM_IMAGE names one. Raises DeviceError where the module is missing,
    and what pytest-docker raises where Docker fails.
    """
    from pytest_docker.plugin import DockerComposeExecutor

    folder.chmod(0o700)
    device = DockerSoftHsm(folder, find_client(), "toll", secrets.token_hex(8))
    (folder / "p11").mkdir(exist_ok=True)
    # For the container's user; the parent directory (0700) keeps other accounts out.
    (folder / "p11").chmod(0o777)
    shared = folder / "pin-of-the-container"
    for path, mode in ((device.pin_file, 0o600), (shared, 0o644)):
        path.touch()
        path.chmod(mode)
        path.write_text(device.pin, "ascii")
    compose = folder / "compose.json"
    compose.write_text(json.dumps({"services": {"softhsm": _service(folder, shared)}}), "utf-8")
    docker = DockerComposeExecutor(command, [compose], project)
    docker.execute("down --volumes --remove-orphans")
    try:
        docker.execute("up -d" if "TOLL_SOFTHSM_IMAGE" in os.environ else "up -d --build")
        _wait(docker)
        yield device
    finally:
        docker.execute("down --volumes --remove-orphans")


def _service(folder: Path, pin: Path) -> dict[str, object]:
    given = os.environ.get("TOLL_SOFTHSM_IMAGE")
    source: dict[str, object] = {"image": given or "hsmtoll-softhsm-fixture"}
    if not given:
        # A build argument without a value is taken from the environment.
        source["build"] = {"context": str(IMAGE_FOLDER), "args": {"TOLL_BASE": None}}
    return {
        **source,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp"],  # noqa: S108 -- the container's own
        "volumes": [f"{folder / 'p11'}:/run/p11", f"{pin}:/run/secrets/pin:ro"],
    }


def _wait(docker: object) -> None:
    from pytest_docker.plugin import DockerComposeExecutor, Services

    assert isinstance(docker, DockerComposeExecutor)

    def answers() -> bool:
        try:
            docker.execute("exec -T softhsm healthcheck.sh")
        except Exception:  # noqa: BLE001 -- pytest-docker raises just that
            return False
        return True

    Services(docker).wait_until_responsive(answers, _START_TIMEOUT, 0.2)


@pytest.fixture(scope="session")
def toll_softhsm_docker(
    docker_compose_command: str,
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[DockerSoftHsm]:
    """A SoftHSM device in a container of this session's own, empty; needs pytest-docker."""
    # The same name every time, so that the next run cleans up after one that was killed.
    where = f"{pytestconfig.rootpath} {os.environ.get('PYTEST_XDIST_WORKER', '')}"
    project = f"toll-softhsm-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    folder = tmp_path_factory.mktemp("toll-docker")
    with docker_softhsm(folder, command=docker_compose_command, project=project) as device:
        before = os.environ.get("P11_KIT_SERVER_ADDRESS")
        os.environ.update({"P11_KIT_SERVER_ADDRESS": f"unix:path={device.socket}"})
        yield device
        if before is None:
            del os.environ["P11_KIT_SERVER_ADDRESS"]
        else:
            os.environ["P11_KIT_SERVER_ADDRESS"] = before
