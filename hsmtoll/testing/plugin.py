"""
pytest fixtures for projects that use hsmtoll: a device, identities, services, a client.

Every pytest run in an environment with hsmtoll loads this module, so nothing but pytest is
imported before a fixture is used. All fixtures have the prefix ``toll_``.

A device is created once per session with a random label in pytest's own temporary directory, so
parallel workers (pytest-xdist) have one each. `toll_softhsm` sets SOFTHSM2_CONF for the session and
restores it at the end; a module that the process has loaded before is initialised again, which
ends its sessions.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Final

import pytest

from hsmtoll.errors import install_extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.client import TollClient
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings
    from hsmtoll.testing.clock import SettableClock
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity
    from hsmtoll.testing.softhsm import SoftHsm

#: Variables that define identity, device and services: those of the user's shell are removed.
_WHO: Final = re.compile(
    r"HSMTOLL_(HSM__(?!ISOLATION|ALLOW)|SIGNER__|ENDPOINTS__"
    r"|(ENVIRONMENT|IDENTITY|ISS|KID|PROFILE|CONSUMER_ORG|RESOURCE)$)",
    re.IGNORECASE,
)


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest-docker is installed, offer `toll_softhsm_docker` as well."""
    if config.pluginmanager.hasplugin("docker"):
        from hsmtoll.testing import docker

        config.pluginmanager.register(docker, "hsmtoll-docker")


@contextlib.contextmanager
def _sandbox_extra() -> Iterator[None]:
    """Fail the test with a hint if an import within needs the extra `sandbox`."""
    try:
        yield
    except ImportError as exc:
        if exc.name != "aiohttp":
            raise
        pytest.fail(
            f"the sandbox's server is not installed: {install_extra('sandbox')}", pytrace=False
        )


@pytest.fixture(scope="session")
def toll_softhsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    """A SoftHSM device of this session's own, empty."""
    from hsmtoll.testing.softhsm import SoftHsm

    device = SoftHsm.create(tmp_path_factory.mktemp("toll") / "softhsm")
    before = os.environ.get("SOFTHSM2_CONF")
    os.environ["SOFTHSM2_CONF"] = str(device.conf)
    _reinitialize(device.module)
    yield device
    if before is None:
        del os.environ["SOFTHSM2_CONF"]
    else:
        os.environ["SOFTHSM2_CONF"] = before


@pytest.fixture(scope="session")
def _toll_shim(toll_softhsm: SoftHsm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    from hsmtoll.testing.faults import Faults

    with Faults(toll_softhsm.module, tmp_path_factory.mktemp("toll") / "faults") as faults:
        yield faults


@pytest.fixture
def toll_faults(_toll_shim: Faults, toll_softhsm: SoftHsm) -> Iterator[Faults]:
    """
    Faults of the device by name, and counts of what it was asked, from zero for each test.

    `toll_settings` and `toll_client` use the shim as their module in a test with this fixture.
    """
    # One library under two names: end the use of one before the other is used.
    _reinitialize(toll_softhsm.module)
    toll_softhsm.settle()
    _toll_shim.reset_counts()
    yield _toll_shim
    _toll_shim.clear()
    _reinitialize(_toll_shim.module)


@pytest.fixture(scope="session")
def toll_eseal(toll_softhsm: SoftHsm) -> TemporaryIdentity:
    """A foreign business with an eSeal: key, chain of three and an unrelated CA on the device."""
    with _sandbox_extra():
        from hsmtoll.testing.identity import eseal

    return eseal(toll_softhsm)


@pytest.fixture(scope="session")
def toll_norwegian(toll_softhsm: SoftHsm) -> TemporaryIdentity:
    """A Norwegian business with an enterprise certificate for test."""
    with _sandbox_extra():
        from hsmtoll.testing.identity import norwegian

    return norwegian(toll_softhsm)


@pytest.fixture
def toll_clock() -> SettableClock:
    """A clock that stands still until a test advances it, for the client and the services."""
    from hsmtoll.testing.clock import SettableClock

    return SettableClock.at_real_time()


@pytest.fixture
def toll_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """
    A strict Maskinporten and Customs on free ports of this machine.

    It trusts and knows the identities that the test requests as fixtures. If the test requests
    `toll_clock` as well, that is its clock.
    """
    with _sandbox_extra():
        from hsmtoll.sandbox.server import Sandbox
        from hsmtoll.testing.identity import TemporaryIdentity, register_identity

    clock = time.time
    if "toll_clock" in request.fixturenames:
        settable: SettableClock = request.getfixturevalue("toll_clock")

        def clock() -> float:
            return settable.now().wall

    with Sandbox(clock=clock) as sandbox:
        for name in ("toll_eseal", "toll_norwegian"):
            if name in request.fixturenames:
                known = request.getfixturevalue(name)
                assert isinstance(known, TemporaryIdentity)
                register_identity(sandbox, known)
        yield sandbox


@pytest.fixture
def toll_settings(
    toll_eseal: TemporaryIdentity,
    toll_sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Settings:
    """Settings of the eSeal at the sandbox, and the same as environment variables."""
    from hsmtoll.settings import load

    toll_eseal.device.settle()
    variables = {
        **toll_eseal.environ(),
        **toll_sandbox.environ(),
        # Nothing of a configuration file or of another identity that this machine has.
        "HSMTOLL_CONFIG": os.devnull,
        "HSMTOLL_PROFILE": "",
        "HSMTOLL_STATE": str(tmp_path / "toll-state"),
    }
    if "toll_faults" in request.fixturenames:
        variables |= request.getfixturevalue("toll_faults").environ()
    # A shell may spell them in small letters, and one in two spellings is refused.
    for name in [each for each in os.environ if _WHO.match(each) or each.upper() in variables]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load()


@pytest.fixture
def toll_client(toll_settings: Settings, request: pytest.FixtureRequest) -> Iterator[TollClient]:
    """A connected client: `toll_client.token("road")` signs on the device."""
    from hsmtoll.app import App

    app = App(toll_settings)
    if "toll_clock" in request.fixturenames:
        app.clock = request.getfixturevalue("toll_clock")
    with app.client() as client:
        yield client


def _reinitialize(module: Path) -> None:
    """Reinitialize *module*, if this process has used it, so that it reads SOFTHSM2_CONF again."""
    import sys

    if "hsmtoll.hsm.module" in sys.modules:
        from hsmtoll.hsm.module import PKCS11_LOCK, _restarted_at, restart

        with PKCS11_LOCK.held(60):
            restart(module)
            # Restarts in earlier tests must not delay a restart in this one.
            _restarted_at.clear()
