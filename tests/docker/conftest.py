"""
The stack of docker/compose.yml, brought up by `docker compose` and by `docker-compose`.

The images are built from a copy of the files they are made of, so that nothing else of the tree
can matter, and with the machine's own CA certificates as a user behind a proxy would add theirs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Final

import pytest
from pytest_docker.plugin import DockerComposeExecutor

from hsmtoll.testing.docker import find_client
from tests.docker.containers import PREFIX, PROJECT, Stack, docker

MADE_OF: Final = ("docker", "hsmtoll", "pyproject.toml", "README.md", ".dockerignore")


@pytest.fixture(scope="session", autouse=True)
def _base_image(pytestconfig: pytest.Config) -> None:
    """The base that scripts/docker-engine made, where no registry answers."""
    variables = pytestconfig.rootpath / "docker" / ".env"
    if variables.is_file():
        found = re.search(r"^TOLL_BASE=(.+)$", variables.read_text("utf-8"), re.MULTILINE)
        if found:
            os.environ.setdefault("TOLL_BASE", found[1])


@pytest.fixture(scope="session")
def context(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the images are made of, with this machine's CA certificates beside it."""
    target = tmp_path_factory.mktemp("context")
    for name in MADE_OF:
        source = pytestconfig.rootpath / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    (target / "scripts").mkdir()
    shutil.copy2(pytestconfig.rootpath / "scripts/requirements-run.txt", target / "scripts")
    authorities = Path(ssl.get_default_verify_paths().openssl_cafile)
    debian = Path("/etc/ssl/certs/ca-certificates.crt")
    shutil.copy2(debian if debian.exists() else authorities, target / "docker" / "extra-ca.crt")
    return target


@pytest.fixture(scope="session")
def private_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the socket and the PIN lie: nobody else can enter."""
    folder = tmp_path_factory.mktemp("stack")
    folder.chmod(0o700)
    (folder / "p11").mkdir()
    # The containers' user is another one.
    (folder / "p11").chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def pin(private_folder: Path) -> str:
    """The PIN of the device: random, so that finding it anywhere means something."""
    value = secrets.token_hex(10)
    for name, mode in (("pin", 0o600), ("pin-of-the-container", 0o644)):
        path = private_folder / name
        path.touch()
        path.chmod(mode)
        path.write_text(value, "ascii")
    return value


@pytest.fixture(scope="session", params=["docker compose", "docker-compose"])
def docker_compose_command(request: pytest.FixtureRequest, context: Path) -> str:
    """Both of them; what a room needs and misses is a failure, not a skip."""
    command: str = request.param
    if command == "docker-compose":
        # Version 1 does not know the key; the files say to delete it.
        for path in (context / "docker").glob("compose*.yml"):
            text = path.read_text("utf-8")
            path.write_text(re.sub(r"^name: .*\n", "", text, flags=re.MULTILINE), "utf-8")
    done = subprocess.run([*command.split(), "version"], capture_output=True, check=False)
    assert done.returncode == 0, f"{command} does not run: scripts/docker-engine start installs it"
    return command


@pytest.fixture(scope="session")
def docker_compose_file(context: Path) -> list[str]:
    """What users have, and what the tests change of it."""
    return [str(context / "docker" / name) for name in ("compose.yml", "compose.test.yml")]


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    """The same each time, so that a run cleans up after one that was killed."""
    return PROJECT


@pytest.fixture(scope="session")
def docker_setup(private_folder: Path, pin: str) -> list[str]:
    """Only the cleaning: pytest-docker runs this outside of its try, so nothing may start here."""
    assert pin
    os.environ["TOLL_IMAGE_PREFIX"] = PREFIX
    os.environ["TOLL_P11_DIR"] = str(private_folder / "p11")
    os.environ["TOLL_PIN_FILE"] = str(private_folder / "pin-of-the-container")
    return ["down --volumes --remove-orphans"]


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    """With what was given up, too."""
    return ["down --volumes --remove-orphans"]


@pytest.fixture(scope="session")
def stack(
    docker_services: object,  # noqa: ARG001 -- its end removes what is started here
    docker_compose_command: str,
    docker_compose_file: list[str],
    private_folder: Path,
    pin: str,
) -> Stack:
    """The advertised command has run to its end; the device and the services are up again."""
    compose = DockerComposeExecutor(docker_compose_command, docker_compose_file, PROJECT)
    log: bytes = compose.execute("up --build --exit-code-from app")
    # What services say in their last moment may miss the terminal of a command that is ending.
    log += compose.execute("logs --no-color")
    made = Stack(compose, private_folder, pin, log.decode())
    made.do("up -d softhsm sandbox")
    made.wait_healthy("softhsm", "sandbox")
    return made


@pytest.fixture(scope="session")
def images(context: Path) -> dict[str, str]:
    """The images by their short names, built by whatever builder this client has."""
    made = {}
    for target in ("softhsm", "hsmtoll", "sandbox", "sbom"):
        name = target if target == "hsmtoll" else f"hsmtoll-{target}"
        tag = f"{PREFIX}{name}:classic"
        docker(
            *("build", "-q", "-f", str(context / "docker" / "Dockerfile")),
            *("--target", target, "-t", tag, "--build-arg", "TOLL_BASE", str(context)),
        )
        made[name] = tag
    return made


@pytest.fixture
def host_environ(stack: Stack, tmp_path: Path) -> dict[str, str]:
    """The variables of a program of this machine that signs on the container's device."""
    kept = {n: v for n, v in os.environ.items() if not n.upper().startswith("HSMTOLL_")}
    return {
        **kept,
        "P11_KIT_SERVER_ADDRESS": f"unix:path={stack.socket}",
        "HSMTOLL_ENVIRONMENT": "sandbox",
        "HSMTOLL_ENDPOINTS__ISSUER": "https://sandbox:8443/",
        "HSMTOLL_ENDPOINTS__TOKEN": "https://sandbox:8443/token",
        "HSMTOLL_ENDPOINTS__CUSTOMS": "https://sandbox:8444",
        "HSMTOLL_IDENTITY": "eseal",
        "HSMTOLL_HSM__MODULE": str(find_client()),
        "HSMTOLL_HSM__KEY": "pkcs11:token=toll;object=eseal",
        "HSMTOLL_HSM__PIN_FILE": str(stack.folder / "pin"),
        "HSMTOLL_STATE": str(tmp_path / "state"),
    }
