# ruff: noqa: INP001 -- a program of an image, not part of the package
"""
A key made on the device, a signing request for it, and the issuer's answer stored beside it.

The steps of `hsmtoll.enrol`, with the folder that the sandbox watches in the issuer's place.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from hsmtoll import enrol
from hsmtoll.app import App
from hsmtoll.errors import DeviceError, HsmTollError
from hsmtoll.settings import load

DESK = Path("/run/sandbox")


def main() -> int:
    """Enrol; an error's own exit code, and its line on stderr."""
    device = App(load()).devices[0]
    try:
        try:
            say(f"made {enrol.generate(device, bits=2048)}")
        except DeviceError as exc:
            if exc.code != "key-exists":
                raise
            say("the key is there already")
        request = enrol.csr(
            device,
            country="SE",
            organization="Eksempel AB",
            common_name="Eksempel AB",
            organization_identifier="NTRSE-5566778899",
        )
        answer = DESK / "chain.pem"
        answer.unlink(missing_ok=True)
        beside = DESK / "request.part"
        beside.write_text(request, "ascii")
        beside.replace(DESK / "request.pem")
        say("a signing request, signed on the device, went to the issuer")
        for _ in range(600):
            if answer.exists():
                break
            time.sleep(0.1)
        done = enrol.import_chain(device, answer.read_text("ascii"), now=datetime.now(UTC))
        for one in done.written:
            say(f"stored {one.subject}, issued by {one.issuer}")
    except HsmTollError as exc:
        sys.stderr.write(f"enrol: {exc}\n{exc.hint or ''}\n")
        return exc.exit_code
    return 0


def say(line: str) -> None:
    """One line of log."""
    sys.stdout.write(f"enrol: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
