"""
A soak: tokens of 20 s, a device fault every minute, and callers who never stop.

    python tests/soak/devices.py [SECONDS [EVERY]]

Two clients in processes of their own, each with a device of its own: one has the module in its
process, the other in a child (HSMTOLL_HSM__ISOLATION=process) and meets hangs and crashes as
well. Four threads of each call an API of one sandbox twice a second. Prints one JSON object and
ends with 0 if every promise was kept, for each client:

- no call failed while a token lived that a call had been made with before;
- 95 % of the calls outside fault windows worked, what a fault left behind included;
- every renewal that was due was done, but for one that was just due at the end;
- no descriptors and no threads were left behind.

A fault window lasts from the moment a fault is set until it is cleared; those that happen once
have a window of no length.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.settings import load
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.identity import eseal, register_identity
from hsmtoll.testing.softhsm import SoftHsm
from tests.soak.measure import children, descriptors, memory, slope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from hsmtoll.tokens.token_service import TokenService

#: Seconds that a token lives, between two faults, between two calls of one thread.
LIFETIME: Final = 20
EVERY: Final = 60.0
PAUSE: Final = 0.5
THREADS: Final = 4

#: Seconds, for a call of the device and for a token request. Shorter than a token's life.
DEADLINE: Final = 6.0

#: Seconds that a token lives beyond the life that was announced: each server says one less, and
#: what is issued within a second counts from its beginning.
ROUNDED: Final = 3.0

#: The share of calls outside fault windows that have to work.
GOAL: Final = 0.95

#: Descriptors and threads that may come and go: a connection that is just being made.
PLAY: Final = 8


@dataclass(frozen=True)
class Fault:
    """What is set, for how many seconds (0: it happens once), and with what."""

    name: str
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    also: str = ""

    @property
    def title(self) -> str:
        """The name in the report."""
        function = self.options.get("function")
        return f"{self.name} {function}" if function else self.name


IN_PROCESS: Final = (
    Fault("session-lost"),
    Fault("token-removed", 30),
    Fault("device-error"),
    Fault("slow", 15, {"function": "C_Sign", "ms": 3000}),
    Fault("handles-stale"),
    Fault("nth-call-fails", options={"function": "C_SignInit"}),
    Fault("slot-error", 15, also="session-lost"),
    Fault("wrong-signature", 15),
    Fault("pin-locked", 15, also="session-lost"),
    Fault("nth-call-fails", options={"function": "C_Sign", "rv": 0x32}),
    Fault("mechanism-missing", 15, also="session-lost"),
    Fault("rate", 15, {"ms": 2000}),
)
IN_A_CHILD: Final = (
    Fault("hang", 12, {"function": "C_Sign"}),
    Fault("crash", 12, {"function": "C_SignInit"}),
    *IN_PROCESS[:4],
    # Not in C_Login: a PIN whose try has no known end twice is not tried a third time.
    Fault("crash", 12, {"function": "C_OpenSession"}, also="session-lost"),
    Fault("hang", 12, {"function": "C_GetSlotList"}, also="device-error"),
    *IN_PROCESS[4:],
)


# ---------------------------------------------------------------------- a client, and its callers


class Teller:
    """One JSON object a line, from any thread, to whoever started this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, **facts: Any) -> None:
        with self._lock:
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()


class Signed(logging.Handler):
    """Hears of each grant that was answered with a token."""

    def __init__(self, tell: Teller) -> None:
        super().__init__(logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("server=Maskinporten") and "status=200" in message:
            self._tell(signed=time.monotonic())


def client() -> None:
    """The other process: callers without end, until stdin is closed."""
    tell = Teller()
    log = logging.getLogger("hsmtoll")
    log.setLevel(logging.INFO)
    log.addHandler(Signed(tell))
    handler = logging.StreamHandler()
    handler.setLevel(os.environ.get("TOLL_SOAK_LOG", "WARNING"))
    handler.setFormatter(logging.Formatter(f"%(asctime)s {os.environ['TOLL_SOAK']}: %(message)s"))
    log.addHandler(handler)
    app = App(load())
    ended = threading.Event()
    with app.client() as toll:
        # The first token, and with it what is loaded once, comes before the count.
        toll.api("road").get("test-auth").raise_for_status()
        known = Known()
        threads = [
            threading.Thread(target=calls, args=(toll.api("road"), known, tell, ended))
            for _ in range(THREADS)
        ]
        threads.append(threading.Thread(target=watch, args=(app.token_service, tell, ended)))
        for thread in threads:
            thread.start()
        tell(ready=True)
        while sys.stdin.readline():
            gc.collect()
            tell(
                memory=memory(),
                descriptors=descriptors(),
                threads=threading.active_count(),
                children=[{"memory": m, "descriptors": d} for m, d in of_children()],
            )
        ended.set()
        for thread in threads:
            thread.join()
        tell(signatures=toll.status().signatures)
    tell(left=len(children()))


def of_children() -> Iterator[tuple[int, int]]:
    """Memory and descriptors of the processes that the module runs in."""
    for each in children():
        # One may just have been ended.
        with contextlib.suppress(OSError):
            yield memory(each), descriptors(each)


class Known:
    """Until when the token lives that calls were made with; as its issuer says, not hsmtoll."""

    def __init__(self) -> None:
        self.until = 0.0

    def see(self, request: httpx.Request) -> None:
        bearer = request.headers["authorization"].partition(" ")[2]
        payload = bearer.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        self.until = max(self.until, float(claims["exp"]) - ROUNDED)


def calls(api: httpx.Client, known: Known, tell: Teller, ended: threading.Event) -> None:
    """One caller."""
    while not ended.wait(PAUSE):
        began, until, why = time.monotonic(), known.until, ""
        try:
            response = api.get("test-auth")
        except (HsmTollError, httpx.HTTPError) as exc:
            why = str(getattr(exc, "code", "") or type(exc).__name__)
        else:
            known.see(response.request)
            if not response.is_success:
                why = str(response.status_code)
        alive = time.time() < until
        tell(call=(began, time.monotonic()), why=why, alive=alive)


def watch(token_service: TokenService, tell: Teller, ended: threading.Event) -> None:
    """Tells when a renewal is due, and when it is done."""
    request = token_service.request("road")
    held, due = token_service.cache.unexpired_in_memory(request), False
    while not ended.wait(0.1):
        token = token_service.cache.unexpired_in_memory(request)
        if token is not None and token != held:
            if not due:
                tell(due=time.monotonic())
            tell(done=time.monotonic())
            held, due = token, False
        if not due and (
            token is None or token.remaining(token_service.clock.now()) <= token.margin
        ):
            tell(due=time.monotonic())
            due = True


# ---------------------------------------------------------------------- faults, and the count


class Run:
    """One client with its device and its faults, and what was seen of it."""

    def __init__(
        self, name: str, faults: tuple[Fault, ...], sandbox: Sandbox, folder: Path
    ) -> None:
        self.name = name
        self.rotation = faults
        self.windows: list[tuple[str, float, float]] = []
        self.seen: list[dict[str, Any]] = []
        self.points: list[tuple[float, dict[str, Any]]] = []
        self.ready = threading.Event()
        self.counts: dict[str, int] = {}
        self._clearing: list[threading.Timer] = []
        device = SoftHsm.create(folder / "softhsm")
        known = eseal(device)
        register_identity(sandbox, known)
        self.faults = Faults(device.module, folder / "faults")
        self.faults.__enter__()
        variables = {
            **known.environ(),
            **sandbox.environ(),
            **self.faults.environ(),
            "HSMTOLL_STATE": str(folder / "state"),
            "HSMTOLL_HSM__ISOLATION": name,
            "HSMTOLL_DEADLINE": str(DEADLINE),
            "HSMTOLL_BUDGET__PER_HOUR": "100000",
            "TOLL_SOAK": name,
        }
        kept = {n: v for n, v in os.environ.items() if not n.upper().startswith("HSMTOLL_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "client"],
            env={**kept, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reading = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reading.start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            report = json.loads(line)
            if "memory" in report:
                self.points.append((time.monotonic(), report))
            elif "ready" in report:
                self.ready.set()
            else:
                self.seen.append(report)
        self.ready.set()

    def strike(self, number: int) -> None:
        """The next fault of the rotation; it ends by itself."""
        fault = self.rotation[number % len(self.rotation)]
        at = time.monotonic()
        self.faults.set(fault.name, **fault.options)
        if fault.also:
            self.faults.set(fault.also)
        if not fault.seconds:
            self.windows.append((fault.title, at, at))
            return

        def clear() -> None:
            self.faults.clear(fault.name)
            self.windows.append((fault.title, at, time.monotonic()))

        self._clearing.append(threading.Timer(fault.seconds, clear))
        self._clearing[-1].start()

    def look(self) -> None:
        """Have the client tell what it holds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Stop the client, whatever it does."""
        for clearing in self._clearing:
            clearing.join()
        self.faults.clear()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(60)
        self.process.kill()
        self.process.wait()
        self._reading.join()
        self.counts = self.faults.calls()
        self.faults.__exit__(None, None, None)

    # ------------------------------------------------------------------ figures

    def figures(self) -> dict[str, Any]:
        """What was seen, and whether it is what was promised."""
        made = [(*each["call"], each["why"], each["alive"]) for each in self.seen if "call" in each]
        outside = [each for each in made if not self._in_window(each[0], each[1])]
        worked = sum(1 for each in outside if not each[2])
        share = worked / max(1, len(outside))
        due = sorted(each["due"] for each in self.seen if "due" in each)
        done = sorted(each["done"] for each in self.seen if "done" in each)
        with_a_token = [each for each in made if each[2] and each[3]]
        left = [each["left"] for each in self.seen if "left" in each]
        grew = self._grew()
        return {
            "calls": len(made),
            "failed": sum(1 for each in made if each[2]),
            "failed_why": dict(Counter(each[2] for each in made if each[2])),
            "failed_with_a_living_token": len(with_a_token),
            "failed_with_a_living_token_why": dict(Counter(each[2] for each in with_a_token)),
            "outside_windows": len(outside),
            "share_that_worked_outside_windows": round(share, 4),
            "renewals_due": len(due),
            "renewals_done": len(done),
            "signatures": sum(each.get("signatures", 0) for each in self.seen),
            "sign_inits_at_the_device": self.counts.get("C_SignInit", 0),
            "logins_at_the_device": self.counts.get("C_Login", 0),
            "faults": self._by_fault(made, due, done),
            "held": grew,
            "exit_code": self.process.returncode,
            "processes_left": sum(left),
            "kept": bool(made)
            and not with_a_token
            and share >= GOAL
            and 0 <= len(due) - len(done) <= 1
            and grew["descriptors"][-1] <= grew["descriptors"][0] + PLAY
            and grew["threads"][-1] <= grew["threads"][0] + PLAY
            and self.process.returncode == 0
            and left == [0],
        }

    def _in_window(self, began: float, ended: float) -> bool:
        return any(began <= end and ended >= start for _, start, end in self.windows)

    def _by_fault(self, made: list[Any], due: list[float], done: list[float]) -> dict[str, Any]:
        """By name: how often, calls that failed until the next one, and how soon it was over."""
        windows = sorted(self.windows, key=lambda window: window[1])
        signed = sorted(each["signed"] for each in self.seen if "signed" in each)
        faults: dict[str, dict[str, Any]] = {}
        for number, (name, start, end) in enumerate(windows):
            after = windows[number + 1][1] if number + 1 < len(windows) else float("inf")
            fault = faults.setdefault(
                name, {"times": 0, "failed": 0, "failed_after": 0, "back": []}
            )
            fault["times"] += 1
            bad = [each for each in made if each[2] and start <= each[1] < after]
            fault["failed"] += len(bad)
            fault["failed_after"] += sum(1 for each in bad if each[0] > end)
            # The renewal that waits when the fault ends, or the first one that is due after it.
            waited = max((d for d in due if d <= end), default=end)
            pending = not any(waited < d <= end for d in done)
            since = end if pending else min((d for d in due if d > end), default=None)
            first = min((s for s in signed if since is not None and s >= since), default=None)
            if since is not None and first is not None:
                fault["back"].append(first - since)
        for fault in faults.values():
            back = fault.pop("back")
            fault["seconds_to_signature"] = {
                "median": round(median(back), 2) if back else None,
                "most": round(max(back), 2) if back else None,
            }
        return faults

    def _grew(self) -> dict[str, Any]:
        """Memory, descriptors and threads, from the first look to the last."""
        start = self.points[0][0]
        half = [
            (at - start, report["memory"]) for at, report in self.points[len(self.points) // 5 :]
        ]
        of_child = [child for _, report in self.points for child in report["children"]]
        return {
            "memory_kib": self._spread([report["memory"] // 1024 for _, report in self.points]),
            "memory_bytes_an_hour": round(slope(half) * 3600),
            "descriptors": self._spread([report["descriptors"] for _, report in self.points]),
            "threads": self._spread([report["threads"] for _, report in self.points]),
            "child_memory_kib": self._spread([each["memory"] // 1024 for each in of_child]),
            "child_descriptors": self._spread([each["descriptors"] for each in of_child]),
        }

    @staticmethod
    def _spread(values: list[int]) -> list[int]:
        """A dozen of *values*, the first and the last among them."""
        if len(values) <= 12:
            return values
        return [values[round(n * (len(values) - 1) / 11)] for n in range(12)]


def soak(seconds: float, every: float) -> dict[str, Any]:
    """Run it; the figures."""
    with (
        tempfile.TemporaryDirectory(prefix="hsmtoll-soak-") as folder,
        Sandbox(lifetime=LIFETIME) as sandbox,
        contextlib.ExitStack() as stack,
    ):
        runs = []
        for name, faults in (("none", IN_PROCESS), ("process", IN_A_CHILD)):
            runs.append(Run(name, faults, sandbox, Path(folder) / name))
            stack.callback(runs[-1].end)
        for run in runs:
            run.ready.wait()
        began = time.monotonic()
        # The first look is taken when all that is needed once has been met.
        looked, struck = began + min(30.0, seconds / 8), 0
        # After the last fault there is time for what it leaves behind.
        while (now := time.monotonic()) < began + seconds:
            if now >= began + struck * every + every / 4 and now < began + seconds - every:
                for run in runs:
                    run.strike(struck)
                struck += 1
            if now >= looked:
                for run in runs:
                    run.look()
                # All that came in is kept for tests to look at; nobody does here.
                sandbox.state.received.clear()
                looked = now + 30
            if any(run.process.poll() is not None for run in runs):
                break
            time.sleep(0.2)
        stack.close()
        figures = {run.name: run.figures() for run in runs}
        kept = all(figures["kept"] for figures in figures.values())
        return {"seconds": seconds, "every": every, "clients": figures, "kept": kept}


def main() -> int:
    """The command."""
    words = sys.argv[1:]
    if words == ["client"]:
        client()
        return 0
    seconds = float(words[0]) if words else 3600.0
    every = float(words[1]) if len(words) > 1 else EVERY
    figures = soak(seconds, every)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0 if figures["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
