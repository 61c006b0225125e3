"""
A temporary SoftHSM device with its own directory, label and PIN; needs neither root nor slot ids.

It is created without loading the module into the calling process. SoftHSM reads SOFTHSM2_CONF when
it is first loaded in a process: set the variables of `environ` before.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from hsmtoll.errors import DeviceError, UsageError, sanitized

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SoftHsm", "find_module"]

_MODULE_PATHS: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)


def find_module() -> Path:
    """SoftHSM's module: SOFTHSM2_MODULE, or a usual path. DeviceError if there is none."""
    given = os.environ.get("SOFTHSM2_MODULE")
    for place in (given,) if given else _MODULE_PATHS:
        if Path(place).is_file():
            return Path(place)
    raise DeviceError(
        "SoftHSM: its module is not on this machine",
        hint="install it (Debian: apt-get install softhsm2), or name it in SOFTHSM2_MODULE",
        code="softhsm-missing",
    )


#: SoftHSM's vendor attribute for the flags of a token, as stored in its files.
_TOKEN_FLAGS: Final = (0x8000534B).to_bytes(8, "big")
_COUNT_LOW: Final = 0x10000


@dataclass(frozen=True, slots=True)
class SoftHsm:
    """
    One temporary device. *directory* (0700) holds everything; to delete the device, remove it.

    Public keys are DER of SubjectPublicKeyInfo. Commands inside `batch` are executed by one child
    process at its end.
    """

    directory: Path
    module: Path
    label: str
    pin: str = field(repr=False)
    _commands: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @classmethod
    def create(
        cls, directory: Path, *, label: str | None = None, pin: str | None = None
    ) -> SoftHsm:
        """
        A new device under *directory*, with a random label and PIN if none is given.

        Raises DeviceError (``softhsm-missing``) where SoftHSM is not installed.
        """
        module = find_module()
        tool = shutil.which("softhsm2-util")
        if tool is None:
            raise DeviceError(
                "SoftHSM: softhsm2-util is not on the PATH",
                hint="install it (Debian: apt-get install softhsm2)",
                code="softhsm-missing",
            )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        (directory / "tokens").mkdir(mode=0o700)
        device = cls(
            directory,
            module,
            label or f"toll-{secrets.token_hex(4)}",
            pin or f"{secrets.randbelow(10**8):08d}",
        )
        device._private("softhsm2.conf", device._configuration())
        device._private("pin", device.pin)
        # softhsm2-util takes PINs only on argv, where others can see them: this one is replaced
        # before the device is used.
        first = f"{secrets.randbelow(10**8):08d}"
        _run(
            [
                *(tool, "--init-token", "--free", "--label", device.label, "--pin", first),
                *("--so-pin", f"{secrets.randbelow(10**8):08d}"),
            ],
            {**os.environ, "SOFTHSM2_CONF": str(directory / "softhsm2.conf")},
        )
        device._do([{"what": "pin", "old": first, "new": device.pin}], pin=first)
        return device

    def settle(self) -> None:
        """
        Log in with the right PIN if the token has the flag COUNT_LOW, which clears it. Otherwise a
        process with another state directory would not try the PIN (``pin-count-low``).
        """
        for file in (self.directory / "tokens").glob("*/token.object"):
            data = file.read_bytes()
            at = data.find(_TOKEN_FLAGS)
            flags = int.from_bytes(data[at + 16 : at + 24], "big") if at >= 0 else 0
            if flags & _COUNT_LOW:
                self._do([])

    def _configuration(self) -> str:
        return (
            f"directories.tokendir = {self.directory / 'tokens'}\n"
            "objectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
        )

    def _private(self, name: str, text: str) -> None:
        path = self.directory / name
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(text, encoding="utf-8")

    @property
    def conf(self) -> Path:
        """The file that SOFTHSM2_CONF names."""
        return self.directory / "softhsm2.conf"

    @property
    def pin_file(self) -> Path:
        """The PIN, in a file of mode 0600."""
        return self.directory / "pin"

    def uri(self, key_label: str) -> str:
        """The RFC 7512 URI of a key here."""
        return f"pkcs11:token={quote(self.label)};object={quote(key_label)}"

    def environ(self, key_label: str | None = None) -> dict[str, str]:
        """Variables for a process that uses the device, and the key called *key_label*."""
        named = {"HSMTOLL_HSM__KEY": self.uri(key_label)} if key_label else {}
        return {
            "SOFTHSM2_CONF": str(self.conf),
            "HSMTOLL_HSM__MODULE": str(self.module),
            "HSMTOLL_HSM__PIN_FILE": str(self.pin_file),
            **named,
        }

    def generate_key(
        self,
        label: str,
        key_id: bytes,
        *,
        bits: int = 2048,
        extractable: bool = False,
        sensitive: bool = True,
        always_authenticate: bool = False,
    ) -> bytes:
        """Generate an RSA signing key, protected by default. Returns its public key."""
        private = {"SENSITIVE": sensitive, "EXTRACTABLE": extractable}
        if always_authenticate:
            private["ALWAYS_AUTHENTICATE"] = True
        return self._key(
            what="rsa-key", label=label, key_id=key_id.hex(), bits=bits, private=private
        )

    def generate_ec_key(self, label: str, key_id: bytes) -> bytes:
        """Generate a P-256 key, which Maskinporten does not accept. Returns its public key."""
        return self._key(what="ec-key", label=label, key_id=key_id.hex())

    def store_certificate(self, der: bytes, *, label: str, key_id: bytes) -> None:
        """Store a certificate object; for a leaf, *key_id* is that of its key."""
        self._command(
            what="certificate",
            label=label,
            key_id=key_id.hex(),
            der=base64.b64encode(der).decode(),
        )

    def delete(self, label: str) -> None:
        """Delete every object with *label*."""
        self._command(what="delete", label=label)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Execute the enclosed `store_certificate` and `delete` calls together at the end."""
        self._commands.append({"what": "batch"})
        try:
            yield
            commands = [each for each in self._commands if each["what"] != "batch"]
        finally:
            # After an error none of the commands is executed.
            self._commands.clear()
        if commands:
            self._do(commands)

    def _key(self, **order: Any) -> bytes:
        if self._commands:
            raise UsageError("a key is made at once: not inside a batch")
        return base64.b64decode(self._do([order])[0])

    def _command(self, **order: Any) -> None:
        if self._commands:
            self._commands.append(order)
        else:
            self._do([order])

    def _do(self, commands: list[dict[str, Any]], *, pin: str | None = None) -> list[Any]:
        request = {
            "module": str(self.module),
            "token_label": self.label,
            "pin": pin or self.pin,
            "do": commands,
        }
        environment = {**os.environ, "SOFTHSM2_CONF": str(self.conf)}
        output = _run(
            [sys.executable, "-m", "hsmtoll.testing.provision"], environment, json.dumps(request)
        )
        results: list[Any] = json.loads(output)
        return results


def _run(argv: list[str], environment: dict[str, str], stdin: str = "") -> str:
    done = subprocess.run(
        argv, env=environment, input=stdin, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise DeviceError(
            f"SoftHSM: {Path(argv[0]).name} failed with {done.returncode}, "
            f"{sanitized(last[0]) if last else 'with no output'}",
            code="softhsm",
        )
    return done.stdout
