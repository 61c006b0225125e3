"""
The folder is the room; a room asked for by name never skips; nobody's settings reach a test.

``TOLL_ROOMS`` names the rooms that were asked for, as `scripts/test` sets it. In those a missing
tool ends the run before it begins, and a skip, or a failure that is expected, fails it. The tests
marked ``needs_root`` are the exception: without root, or what root needs for them, they skip
everywhere. With pytest-xdist the rules hold in the process that reports.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import hypothesis
import pytest

from tests.kit.accounts import NEEDS_ROOT, is_root

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE: Final = Path(__file__).parent
ASKED_FOR: Final = frozenset(os.environ.get("TOLL_ROOMS", "").split())

#: What a room cannot do without: the tool, and Debian's package that brings it.
NEEDS: Final = {
    "protocol": {"softhsm2-util": "softhsm2"},
    "softhsm": {"softhsm2-util": "softhsm2", "pkcs11-tool": "opensc", "openssl": "openssl"},
    "security": {"softhsm2-util": "softhsm2"},
    "docker": {"docker": "docker.io"},
    "modules": {"pkcs11-tool": "opensc"},
    "host": {"softhsm2-util": "softhsm2", "systemd-analyze": "systemd"},
}

#: Variables that change what our code, or the libraries under it, would do.
_PROXIES: Final = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})
_CERTIFICATES: Final = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"})
_OTHERS: Final = _CERTIFICATES | frozenset(
    {
        "SSLKEYLOGFILE",
        "SOFTHSM2_CONF", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC",
    }
)  # fmt: skip

#: Where a user's files live.
_HOMES: Final = {
    "HOME": "", "XDG_CONFIG_HOME": ".config", "XDG_STATE_HOME": ".local/state",
    "XDG_CACHE_HOME": ".cache", "XDG_DATA_HOME": ".local/share", "XDG_RUNTIME_DIR": "run",
}  # fmt: skip

_skips = pytest.StashKey[list[str]]()
_home = pytest.StashKey[Path]()
_index = pytest.StashKey[dict[str, str]]()


def room_of(path: Path) -> str | None:
    """The folder below tests/ that *path* lies in; ``None`` for what lies beside the rooms."""
    inside = path.relative_to(HERE).parts if path.is_relative_to(HERE) else ()
    return inside[0] if len(inside) > 1 else None


def is_ours(name: str) -> bool:
    """Whether a variable of the environment would reach what is tested."""
    return name.upper().startswith("HSMTOLL_") or name.upper() in _PROXIES | _OTHERS


def pytest_configure(config: pytest.Config) -> None:
    """Before any fixture runs: no variables of the user, and a home that is thrown away."""
    config.addinivalue_line("markers", f"needs_root: {NEEDS_ROOT}")
    # How long an example takes says something about the machine.
    hypothesis.settings.register_profile(
        "any-load", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any-load")
    config.stash[_skips] = []
    # A worker of pytest-xdist begins in the home that its controller made.
    given = getattr(config, "workerinput", {})
    config.stash[_index] = given.get("package_index") or _package_index()
    for room in ASKED_FOR:
        if missing := _missing(room):
            raise pytest.UsageError(f"room {room} was asked for, and misses {missing}")
    for name in [name for name in os.environ if is_ours(name)]:
        del os.environ[name]
    # The engine's own client looks for its plugins and contexts in the real home.
    os.environ.setdefault("DOCKER_CONFIG", str(Path.home() / ".docker"))
    home = Path(tempfile.mkdtemp(prefix="hsmtoll-tests-"))
    config.stash[_home] = home
    os.environ.update(_homes(home))
    # What was started in the background ignores Ctrl-C, and hands that on to all its processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    # What tools print, and how they encode it, is compared here and there.
    os.environ.pop("LANGUAGE", None)
    os.environ["LC_ALL"] = "C.UTF-8"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What a worker of pytest-xdist is told by its controller."""
    node.workerinput["package_index"] = node.config.stash[_index]


def _missing(room: str) -> str:
    """What the room cannot do without and this machine has not, and how to get it; or nothing."""
    needs = NEEDS.get(room, {})
    tools = [tool for tool in needs if shutil.which(tool) is None]
    packages = " ".join(needs[tool] for tool in tools)
    return f"{', '.join(tools)} (apt-get install {packages})" if tools else ""


def _package_index() -> dict[str, str]:
    """Variables with which pip, in any home, uses the index and the cache of this user."""
    home = Path.home()
    files = [home / ".config/pip/pip.conf", home / ".pip/pip.conf"]
    config = next((str(each) for each in files if each.is_file()), None)
    used = {
        name: value
        for name, value in os.environ.items()
        if name.upper().startswith("PIP_") or name.upper() in _PROXIES | _CERTIFICATES
    }
    return {
        "PIP_CACHE_DIR": str(home / ".cache/pip"),
        **({"PIP_CONFIG_FILE": config} if config else {}),
        **used,
    }


@pytest.fixture(scope="session")
def package_index(pytestconfig: pytest.Config) -> dict[str, str]:
    """Variables for a process that installs packages: what was set before the tests began."""
    return pytestconfig.stash[_index]


def pytest_unconfigure(config: pytest.Config) -> None:
    """The home goes."""
    if _home in config.stash:
        shutil.rmtree(config.stash[_home], ignore_errors=True)


def _homes(home: Path) -> dict[str, str]:
    for below in _HOMES.values():
        (home / below).mkdir(mode=0o700, parents=True, exist_ok=True)
    return {name: str(home / below) for name, below in _HOMES.items()}


@pytest.fixture(autouse=True)
def _environment_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each test begins with no settings, no refused PINs and no tokens of anybody."""
    # What a fixture of a wider scope set for its device stays: SOFTHSM2_CONF is read but once.
    for name in [name for name in os.environ if is_ours(name) and name != "SOFTHSM2_CONF"]:
        monkeypatch.delenv(name)
    for name, value in _homes(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)


def pytest_report_header() -> list[str]:
    """What ran this, for the log of a machine that is gone."""
    packages = ("python-pkcs11", "asn1crypto", "cryptography", "httpx", "pydantic-settings")
    module = Path("/usr/lib/softhsm/libsofthsm2.so")
    return [
        f"hsmtoll {version('hsmtoll')}, {platform.platform()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        f"module {module}" + ("" if module.exists() else " (not installed)"),
        f"rooms asked for: {' '.join(sorted(ASKED_FOR)) or 'none by name'}",
    ]


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what needs a tool that is missing, in a room that nobody asked for by name."""
    missing = {room: _missing(room) for room in NEEDS}
    for item in items:
        if item.get_closest_marker("needs_root") and not is_root():
            item.add_marker(pytest.mark.skip(reason=NEEDS_ROOT))
        if reason := missing.get(room_of(item.path) or ""):
            item.add_marker(pytest.mark.skip(reason=f"missing: {reason}"))


class _NoSkips:
    """Collects what did not run in a room that was asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self._skips = config.stash[_skips]
        self._root = config.rootpath

    def _note(self, nodeid: str, reason: object) -> None:
        room = room_of(self._root / nodeid.partition("::")[0])
        if room in ASKED_FOR and NEEDS_ROOT not in str(reason):
            self._skips.append(f"{nodeid}: {reason}")

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            expected = getattr(report, "wasxfail", None)
            self._note(report.nodeid, expected if expected is not None else report.longreprtext)

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report.nodeid, report.longreprtext)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start to count what does not run."""
    session.config.pluginmanager.register(_NoSkips(session.config), "hsmtoll-no-skips")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skip in a room that was asked for is a failure of the run."""
    if session.config.stash[_skips] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name what did not run."""
    if not config.stash[_skips]:
        return
    terminalreporter.section("did not run in a room that was asked for", red=True)
    for line in config.stash[_skips]:
        terminalreporter.line(line)
