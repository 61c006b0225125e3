"""
The units of the signing host under a systemd that runs: `scripts/soak units`.

A container with systemd as its first process, SoftHSM as the device. Not one of the rooms: it needs
an engine that gives CAP_SYS_ADMIN, which few machines that test have.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.docker.conftest import context, images  # noqa: F401 - fixtures
from tests.docker.containers import docker, run_docker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

_IMAGE = """
FROM {base}
USER root
ENV PATH=/opt/hsmtoll/bin:/usr/sbin:/usr/bin:/sbin:/bin HSMTOLL_STATE= container=docker
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    systemd systemd-sysv softhsm2 openssl passwd procps && rm -rf /var/lib/apt/lists/*
RUN groupadd --system hsmtoll-callers \
 && useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin -G softhsm hsmtoll \
 && useradd --uid 1001 -G hsmtoll-callers caller && useradd --uid 1002 outsider
COPY units /etc/systemd/system/
COPY first /first
ENTRYPOINT ["/bin/sh", "/first"]
CMD []
HEALTHCHECK NONE
"""
_FIRST = """
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount --make-rshared / && exec /lib/systemd/systemd
"""
_DROP_IN = """
[Service]
# SoftHSM's device is a directory, and it writes there at a login.
ReadWritePaths=/var/lib/softhsm/tokens
"""
_SETTINGS = """
[hsm]
module = "/usr/lib/softhsm/libsofthsm2.so"
[host]
socket = "/run/hsmtoll/host.sock"
policy = "/etc/hsmtoll/policy.toml"
"""
_POLICY = """
[profile.acme]
environment = "sandbox"
identity = "norwegian"
iss = "5c0f7e9e-6f3c-4f59-8f0e-1f9a6f7d1b2a"
kid = "thumbprint"
[profile.acme.endpoints]
issuer = "https://sandbox:8443/"
token = "https://sandbox:8443/token"
customs = "https://sandbox:8444"
[profile.acme.hsm]
key = "pkcs11:token=customs;object=acme"
[caller."uid:1001"]
profile.acme = { scopes = ["road"], mode = ["grant"], per_minute = 60, per_day = 500 }
"""
_PIN = "4711471147"
_SETUP = f"""
set -eu
umask 077
mkdir -p /etc/hsmtoll/secret && chmod 0755 /etc/hsmtoll
printf {_PIN} > /etc/hsmtoll/secret/pin
openssl genpkey -algorithm ed25519 -out /etc/hsmtoll/secret/audit.key
openssl pkey -in /etc/hsmtoll/secret/audit.key -pubout -out /etc/hsmtoll/audit.pub
install -d -o hsmtoll -g hsmtoll -m 0700 /var/lib/softhsm/tokens
install -o hsmtoll -m 0400 /etc/hsmtoll/secret/pin /tmp/pin
chmod 0644 /etc/hsmtoll/*.toml
as_host() {{ setpriv --reuid hsmtoll --regid hsmtoll --init-groups "$@"; }}
cd /
as_host softhsm2-util --init-token --free --label customs --pin {_PIN} --so-pin 12345678
as_host env HSMTOLL_STATE=/tmp/first HSMTOLL_ENVIRONMENT=sandbox HSMTOLL_IDENTITY=norwegian \
    HSMTOLL_HSM__MODULE=/usr/lib/softhsm/libsofthsm2.so HSMTOLL_HSM__PIN_FILE=/tmp/pin \
    HSMTOLL_HSM__KEY='pkcs11:token=customs;object=acme' hsmtoll key generate
rm -r /tmp/pin /tmp/first
systemctl daemon-reload
systemctl enable --now hsmtoll-host.socket hsmtoll-host.service
"""
_CALLER = (
    *("HSMTOLL_ENVIRONMENT=sandbox", "HSMTOLL_IDENTITY=norwegian", "HSMTOLL_KID=thumbprint"),
    "HSMTOLL_ISS=5c0f7e9e-6f3c-4f59-8f0e-1f9a6f7d1b2a",
    "HSMTOLL_ENDPOINTS__ISSUER=https://sandbox:8443/",
    "HSMTOLL_ENDPOINTS__TOKEN=https://sandbox:8443/token",
    "HSMTOLL_ENDPOINTS__CUSTOMS=https://sandbox:8444",
    "HSMTOLL_SIGNER__URL=unix:///run/hsmtoll/host.sock",
    *("HSMTOLL_SIGNER__PROFILE=acme", "HSMTOLL_SIGNER__MODE=grant"),
)
_NAME = "hsmtoll-tests-systemd"


class Machine:
    """The container, as somebody at its console."""

    def do(self, *argv: str) -> str:
        """A command of root's that works."""
        return docker("exec", _NAME, *argv)

    def runs(self) -> bool:
        """Whether systemd has started all that it was to start."""
        done = run_docker("exec", _NAME, "systemctl", "is-system-running")
        return done.stdout.strip() == "running"

    def sign(self, account: str = "caller") -> tuple[int, str]:
        """``hsmtoll sign road`` of another account: the exit code, and all that it said."""
        home = f"/home/{account}"
        become = ("setpriv", "--reuid", account, "--regid", account, "--init-groups")
        self.do("install", "-d", "-o", account, home)
        asked = ("env", f"HOME={home}", *_CALLER, "hsmtoll", "sign", "road")
        done = run_docker("exec", "-w", "/", _NAME, *become, *asked)
        return done.returncode, done.stdout + done.stderr

    def status(self, unit: str = "hsmtoll-host.service") -> dict[str, str]:
        """What systemd knows of a unit."""
        shown = self.do("systemctl", "show", unit).splitlines()
        return dict(line.split("=", 1) for line in shown if "=" in line)


@pytest.fixture(scope="module")
def machine(
    images: dict[str, str],  # noqa: F811 - the fixture
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machine]:
    """A running one, with the service enabled and started."""
    folder = tmp_path_factory.mktemp("systemd")
    for unit in (pytestconfig.rootpath / "hsmtoll" / "host" / "systemd").iterdir():
        _write(folder / "units" / unit.name, unit.read_text("utf-8"))
    _write(folder / "units" / "hsmtoll-host.service.d" / "softhsm.conf", _DROP_IN)
    _write(folder / "first", _FIRST)
    _write(folder / "Dockerfile", _IMAGE.format(base=images["hsmtoll"]))
    docker("build", "-q", "-t", f"{_NAME}:latest", str(folder))
    run_docker("rm", "-f", _NAME)
    free = ("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined")
    docker(
        *("run", "-d", "--name", _NAME, "--cap-add", "SYS_ADMIN", *free),
        *("--cgroupns", "private", "--tmpfs", "/run:exec", f"{_NAME}:latest"),
    )
    made = Machine()
    try:
        eventually(made.runs)
        for name, text in (("hsmtoll.toml", _SETTINGS), ("policy.toml", _POLICY)):
            _write(folder / "etc" / name, text)
        docker("cp", f"{folder}/etc/.", f"{_NAME}:/etc/hsmtoll")
        made.do("sh", "-c", _SETUP)
        yield made
    finally:
        run_docker("rm", "-f", _NAME)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")


def eventually(happens: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until it is so."""
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_the_service_is_up_under_its_own_account_and_has_the_pin_nowhere(machine: Machine) -> None:
    status = machine.status()
    assert (status["ActiveState"], status["StatusText"]) == ("active", "signing")
    environment = machine.do("cat", f"/proc/{status['MainPID']}/environ")
    assert "HSMTOLL_HSM__PIN_FILE=/run/credentials/" in environment
    assert _PIN not in environment
    owner = machine.do("ps", "-o", "user=", "-p", status["MainPID"])
    assert owner.strip() == "hsmtoll"
    assert _PIN not in machine.do("journalctl", "--no-pager")


def test_a_member_of_the_group_is_served_and_an_outsider_is_not(machine: Machine) -> None:
    code, output = machine.sign()
    assert (code, output.count(".")) == (0, 2), output
    code, output = machine.sign("outsider")
    assert code != 0
    assert "this account may not open its socket" in output


def test_stop_and_reload_are_obeyed_and_a_broken_policy_is_not(machine: Machine) -> None:
    settings = ("hsmtoll", "--config", "/etc/hsmtoll/hsmtoll.toml")
    machine.do(*settings, "stop")
    assert "403" in machine.sign()[1]
    machine.do(*settings, "resume")
    machine.do("sh", "-c", "echo x >> /etc/hsmtoll/policy.toml; systemctl reload hsmtoll-host")
    assert "old policy kept" in machine.status()["StatusText"]
    assert machine.sign()[0] == 0
    machine.do("sh", "-c", "sed -i '$d' /etc/hsmtoll/policy.toml; systemctl reload hsmtoll-host")
    assert machine.status()["StatusText"] == "signing"


def test_the_first_caller_wakes_a_service_that_was_not_running(machine: Machine) -> None:
    machine.do("systemctl", "stop", "hsmtoll-host.service")
    assert machine.status()["ActiveState"] == "inactive"
    code, output = machine.sign()
    assert code == 0, output
    eventually(lambda: machine.status()["ActiveState"] == "active")


def test_it_is_back_after_it_was_killed_and_the_audit_goes_on(machine: Machine) -> None:
    before = machine.status()["MainPID"]
    machine.do("systemctl", "kill", "-s", "KILL", "hsmtoll-host.service")
    eventually(lambda: machine.status()["MainPID"] not in (before, "0"))
    eventually(lambda: machine.sign()[0] == 0)
    verify = ("hsmtoll", "audit", "verify", "--public-key", "/etc/hsmtoll/audit.pub")
    assert "as they were written" in machine.do(*verify, "/var/lib/hsmtoll/audit")
