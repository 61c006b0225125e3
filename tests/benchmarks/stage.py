"""What every benchmark uses: a device, the services, settings, a C loop, and turns between two."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.app import App
from hsmtoll.settings import load
from hsmtoll.testing.identity import TemporaryIdentity, eseal, register_identity
from hsmtoll.testing.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.faults import Faults

HERE: Final = Path(__file__).parent
ROUNDS: Final = 5


@dataclass(frozen=True)
class Row:
    """One line of the table. *ours* and *bare* are medians in *unit*; *goal* is for the ratio."""

    what: str
    against: str
    unit: str
    ours: float
    bare: float
    goal: str

    @property
    def ratio(self) -> float:
        """Ours by bare."""
        return self.ours / self.bare if self.bare else float("nan")


def table(rows: Iterable[Row]) -> list[str]:
    """The lines of a table in Markdown."""
    return [
        "| what | against | ours | bare | ratio | goal |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.what} | {row.against} | {row.ours:.4g} {row.unit} | {row.bare:.4g} {row.unit} "
            f"| {row.ratio:.2f} | {row.goal} |"
            for row in rows
        ),
    ]


@dataclass(frozen=True)
class Series:
    """One line of a plot: *name* and its points."""

    plot: str
    name: str
    points: tuple[tuple[float, float], ...]


def turns(
    ours: Callable[[], float], bare: Callable[[], float], rounds: int = ROUNDS
) -> tuple[float, float]:
    """Medians of both sides, which take turns."""
    pairs = [(ours(), bare()) for _ in range(rounds)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def per_second(work: Callable[[], object], seconds: float) -> float:
    """How often *work* is done in a second."""
    until, done, began = time.perf_counter() + seconds, 0, time.perf_counter()
    while time.perf_counter() < until:
        work()
        done += 1
    return done / (time.perf_counter() - began)


def seconds_of(work: Callable[[], object]) -> float:
    """How long *work* takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Stage:
    """The device, the services and the settings that every benchmark uses."""

    def __init__(self, folder: Path, sandbox: Sandbox) -> None:
        self.folder = folder
        self.sandbox = sandbox
        self.device = SoftHsm.create(folder / "softhsm")
        self.who: TemporaryIdentity = eseal(self.device)
        register_identity(sandbox, self.who)
        self.environ = {
            **self.who.environ(),
            **sandbox.environ(),
            "HSMTOLL_STATE": str(folder / "state"),
            # The benchmark spends what nobody else would.
            "HSMTOLL_BUDGET__PER_HOUR": "100000",
        }
        os.environ.update(self.environ)
        self.loop = folder / "loop"
        subprocess.run(["cc", "-O2", "-w", "-o", self.loop, HERE / "loop.c", "-ldl"], check=True)

    def app(self, **changes: Any) -> App:
        """Fresh parts."""
        return App(load(**changes))

    @cached_property
    def length(self) -> int:
        """Bytes that are signed for one assertion."""
        app = self.app()
        try:
            assertion = app.signer.sign(app.token_service.request("road"), jti="1").assertion
            return len(assertion.rpartition(".")[0])
        finally:
            app.close()

    def bare_signatures(
        self, seconds: float, processes: int = 1, faults: Faults | None = None
    ) -> float:
        """Signatures a second of the C loop, of all *processes* together; slowed by *faults*."""
        module = self.device.module if faults is None else faults.module
        variables = {} if faults is None else faults.environ()
        where = (self.loop, module, self.device.label, self.who.key_label)
        argv = [*map(str, where), str(seconds), str(self.length)]
        running = []
        for _ in range(processes):
            one = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | variables,
            )  # fmt: skip
            assert one.stdin is not None
            assert one.stdout is not None
            one.stdin.write(f"{self.device.pin}\n")
            one.stdin.flush()
            assert one.stdout.readline() == "ready\n"
            running.append(one)
        for one in running:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        return sum(float(one.communicate()[0]) for one in running)

    def command(self, *argv: str, **environ: str) -> float:
        """Seconds of one command, with bytecode beside the sources as an installation has it."""
        full = {**os.environ, "PYTHONPYCACHEPREFIX": str(self.folder / "bytecode"), **environ}
        full.pop("PYTHONDONTWRITEBYTECODE", None)
        return seconds_of(
            lambda: subprocess.run(argv, env=full, check=True, stdout=subprocess.DEVNULL)
        )
