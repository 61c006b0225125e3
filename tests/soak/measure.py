"""What a process holds, as Linux tells it, and how that grows."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["children", "descriptors", "memory", "slope"]


def memory(process: int | str = "self") -> int:
    """Bytes of *process* that are its own (anonymous, resident)."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no RssAnon")


def descriptors(process: int | str = "self") -> int:
    """Open files of *process*."""
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def children() -> list[int]:
    """The process ids of this process's children, whichever thread started them."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        # A thread may end while it is looked at.
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Growth for each unit of x: the line of least squares."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    over = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return over / (sum((x - mean_x) ** 2 for x, _ in points) or 1.0)
