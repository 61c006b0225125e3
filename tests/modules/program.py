"""
A program with hsmtoll in it that lives on, and a sandbox beside it, driven by lines of JSON: a
device may be in a network of its own. Settings come as environment variables.

    argv    a file with the CA certificates that the sandbox trusts
    stdin   {"do": "sign"} or {"do": "command", "argv": ["doctor"]}
    stdout  {"answer": …} or {"error": {"type", "code", "exit", "message"}}
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Final

from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.sandbox.serve import read_anchors
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.settings import load
from hsmtoll.token import TokenRequest

ROAD: Final = TokenRequest(scope="toll:eu/movement/road/v2")
#: Where these functions stand in CK_FUNCTION_LIST, and what they may answer.
GET_SLOT_LIST, OPEN_SESSION, CLOSE_SESSION, LOGOUT = 4, 12, 13, 19
INITIALIZE: Final = 0
OK, ALREADY_INITIALIZED = 0, 0x191
SERIAL_SESSION: Final = 4


class Program:
    """The commands of a test, by their names."""

    def __init__(self) -> None:
        self.app = App(load())

    def sign(self, _order: dict[str, Any]) -> bool:
        signer = self.app.local_signer(self.app.devices[0])
        return bool(signer.sign(ROAD, jti=str(uuid.uuid4())))

    def chain(self, _order: dict[str, Any]) -> int:
        return len(self.app.chain().certificates)

    def token(self, _order: dict[str, Any]) -> bool:
        with self.app.client() as client:
            return bool(client.token("road").value)

    def command(self, order: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "hsmtoll", *order["argv"]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return {"exit": done.returncode, "out": done.stdout, "err": done.stderr}

    def logout(self, _order: dict[str, Any]) -> int:
        """Other code in this process logs out; on how many devices it did."""
        there = ctypes.c_void_p()
        path = os.environ["HSMTOLL_HSM__MODULE"]
        assert ctypes.CDLL(path).C_GetFunctionList(ctypes.byref(there)) == OK
        # The functions follow the version, which is padded to a pointer's size.
        table = ctypes.cast(there, ctypes.POINTER(ctypes.c_void_p))

        def call(number: int, *arguments: Any) -> int:
            at = table[1 + number]
            assert at
            return int(ctypes.CFUNCTYPE(ctypes.c_ulong)(at)(*arguments))

        assert call(INITIALIZE, None) in {OK, ALREADY_INITIALIZED}
        count, slots = ctypes.c_ulong(64), (ctypes.c_ulong * 64)()
        assert call(GET_SLOT_LIST, ctypes.c_ubyte(1), slots, ctypes.byref(count)) == OK
        done = 0
        for slot in slots[: count.value]:
            session = ctypes.c_ulong()
            flags = ctypes.c_ulong(SERIAL_SESSION)
            opened = call(
                OPEN_SESSION, ctypes.c_ulong(slot), flags, None, None, ctypes.byref(session)
            )
            if opened == OK:
                done += call(LOGOUT, session) == OK
                call(CLOSE_SESSION, session)
        return done

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"answer": getattr(self, order["do"])(order)}
        except HsmTollError as exc:
            error = {"code": exc.code, "exit": exc.exit_code, "message": str(exc)}
            return {"error": {"type": type(exc).__name__, **error}}


def main() -> None:
    with Sandbox(trust=read_anchors(Path(sys.argv[1]))) as sandbox:
        os.environ.update(sandbox.environ())
        program = Program()
        for line in sys.stdin:
            print(json.dumps(program.answer(json.loads(line))), flush=True)
        program.app.close()


if __name__ == "__main__":
    main()
