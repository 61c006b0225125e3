"""
Devices of one's own: inside the room's SoftHSM, or as a copy of one that was made before; and
clocks that can be moved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmtoll.app import App
from hsmtoll.hsm.module import PKCS11_LOCK, restart
from hsmtoll.settings import Settings
from hsmtoll.token import ClockReading
from tests.soak.measure import children

if TYPE_CHECKING:
    from hsmtoll.hsm.device import Device
    from hsmtoll.testing.softhsm import SoftHsm

PIN = "24681012"

_KEYS = r"""
import json, sys
import pkcs11
from pkcs11 import Attribute as A, KeyType

module, token, pin, keys = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
with pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    for number, (label, template) in enumerate(keys.items(), 0x40):
        asked = {A.SENSITIVE: True, A.EXTRACTABLE: False}
        asked |= {A[name]: value for name, value in template.items() if name in A.__members__}
        public, _ = session.generate_keypair(
            KeyType.RSA, template.get("bits", 2048), id=bytes([number]), label=label, store=True,
            private_template=asked,
        )
        if template.get("hidden"):
            public.destroy()
"""

_READ = r"""
import json, sys
import pkcs11
from pkcs11 import Attribute as A, ObjectClass

module, token, pin, label = sys.argv[1:5]
names = ("SENSITIVE", "EXTRACTABLE", "NEVER_EXTRACTABLE", "LOCAL", "SIGN", "DECRYPT", "UNWRAP",
         "SIGN_RECOVER", "DERIVE", "ALWAYS_AUTHENTICATE")
with pkcs11.lib(module).get_token(token_label=token).open(user_pin=pin) as session:
    (key,) = session.get_objects({A.CLASS: ObjectClass.PRIVATE_KEY, A.LABEL: label})
    (half,) = session.get_objects({A.CLASS: ObjectClass.PUBLIC_KEY, A.LABEL: label})
    attributes = {name: bool(key[A[name]]) for name in names}
    attributes |= {name: bool(half[A[name]]) for name in ("ENCRYPT", "WRAP", "VERIFY_RECOVER")}
    print(json.dumps(attributes))
"""


@dataclass(frozen=True)
class Lab:
    """One device by its label, behind a module that this process sees as well."""

    module: Path
    environment: dict[str, str]
    label: str

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A tool in a process of its own."""
        return subprocess.run(
            argv, env=self.environment, check=check, capture_output=True, text=True
        )

    def generate(self, **keys: dict[str, Any]) -> None:
        """Keys by label, with the template's exceptions."""
        spec = json.dumps(keys)
        self.run(sys.executable, "-c", _KEYS, str(self.module), self.label, PIN, spec)
        self.seen_anew()

    def attributes(self, label: str) -> dict[str, bool]:
        """What python-pkcs11 reads of a key pair, in a process of its own."""
        argv = (sys.executable, "-c", _READ, str(self.module), self.label, PIN, label)
        read: dict[str, bool] = json.loads(self.run(*argv).stdout)
        return read

    def listed(self) -> str:
        """All objects, as pkcs11-tool lists them."""
        argv = ("--module", str(self.module), "--token-label", self.label, "-O", "-l", "-p", PIN)
        return self.run("pkcs11-tool", *argv).stdout

    def seen_anew(self) -> None:
        """SoftHSM looks at its directory when it is initialised."""
        with PKCS11_LOCK.held(10):
            restart(self.module)

    def app(self, key: str, state: Path, **settings: Any) -> App:
        """An App for one key (or several, with blanks between) of this device."""
        hsm = {"module": self.module, "pin": PIN, **settings.pop("hsm", {})}
        uris = [f"pkcs11:token={self.label};object={each}" for each in key.split()]
        chosen = {
            "environment": "test",
            "identity": "eseal",
            "state": state,
            **settings,
            "hsm": {"key": uris, **hsm},
        }
        return App(Settings.model_validate(chosen))


def accepted(device: Device) -> bool:
    """Whether the device took the PIN, after a first question."""
    device.certificates()
    return device.pin_accepted


def free_port(*, together: int = 1) -> int:
    """
    A port of this machine on which nobody listens, and on the next ones of *together* neither.

    Below those that Linux deals out by itself: nobody is given it before it is used.
    """
    while True:
        first = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as tried:
            for port in range(first, first + together):
                tried.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def listens(path: Path) -> bool:
    """Whether somebody takes connections there: the socket's file is older than that."""
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(str(path)) == 0


def workers() -> list[int]:
    """The processes in which this one's devices are isolated."""
    found = []
    for each in children():
        # One may end while it is looked at.
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{each}/cmdline").read_bytes()
            if b"hsmtoll.hsm.worker" in line or b"hsmtoll.host.worker" in line:
                found.append(each)
    return found


def ended(pid: int) -> bool:
    """
    Whether the process has ended. In a container without an init nobody may ever ask for the exit
    code of one whose parent is gone: it stays in the table, as a zombie.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


_number = itertools.count(1)


def make_lab(module: Path, environment: dict[str, str], label: str) -> Lab:
    """
    A new, empty device in the directory that *environment* names. Its label begins with *label* and
    is its own: where a process runs the tests of a module in parts, their fixture is made again.
    """
    label = f"{label}-{next(_number)}"
    made = Lab(module, environment, label)
    made.run(
        "softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN,
        "--so-pin", "13579113",
    )  # fmt: skip
    made.seen_anew()
    return made


def copied(device: SoftHsm, directory: Path) -> SoftHsm:
    """A device with the keys, certificates, label and PIN of *device*, which nobody uses now."""
    shutil.copytree(device.directory, directory)
    made = replace(device, directory=directory, _commands=[])
    made.conf.write_text(made._configuration())
    return made


@dataclass
class MovedClock:
    """Seconds since the epoch, moved by hand."""

    wall: float
    boot: float = field(default=1000.0)

    def now(self) -> ClockReading:
        return ClockReading(self.wall, self.boot, "boot")

    def sleep(self, seconds: float) -> None:
        self.move(seconds)

    def move(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds
