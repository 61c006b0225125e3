"""
PKCS#11 stacks, each made in seconds and gone afterwards; what can be in a namespace of its
own is. Those of NEEDING_ROOT have daemons that need root; without it their tests skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from filelock import FileLock

from hsmtoll.sandbox import pki
from hsmtoll.testing.softhsm import SoftHsm
from tests.kit.accounts import NEEDS_ROOT, is_root
from tests.kit.own_device import free_port, listens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LIBRARIES: Final = Path(f"/usr/lib/{platform.machine()}-linux-gnu/pkcs11")
PROXY: Final = LIBRARIES.parent / "p11-kit-proxy.so"
HERE: Final = Path(__file__).parent
TOP: Final = HERE.parents[1]
CARD: Final = ("smartcard==0.3", "smartcard-app-openpgp==0.4.0")


def wait_for(what: Callable[[], object], *, seconds: float = 60) -> None:
    """Until *what* is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not start"
        time.sleep(0.02)


@dataclass
class Stack(ABC):
    """A device behind a module: how to reach it, and how to take it away."""

    folder: Path
    module: Path
    uri: str
    pin: str
    wrong_pin: str = "000000"
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    #: Whether a forked child may use the module again by itself.
    fork_safe: bool = True
    #: Whether the key's certificate is on the device already.
    stores_leaf: bool = False
    #: Who issues the certificates of its keys.
    authority: pki.Authority = field(default_factory=pki.eseal_authority)
    #: Whether who has it open goes on when it is lost, and only newcomers notice.
    open_goes_on: bool = False

    @abstractmethod
    def lose(self) -> None:
        """Take the device, or what leads to it, away."""

    @abstractmethod
    def back(self) -> None:
        """Bring it back."""

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """A command in the stack's namespace and environment; its stdout."""
        done = subprocess.run(
            [*self.prefix, *argv],
            env={**os.environ, **self.environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr or done.stdout
        return done.stdout

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        """A daemon, in a process group of its own."""
        process = subprocess.Popen(
            [*self.prefix, *argv],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a daemon and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process in self.processes:
            self.processes.remove(process)

    def close(self) -> None:
        """End everything."""
        for process in reversed(list(self.processes)):
            self.stop(process)

    def unblock(self) -> None:  # noqa: B027 -- most count none
        """Give back all tries of the PIN, where they are counted."""

    @contextlib.contextmanager
    def driver(self, state: Path, *, pin: str | None = None, **more: Any) -> Iterator[Driver]:
        """A Device on this stack, in a process of its own."""
        with self.talking("tests.modules.driver") as driver:
            settings = {"module": str(self.module), "uri": self.uri, "pin": pin or self.pin}
            driver.tell({**settings, "state": str(state), **more})
            yield driver

    @contextlib.contextmanager
    def program(self, folder: Path, isolation: str, **variables: str) -> Iterator[Driver]:
        """A program with these settings and a sandbox that trusts the stack's authority."""
        pin, trusted = folder / "pin", folder / "trusted.pem"
        pin.write_text(variables.pop("pin", self.pin))
        pin.chmod(0o600)
        trusted.write_bytes(pki.pem(*self.authority.chain))
        settings = {
            "HSMTOLL_CONFIG": os.devnull,
            "HSMTOLL_IDENTITY": "eseal",
            "HSMTOLL_STATE": str(folder / "state"),
            "HSMTOLL_CACHE": "memory:",
            "HSMTOLL_HSM__MODULE": str(self.module),
            "HSMTOLL_HSM__KEY": self.uri,
            "HSMTOLL_HSM__PIN_FILE": str(pin),
            "HSMTOLL_HSM__ISOLATION": isolation,
            **variables,
        }
        with self.talking("tests.modules.program", str(trusted), **settings) as program:
            yield program

    @contextlib.contextmanager
    def talking(self, *run: str, **variables: str) -> Iterator[Driver]:
        """A program of this folder that answers lines of JSON."""
        process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", *run],
            env={**os.environ, **self.environment, "PYTHONPATH": str(TOP), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield Driver(process)
        finally:
            with process:
                assert process.stdin is not None
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()

    def certificates(self) -> Path:
        """A file with the chain of the stack's key; made when it is first wanted."""
        place = self.folder / "chain.pem"
        if not place.exists():
            with self.driver(self.folder / "state-of-chain") as driver:
                modulus, exponent = driver.does("key")["public"]
            key = rsa.RSAPublicNumbers(exponent, int(modulus, 16)).public_key()
            place.write_bytes(pki.pem(self.authority.issue(key), *self.authority.chain))
        return place


class Driver:
    """The other end of driver.py and program.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """``{"answer": …}`` or ``{"error": …}``."""
        self.tell({"do": do, **order})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the driver ended with {self.process.wait(20)}"
        reply: dict[str, Any] = json.loads(line)
        return reply

    def does(self, do: str, **order: Any) -> Any:
        """The answer; an error fails the test."""
        reply = self.ask(do, **order)
        assert "answer" in reply, reply
        return reply["answer"]

    def error(self, do: str, **order: Any) -> dict[str, Any]:
        """The error; an answer fails the test."""
        reply = self.ask(do, **order)
        assert "error" in reply, reply
        error: dict[str, Any] = reply["error"]
        return error


# ---------------------------------------------------------------------- the stacks


class Direct(Stack):
    """SoftHSM in the process itself; its files are moved away."""

    def lose(self) -> None:
        (self.folder / "softhsm" / "tokens").rename(self.folder / "away")

    def back(self) -> None:
        (self.folder / "away").rename(self.folder / "softhsm" / "tokens")


def direct(folder: Path) -> Stack:
    made = SoftHsm.create(folder / "softhsm")
    made.generate_key("k", b"\x01")
    environment = {"SOFTHSM2_CONF": str(made.conf)}
    return Direct(folder, made.module, made.uri("k"), made.pin, environment=environment)


class Remote(Stack):
    """SoftHSM behind `p11-kit server`; the server is killed."""

    def lose(self) -> None:
        for process in list(self.processes):
            self.stop(process)

    def back(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.start(
            *("p11-kit", "server", "--foreground", "--name", str(self.socket)),
            *("--provider", str(self.behind), self.uri.partition(";")[0]),
        )
        wait_for(lambda: listens(self.socket))

    @property
    def socket(self) -> Path:
        return self.folder / "p11.sock"

    behind: Path = Path()


def remote(folder: Path) -> Stack:
    made = SoftHsm.create(folder / "softhsm")
    made.generate_key("k", b"\x01")
    stack = Remote(folder, LIBRARIES / "p11-kit-client.so", made.uri("k"), made.pin)
    stack.behind = made.module
    stack.environment = {
        "SOFTHSM2_CONF": str(made.conf),
        "P11_KIT_SERVER_ADDRESS": f"unix:path={stack.socket}",
    }
    stack.back()
    return stack


def in_namespace(stack: Stack, kinds: Sequence[str], script: str) -> None:
    """Run *script* in new namespaces, which stay until the stack ends, and all else in them."""
    ready = stack.folder / "ready"
    holder = stack.start(
        "unshare", *(f"--{kind}" for kind in kinds), "sh", "-euc",
        f"{script}\ntouch {ready}\nexec sleep infinity",
    )  # fmt: skip
    wait_for(lambda: ready.exists() or holder.poll() is not None)
    assert holder.poll() is None, "the namespace could not be made: are we root?"
    stack.prefix = ("nsenter", "-t", str(holder.pid), *(f"--{kind}" for kind in kinds))


class Opencryptoki(Stack):
    """The software token of opencryptoki; its daemon is ended."""

    def lose(self) -> None:
        self.stop(self.processes[-1])

    def back(self) -> None:
        self.run("sh", "-c", "rm -rf /run/opencryptoki/* /run/pkcsslotd.pid /dev/shm/*")
        self.start("pkcsslotd", "-f")
        wait_for(lambda: "Token #0" in self.run("pkcsconf", "-t", "-c", "0", check=False))

    def conf(self, *arguments: str) -> None:
        self.run("pkcsconf", "-c", "0", *arguments, stdin="lab\n")


def opencryptoki(folder: Path) -> Stack:
    (folder / "opencryptoki.conf").write_text(
        "version opencryptoki-3.1\nslot 0\n{\nstdll = libpkcs11_sw.so\n}\n"
    )
    uri = "pkcs11:token=lab;object=k"
    module = LIBRARIES / "libopencryptoki.so"
    stack = Opencryptoki(folder, module, uri, "12341234", "99999999", open_goes_on=True)
    in_namespace(
        stack,
        ("mount", "ipc"),
        f"mount --bind {folder}/opencryptoki.conf /etc/opencryptoki/opencryptoki.conf\n"
        "mount -t tmpfs tmpfs /dev/shm\nmount -t tmpfs tmpfs /var/lib/opencryptoki\n"
        "mount -t tmpfs tmpfs /run\n"
        "mkdir -p /run/lock/opencryptoki/swtok /run/opencryptoki\n"
        "mkdir -p /var/lib/opencryptoki/swtok/TOK_OBJ /var/lib/opencryptoki/HSM_MK_CHANGE\n"
        "chgrp -R pkcs11 /run/lock/opencryptoki /run/opencryptoki /var/lib/opencryptoki\n"
        "chmod -R 770 /run/lock/opencryptoki /run/opencryptoki /var/lib/opencryptoki\n",
    )
    stack.back()
    for arguments in (
        ("-I", "-S", "87654321"),
        ("-P", "-S", "87654321", "-n", "56785678"),
        ("-u", "-S", "56785678", "-n", "12345678"),
        ("-p", "-U", "12345678", "-n", stack.pin),
    ):
        stack.conf(*arguments)
    generate(stack, "lab")
    return stack


class Tpm(Stack):
    """tpm2-pkcs11 on a software TPM; the TPM and its broker are killed."""

    def lose(self) -> None:
        for process in self.processes[1:]:
            self.stop(process)

    def back(self) -> None:
        port = self.port
        self.start(
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.folder / 'state'}"),
            *("--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"),
            *("--server", f"type=tcp,port={port},bindaddr=127.0.0.1"),
            *("--flags", "not-need-init,startup-clear"),
        )
        wait_for(lambda: str(port) in self.run("ss", "-ltn"))
        self.start(
            *("tpm2-abrmd", "--session", "--allow-root"),
            f"--tcti=swtpm:host=127.0.0.1,port={port}",
        )
        wait_for(lambda: self.run("tpm2_getrandom", "--hex", "1", check=False))

    port = 0

    def unblock(self) -> None:
        """As the owner of a TPM does after too many wrong PINs."""
        self.run("tpm2_dictionarylockout", "--clear-lockout")


def tpm(folder: Path) -> Stack:
    for name in ("state", "store"):
        (folder / name).mkdir()
    bus = f"unix:path={folder / 'bus'}"
    uri = "pkcs11:token=lab;object=k"
    stack = Tpm(folder, LIBRARIES / "libtpm2_pkcs11.so", uri, "271828", fork_safe=False)
    stack.environment = {
        "DBUS_SESSION_BUS_ADDRESS": bus,
        "TPM2TOOLS_TCTI": "tabrmd:bus_type=session",
        "TPM2_PKCS11_TCTI": "tabrmd:bus_type=session",
        "TPM2_PKCS11_STORE": str(folder / "store"),
        "TSS2_LOG": "all+NONE",
        "TPM2_PKCS11_LOG_LEVEL": "0",
    }
    stack.port = free_port(together=2)
    stack.start("dbus-daemon", "--session", "--nofork", f"--address={bus}")
    wait_for((folder / "bus").exists)
    stack.back()
    store = ("--path", str(folder / "store"))
    stack.run("tpm2_ptool", "init", *store)
    stack.run(
        *("tpm2_ptool", "addtoken", "--pid", "1", "--label", "lab", "--sopin", "5678"),
        *("--userpin", stack.pin, *store),
    )
    stack.run(
        *("tpm2_ptool", "addkey", "--algorithm", "rsa2048", "--label", "lab"),
        *("--key-label", "k", "--id", "01", "--userpin", stack.pin, *store),
    )
    return stack


class Smartcard(Stack):
    """A virtual card in a reader of pcscd, behind a module; the card is pulled."""

    card: Any = None
    daemon: Any = None
    #: What OpenSC calls a card of this kind.
    kind: str = ""
    #: What unblocks the PIN, as its holder does it: commands in hexadecimal.
    unblocking: tuple[str, ...] = ()

    def start_daemon(self) -> None:
        """pcscd, after whatever an earlier one left; the reader finds it by itself."""
        self.run("sh", "-c", "rm -rf /run/pcscd/*")
        readers = str(self.folder / "readers")
        # Newer ones ask polkit, which is not in this namespace, who may use a card.
        output = self.run("pcscd", "--help", check=False)
        polkit = ("--disable-polkit",) if "--disable-polkit" in output else ()
        self.daemon = self.start("pcscd", "--foreground", "--error", *polkit, "--config", readers)
        wait_for(lambda: ":35963" in self.run("ss", "-ltn"))

    def insert(self, python: Path, kind: str, card: str) -> None:
        """A new card, a program of this folder."""
        self.kind = kind
        run = ("env", f"PYTHONPATH={TOP}", str(python), "-m", f"tests.modules.{card}")
        self.card = self.start(*run, "35963")
        wait_for(self.seen)

    def kill_daemon(self) -> None:
        """pcscd ends without a word."""
        self.stop(self.daemon)

    def lose(self) -> None:
        os.killpg(self.card.pid, signal.SIGUSR1)
        wait_for(lambda: not self.seen())

    def back(self) -> None:
        os.killpg(self.card.pid, signal.SIGUSR1)
        wait_for(self.seen)

    def restart(self) -> None:
        """Another program resets the card: what was verified on it is gone."""
        self.run("opensc-tool", "--reset")

    def seen(self) -> bool:
        return self.kind in self.run("opensc-tool", "-n", check=False)

    def unblock(self) -> None:
        """As the card's holder does."""
        sent = [":".join(re.findall("..", each)) for each in self.unblocking]
        self.run("opensc-tool", *(part for each in sent for part in ("-s", each)))


def with_reader(stack: Smartcard, name: str) -> None:
    """pcscd with a reader of that *name*, alone in a network: its port is fixed, open to all."""
    readers = stack.folder / "readers"
    readers.mkdir()
    (readers / "vpcd").write_text(
        f'FRIENDLYNAME "{name}"\nDEVICENAME /dev/null:0x8C7B\n'
        "LIBPATH /usr/lib/pcsc/drivers/serial/libifdvpcd.so\nCHANNELID 0x8C7B\n"
    )
    in_namespace(
        stack,
        ("mount", "net"),
        "ip link set lo up\nmount -t tmpfs tmpfs /run\nmkdir -p /run/pcscd",
    )
    stack.start_daemon()


def smartcard(folder: Path) -> Stack:
    uri = "pkcs11:token=OpenPGP%20card%20%28User%20PIN%20%28sig%29%29;id=%01"
    stack = Smartcard(
        folder, LIBRARIES / "opensc-pkcs11.so", uri, "123456", "654321", fork_safe=False
    )
    # With the admin PIN.
    stack.unblocking = ("0020008308" + b"12345678".hex(), "002C028106" + b"123456".hex())
    with_reader(stack, "Virtual PCD")
    stack.insert(card_environment(), "OpenPGP", "openpgp_card")
    stack.run(
        *("openpgp-tool", "--verify", "CHV3", "--pin", "12345678"),
        *("--gen-key", "1", "--key-type", "rsa2048"),
    )
    return stack


def piv_card(stack: Smartcard) -> Stack:
    """A PIV card with a key and its certificate, made by the tool of YubiKeys."""
    select = "00A4040005A000000308"
    stack.unblocking = (select, "002C008010" + b"12345678".hex() + b"123456".hex() + "ffff")
    with_reader(stack, "Yubico YubiKey CCID")
    stack.insert(Path(sys.executable), "Personal Identity", "piv_card")
    public, certificate = stack.folder / "public.pem", stack.folder / "certificate.pem"
    tool = ("yubico-piv-tool", "-r", "Yubico", "-s")
    for slot in ("9a", "9c"):
        stack.run(*tool, slot, "-a", "generate", "-A", "RSA2048", "-o", str(public))
        key = load_pem_public_key(public.read_bytes())
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        certificate.write_bytes(pki.pem(stack.authority.issue(spki)))
        stack.run(*tool, slot, "-a", "import-certificate", "-i", str(certificate))
    stack.stores_leaf = True
    # The leaf is on the card, which has no room for those that issued it.
    (stack.folder / "chain.pem").write_bytes(pki.pem(*stack.authority.chain))
    return stack


def piv(folder: Path) -> Stack:
    module = LIBRARIES / "opensc-pkcs11.so"
    return piv_card(Smartcard(folder, module, "pkcs11:id=%01", "123456", "654321", fork_safe=False))


def ykcs11(folder: Path) -> Stack:
    module = LIBRARIES.parent / "libykcs11.so.2"
    return piv_card(Smartcard(folder, module, "pkcs11:id=%01", "123456", "654321", fork_safe=False))


def behind_proxy(stack: Stack, name: str, configuration: str) -> None:
    """Make *configuration* the only module that p11-kit's proxy leads to."""
    folder = stack.folder / "config" / "pkcs11"
    (folder / "modules").mkdir(parents=True)
    (folder / "pkcs11.conf").write_text("user-config: only\n")
    (folder / "modules" / f"{name}.module").write_text(configuration)
    stack.environment["XDG_CONFIG_HOME"] = str(stack.folder / "config")
    if os.geteuid() == 0:
        # Of root p11-kit does not read the configuration of a user: be somebody else.
        stack.prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


def proxy(folder: Path) -> Stack:
    """SoftHSM behind p11-kit's proxy, in the process itself."""
    made = SoftHsm.create(folder / "softhsm")
    made.generate_key("k", b"\x01")
    # Behind the proxy may be anything: it is not started again after a fork.
    stack = Direct(folder, PROXY, made.uri("k"), made.pin, fork_safe=False)
    stack.environment = {"SOFTHSM2_CONF": str(made.conf)}
    behind_proxy(stack, "softhsm", f"module: {made.module}\n")
    return stack


class Nss(Stack):
    """The key database of NSS through p11-kit's proxy; its files are moved away."""

    def lose(self) -> None:
        (self.folder / "db").rename(self.folder / "away")

    def back(self) -> None:
        (self.folder / "away").rename(self.folder / "db")


def nss(folder: Path) -> Stack:
    database = folder / "db"
    database.mkdir()
    uri = "pkcs11:token=NSS%20Certificate%20DB;object=k"
    stack = Nss(folder, PROXY, uri, "31415926", fork_safe=False, open_goes_on=True)
    behind_proxy(
        stack,
        "nss",
        f"module: {LIBRARIES.parent / 'libsoftokn3.so'}\n"
        f"x-init-reserved: configdir='sql:{database}' certPrefix='' keyPrefix=''"
        " secmod='secmod.db' flags=\n",
    )
    (folder / "pin").write_text(f"{stack.pin}\n")
    stack.run("certutil", "-N", "-d", f"sql:{database}", "-f", str(folder / "pin"))
    generate(stack, "NSS Certificate DB")
    return stack


def generate(stack: Stack, label: str) -> None:
    """A protected key called k, made on the device."""
    private = {"SENSITIVE": True, "EXTRACTABLE": False}
    order = {"what": "rsa-key", "label": "k", "key_id": "01", "bits": 2048, "private": private}
    job = {"module": str(stack.module), "token_label": label, "pin": stack.pin, "do": [order]}
    stack.run(sys.executable, "-m", "hsmtoll.testing.provision", stdin=json.dumps(job))


_FORMER_NAMES = """
from configparser import RawConfigParser
import configparser
configparser.SafeConfigParser = RawConfigParser
RawConfigParser.readfp = lambda self, file: self.read_file(file)
"""


def card_environment() -> Path:
    """The virtual environment with the card; made when it is first wanted."""
    place = HERE.parent.parent / ".venv-card"
    python = place / "bin" / "python"
    with FileLock(f"{place}.lock"):
        if not (place / "made").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
            install = [str(python), "-m", "pip", "install", "-q"]
            subprocess.run([*install, "setuptools==84.2.1"], check=True)
            # The card's own build asks for names that Python 3.12 no longer has.
            (place / "shim").mkdir()
            (place / "shim" / "sitecustomize.py").write_text(_FORMER_NAMES)
            subprocess.run(
                [*install, "--no-build-isolation", *CARD], check=True,
                env={**os.environ, "PYTHONPATH": str(place / "shim")},
            )  # fmt: skip
            (place / "made").touch()
    return python


STACKS: Final[dict[str, Callable[[Path], Stack]]] = {
    "softhsm": direct,
    "p11-kit": remote,
    "p11-kit-proxy": proxy,
    "opencryptoki": opencryptoki,
    "tpm": tpm,
    "smartcard": smartcard,
    "piv": piv,
    "ykcs11": ykcs11,
    "nss": nss,
}

#: Cards in a reader of pcscd.
CARDS: Final = ("smartcard", "piv", "ykcs11")
#: Whose daemons belong to the system.
NEEDING_ROOT: Final = ("opencryptoki", *CARDS)


@pytest.fixture(scope="session")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stack]]:
    """The stack of a name, made once."""
    made: dict[str, Stack] = {}

    def stack(name: str) -> Stack:
        if name in NEEDING_ROOT and not is_root():
            pytest.skip(NEEDS_ROOT)
        if name not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{secrets.token_hex(2)}")
            made[name] = STACKS[name](folder)
        return made[name]

    yield stack
    for each in made.values():
        each.close()


@pytest.fixture(params=sorted(STACKS))
def stack(request: pytest.FixtureRequest, stacks: Callable[[str], Stack]) -> Stack:
    """Each stack in turn."""
    return stacks(request.param)
