"""
One device in a process of its own, driven by lines of JSON: where it runs is the stack's affair.

    stdin   {"do": "sign", "alg": "RS256", "jti": "one"}
    stdout  {"answer": …} or {"error": {"type", "code", "exit", "message"}}
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hsmtoll import enrolment
from hsmtoll.errors import HsmTollError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.testing.clock import SettableClock
from tests.kit.grants import a_grant


class Driver:
    """The device, and a clock that is moved instead of waiting for it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.clock = SettableClock.at_real_time()
        self.module = Path(settings["module"])
        self.pin_log = PinLog(Path(settings["state"]))
        self.pin = PinValue.of(settings["pin"])
        self.device = InProcessDevice(
            DeviceSettings(
                self.module,
                KeyUri.parse(settings["uri"]),
                use_final_try=settings.get("use_final_try", False),
            ),
            pin=self.pin,
            pin_log=self.pin_log,
            boot=lambda: self.clock.now().boot,
        )

    def sign(self, order: dict[str, Any]) -> str:
        unsigned = a_grant(order["alg"], jti=order["jti"], size=order.get("size", 0))
        return self.device.sign(order["alg"], unsigned).value.hex()

    def threads(self, order: dict[str, Any]) -> list[str]:
        with ThreadPoolExecutor(order["threads"]) as pool:
            return list(pool.map(lambda _: self.sign(order), range(order["times"])))

    def fork(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a forked child is told, and whether the parent still signs after it."""
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(theirs, json.dumps(self.answer({**order, "do": "sign"})).encode())
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            answer = json.loads(pipe.read() or "{}")
        os.waitpid(child, 0)
        return {"child": answer, "parent": self.sign(order)}

    def key(self, _order: dict[str, Any]) -> dict[str, Any]:
        facts = self.device.key()
        public = facts.public
        return {
            "uri": str(facts.uri),
            "public": public and [hex(public.modulus), public.exponent],
            "protected": facts.protected,
            "mechanisms": sorted(facts.mechanisms),
        }

    def generate(self, order: dict[str, Any]) -> str:
        made = enrolment.generate(
            self.device, bits=2048, label=order["label"], id=bytes.fromhex(order["id"])
        )
        return str(made)

    def objects(self, _order: dict[str, Any]) -> list[str]:
        seen = self.device.inspect()
        return [str(key.uri) for each in seen.tokens for key in each.keys]

    def advance(self, order: dict[str, Any]) -> None:
        self.clock.advance(order["seconds"])

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"answer": getattr(self, order["do"])(order)}
        except HsmTollError as exc:
            error = {"code": exc.code, "exit": exc.exit_code, "message": str(exc)}
            return {"error": {"type": type(exc).__name__, **error}}


def main() -> None:
    driver = Driver(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(driver.answer(json.loads(line))), flush=True)
    driver.device.close()


if __name__ == "__main__":
    main()
