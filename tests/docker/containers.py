"""
What the tests of this room do with containers: commands, waiting, and the stack as a value.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_docker.plugin import DockerComposeExecutor

PREFIX: Final = "hsmtoll-tests/"
PROJECT: Final = "hsmtoll-tests"
IMAGES: Final = ("hsmtoll", "hsmtoll-sandbox", "hsmtoll-softhsm")


def docker(*arguments: str, check: bool = True, stdin: str | None = None) -> str:
    """What a docker command says on stdout; with *check*, it must have succeeded."""
    done = run_docker(*arguments, stdin=stdin)
    assert not check or done.returncode == 0, f"docker {arguments}: {done.stderr}"
    return done.stdout.strip()


def run_docker(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """A docker command, however it ends."""
    # The classic builder: the one that every client has, with or without plugins.
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    return subprocess.run(
        ["docker", *arguments],
        input=stdin,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@dataclass(frozen=True, slots=True)
class Stack:
    """
    The running services. *log* is what the advertised command printed, down to its end, and what
    Docker has of its services.
    """

    compose: DockerComposeExecutor
    folder: Path
    pin: str
    log: str

    def do(self, subcommand: str) -> str:
        """A compose command; an Exception with its output where it fails."""
        output: bytes = self.compose.execute(subcommand)
        return output.decode()

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.do(f"ps -q {service}").strip().splitlines()[-1]

    def wait_healthy(self, *services: str) -> None:
        """Until Docker calls them healthy; v1 has no `--wait`."""
        for service in services:
            wait_for(self.container(service), "healthy")

    @property
    def socket(self) -> Path:
        """The device's, on this machine."""
        return self.folder / "p11" / "pkcs11.sock"


def wait_for(container: str, health: str) -> None:
    """Until a container's health is *health*."""
    seen = ""
    for _ in range(300):
        seen = docker("inspect", "--format", "{{.State.Health.Status}}", container)
        if seen == health:
            return
        time.sleep(0.2)
    pytest.fail(f"{container} is {seen}, not {health}:\n{docker('logs', container)}")
