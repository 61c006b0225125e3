"""The fixture that other projects use: a device in a container, and an identity on it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hsmtoll.sandbox import Sandbox
from hsmtoll.testing.identity import eseal, register_identity

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.testing.docker import DockerSoftHsm


@pytest.mark.timeout(600)  # the first use builds the image
def test_an_identity_on_the_containers_device_gets_its_200(
    toll_softhsm_docker: DockerSoftHsm, tmp_path: Path
) -> None:
    known = eseal(toll_softhsm_docker)
    with Sandbox() as sandbox:
        environ = {
            **os.environ,
            **known.environ(),
            **sandbox.environ(),
            "HSMTOLL_STATE": str(tmp_path / "state"),
            # Files would remember the refusal that comes first.
            "HSMTOLL_CACHE": "memory:",
        }
        command = [sys.executable, "-m", "hsmtoll", "test-auth", "road"]
        # The control: the sandbox does not believe everybody.
        assert subprocess.run(command, env=environ, check=False, timeout=60).returncode == 60
        register_identity(sandbox, known)
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stdout) == (0, "200 OK\n"), done.stderr
