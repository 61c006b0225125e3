"""A throw-away SoftHSM for the device room's own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.module import PKCS11_LOCK, restart
from hsmtoll.hsm.pin import Pin, PinSource, PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.testing.faults import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.jws import RsaPublicKey

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
#: Processes, or rounds, of a test that has a crowd of them; with scripts/soak there are twenty.
CROWD = int(os.environ.get("TOLL_SOAK_CROWD", "5"))
SPY = Path("/usr/lib/x86_64-linux-gnu/pkcs11/pkcs11-spy.so")

# In a process of its own: this one initialises SoftHSM only when a test does.
_PROVISION = r"""
import sys
import pkcs11
from pkcs11 import Attribute as A, CertificateType, KeyType, MechanismFlag, ObjectClass

lib = pkcs11.lib(sys.argv[1])
rigid = {A.SENSITIVE: True, A.EXTRACTABLE: False}
loose = {A.SENSITIVE: False, A.EXTRACTABLE: True}


def pair(session, label, id, template=rigid, bits=2048, public=True):
    pub, key = session.generate_keypair(
        KeyType.RSA, bits, id=id, label=label, store=True, private_template=dict(template)
    )
    if not public:
        pub.destroy()
    return key


with lib.get_token(token_label="lab").open(rw=True, user_pin="1234") as session:
    pair(session, "acme", b"\x01")
    pair(session, "twin", b"\x02")
    pair(session, "twin", b"\x03")
    pair(session, "loose", b"\x04", loose)
    pair(session, "small", b"\x05", bits=1024)
    pair(session, "nopublic", b"\x06", public=False)
    pair(session, "always", b"\x07", {**rigid, A.ALWAYS_AUTHENTICATE: True})
    pair(session, "nosign", b"\x08", {**rigid, A.SIGN: False})
    curve = session.create_domain_parameters(
        KeyType.EC, {A.EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}, local=True
    )
    curve.generate_keypair(id=b"\x09", label="curve", store=True, private_template=dict(rigid))
    made = session.generate_keypair(
        KeyType.RSA, 2048, id=b"\x0b", label="source", store=False, private_template=dict(loose),
        public_template={A.TOKEN: False},
    )
    value = {
        a: made[1][a]
        for a in (
            A.MODULUS, A.PUBLIC_EXPONENT, A.PRIVATE_EXPONENT, A.PRIME_1, A.PRIME_2, A.EXPONENT_1,
            A.EXPONENT_2, A.COEFFICIENT,
        )
    }
    session.create_object(
        {
            A.CLASS: ObjectClass.PRIVATE_KEY, A.KEY_TYPE: KeyType.RSA, A.TOKEN: True,
            A.PRIVATE: True, A.LABEL: "imported", A.ID: b"\x0a", A.SIGN: True, **rigid, **value,
        }
    )
    huge = b"\x30\x83\x01\x11\x70" + bytes(70000)
    for label, der in (("leaf", b"\x30\x03\x02\x01\x01"), ("huge", huge)):
        session.create_object(
            {
                A.CLASS: ObjectClass.CERTIFICATE, A.CERTIFICATE_TYPE: CertificateType.X_509,
                A.TOKEN: True, A.PRIVATE: False, A.LABEL: label, A.ID: b"\x01", A.VALUE: der,
                A.SUBJECT: b"\x30\x00",
            }
        )
"""


@dataclass(frozen=True)
class DeviceSoftHsm:
    """The module, its configuration and a device 'lab' with PIN 1234."""

    folder: Path
    module: Path = SOFTHSM
    pin: str = "1234"

    def copy(self, folder: Path) -> DeviceSoftHsm:
        """The same device in another directory; nobody uses this one meanwhile."""
        shutil.copytree(self.folder / "tokens", folder / "tokens")
        return _configured(folder)

    @property
    def environment(self) -> dict[str, str]:
        """What a process of its own needs to see this device."""
        return {**os.environ, "SOFTHSM2_CONF": str(self.folder / "softhsm2.conf")}

    def device(
        self,
        key: str,
        state: Path,
        *,
        pin: PinSource | str | None = "1234",
        module: Path | None = None,
        signing_pin: PinSource | None = None,
        public_key: RsaPublicKey | None = None,
        allow_exportable_key: bool = False,
    ) -> InProcessDevice:
        """A device for one key (path attributes without the device's) of this one."""
        return InProcessDevice(
            DeviceSettings(
                module or self.module,
                KeyUri.parse(f"pkcs11:token=lab;{key}"),
                public_key=public_key,
                allow_exportable_key=allow_exportable_key,
            ),
            # As typed: other tests of the room give wrong ones, and the device counts them.
            pin=PinValue(Pin(pin, source="a test", typed=True)) if isinstance(pin, str) else pin,
            signing_pin=signing_pin,
            pin_log=PinLog(state),
        )

    def util(self, *arguments: str) -> None:
        """softhsm2-util, on this device's directory."""
        subprocess.run(
            ["softhsm2-util", *arguments], env=self.environment, check=True, capture_output=True
        )

    def python(self, program: str, *arguments: str) -> None:
        """A program in a process of its own."""
        argv = [sys.executable, "-c", program, str(self.module), *arguments]
        subprocess.run(argv, env=self.environment, check=True)


def _configured(folder: Path) -> DeviceSoftHsm:
    (folder / "softhsm2.conf").write_text(
        f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    return DeviceSoftHsm(folder)


def make_softhsm(folder: Path) -> DeviceSoftHsm:
    """A device directory with the token 'lab', still empty."""
    (folder / "tokens").mkdir(parents=True, mode=0o700)
    made = _configured(folder)
    made.util("--init-token", "--free", "--label", "lab", "--pin", made.pin, "--so-pin", "56785678")
    return made


_BETWEEN = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long word;
typedef struct { word type; void *value; word length; } attribute;
typedef struct { unsigned char version[2]; void *functions[68]; } list;
static list ours, *real;
%(code)s
word C_GetFunctionList(list **out) {
    void *library = dlopen("%(module)s", RTLD_NOW);
    ((word (*)(list **))dlsym(library, "C_GetFunctionList"))(&real);
    ours = *real;
    %(replaced)s
    *out = &ours;
    return 0;
}
"""


def stand_between(folder: Path, code: str, **functions: str) -> Path:
    """
    A module of our own before SoftHSM, in a directory that only we can change: *functions*
    (``C_Sign="sign"``) are those of the C *code*, which finds the others in ``real``.
    """
    folder.mkdir(mode=0o700)
    source, module = folder / "between.c", folder / "between.so"
    replaced = " ".join(
        f"ours.functions[{FUNCTIONS.index(name)}] = {ours};" for name, ours in functions.items()
    )
    source.write_text(_BETWEEN % {"code": code, "module": SOFTHSM, "replaced": replaced})
    subprocess.run(["cc", "-shared", "-fPIC", "-o", module, source, "-ldl"], check=True)
    return module


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A device that is not there at first is waited for, because another process may be logging in
    to it. To a device of this process nobody else does: a hundredth of each pause is enough.
    """
    defaults = vars(InProcessDevice)["__init__"].__kwdefaults__
    monkeypatch.setitem(defaults, "sleep", lambda seconds: time.sleep(seconds / 100))


_made = pytest.StashKey[DeviceSoftHsm]()


def _let_see(conf: str) -> None:
    if os.environ.get("SOFTHSM2_CONF") != conf:
        os.environ["SOFTHSM2_CONF"] = conf
        with PKCS11_LOCK.held(10):
            restart(SOFTHSM)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a module, which may use the device that another test was not about."""
    made = item.session.stash.get(_made, None)
    if made is not None and "device_softhsm" in getattr(item, "fixturenames", ()):
        _let_see(made.environment["SOFTHSM2_CONF"])


@pytest.fixture(scope="session")
def device_softhsm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DeviceSoftHsm]:
    """The device with every kind of key; SoftHSM reads its configuration once per process."""
    made = make_softhsm(tmp_path_factory.mktemp("device_softhsm"))
    made.python(_PROVISION)
    before = os.environ.get("SOFTHSM2_CONF")
    _let_see(made.environment["SOFTHSM2_CONF"])
    request.session.stash[_made] = made
    yield made
    if before is None:
        os.environ.pop("SOFTHSM2_CONF", None)
    else:
        os.environ["SOFTHSM2_CONF"] = before


@pytest.fixture(autouse=True)
def _its_own_device(request: pytest.FixtureRequest) -> None:
    """
    Let the module see the device that the test is about.

    SoftHSM has one directory a process, and the room has two devices with one each: its own
    and the plugin's. Whichever a test uses is the one that SOFTHSM2_CONF names for it.
    """
    if "device_softhsm" in request.fixturenames:
        mine = request.getfixturevalue("device_softhsm").environment["SOFTHSM2_CONF"]
    elif "toll_softhsm" in request.fixturenames:
        mine = str(request.getfixturevalue("toll_softhsm").conf)
    else:
        return
    _let_see(mine)
