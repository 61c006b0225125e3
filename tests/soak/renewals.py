"""
A soak: renewals by the hundred, faults on and off, and nobody may be given an expired token.

    python tests/soak/renewals.py [RENEWALS]

It uses the sandbox, in a process of its own, and a key in memory; time is moved, not waited
for. Prints one line of JSON and ends with 0 if every promise was kept: no expired token, every
renewal that was due done once the faults were over, and over the last four fifths less than 1 kB
more of memory in use for each renewal; what is resident is told beside it. What each fault needs
once (imports, first buffers) is met before the count begins.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from hsmtoll.client import TollClient
from hsmtoll.errors import HsmTollError
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.testing.clock import SettableClock
from tests.kit.soft_client import authority, token_service_of
from tests.soak.measure import in_use, memory, slope

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.sharedctypes import Synchronized

#: Bytes a renewal.
MOST = 1024.0

#: Renewals from which on the slope of memory means something.
LONG = 1000

#: What is switched on for a while, and off again. Those that a retry survives, and those not.
FAULTS = (
    ("503", "token", 1), ("500", "exchange", 1), ("reset-after", "token", 1), ("401", "token", 2),
    ("html", "exchange", 2), ("truncated", "token", 1), ("429", "exchange", 1),
)  # fmt: skip


@dataclass
class Far:
    """A sandbox in another process, as the client's parts know it."""

    issuer: str
    token_endpoint: str
    customs: str
    ca_file: Path
    pipe: Connection

    def trust(self, _: object) -> None:
        """It does so from the start."""

    def order(self, *words: Any) -> None:
        """Have a fault switched on, or all of them off; in force when it returns."""
        self.pipe.send(words)
        self.pipe.recv()


def serve(pipe: Connection, wall: Synchronized[float]) -> None:
    """The other process: a sandbox that lives by the clock of this one."""
    with Sandbox(clock=lambda: wall.value) as sandbox:
        sandbox.trust(authority())
        pipe.send((sandbox.issuer, sandbox.token_endpoint, sandbox.customs, sandbox.ca_file))
        while (words := pipe.recv())[0] != "end":
            if words[0] == "heal":
                sandbox.clear_faults()
            else:
                sandbox.fault(words[1], words[2], times=words[3])
            pipe.send(None)


def soak(renewals: int) -> dict[str, float]:
    """Run it; the figures."""
    clock = SettableClock.at_real_time()
    authority()  # before the fork: both processes know it then
    forked = multiprocessing.get_context("fork")
    wall = forked.Value("d", clock.now().wall)
    ours, theirs = forked.Pipe()
    process = forked.Process(target=serve, args=(theirs, wall), daemon=True)
    process.start()
    issuer, token_endpoint, customs, ca_file = ours.recv()
    sandbox = Far(issuer, token_endpoint, customs, ca_file, ours)

    def advance(seconds: float) -> None:
        clock.advance(seconds)
        wall.value = clock.now().wall

    seen = dict.fromkeys(("due", "done", "given", "expired", "failed_calls", "faults"), 0)
    points: list[tuple[float, float]] = []
    resident: list[tuple[float, float]] = []
    token_service, signer = token_service_of(sandbox, clock=clock, background=False, per_hour=10**6)
    client = TollClient(token_service)

    def renew(fault: tuple[str, str, int] | None) -> None:
        before = token_service.cache.hits["fetched"]
        seen["due"] += 1
        if fault is not None:
            sandbox.order("fault", *fault)
            seen["faults"] += 1
        while token_service.cache.hits["fetched"] == before:
            try:
                token = client.token("road")
            except HsmTollError:
                seen["failed_calls"] += 1
            else:
                seen["given"] += 1
                seen["expired"] += token.remaining(clock.now()) <= 0
            # As far as a rest after a failure may last.
            advance(0 if token_service.cache.hits["fetched"] > before else 45)
        sandbox.order("heal")
        seen["done"] += 1
        advance(token.lifetime - token.margin * 0.9)
        # The signer of the tests counts in a list.
        signer.signed.clear()

    for fault in (*FAULTS, *[None] * 40):
        renew(fault)
    seen.update(dict.fromkeys(seen, 0))
    while seen["done"] < renewals:
        faulty = seen["due"] % 10 == 5
        renew(FAULTS[seen["faults"] % len(FAULTS)] if faulty else None)
        if seen["done"] % max(1, renewals // 100) == 0 and seen["done"] > renewals / 5:
            points.append((seen["done"], in_use()))
            resident.append((seen["done"], memory()))
    ours.send(("end",))
    process.join(10)
    return {
        **seen,
        "bytes_a_renewal": round(slope(points), 1),
        "resident_bytes_a_renewal": round(slope(resident), 1),
    }


def main() -> int:
    """The command."""
    if os.environ.get("PYTHONMALLOC") != "malloc":
        # Then what is in use can be counted to the byte.
        os.execve(  # noqa: S606 - this program itself
            sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONMALLOC": "malloc"}
        )
    renewals = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    logging.disable(logging.CRITICAL)
    figures = soak(renewals)
    # A short run shows the allocator settling, not a leak: its slope is told, not judged.
    judged = renewals >= LONG
    kept = (
        figures["expired"] == 0
        and figures["due"] == figures["done"] == renewals
        and (not judged or figures["bytes_a_renewal"] < MOST)
    )
    sys.stdout.write(
        json.dumps({"renewals": renewals, **figures, "memory_judged": judged, "kept": kept}) + "\n"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
