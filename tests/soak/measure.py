"""What a process holds, as Linux tells it, and how that grows."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
from pathlib import Path
from statistics import median

__all__ = ["children", "descriptors", "in_use", "memory", "slope"]


def memory(process: int | str = "self") -> int:
    """Bytes of *process* that are its own (anonymous, resident)."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no RssAnon")


class _Malloc(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and newer."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def in_use() -> int:
    """
    Bytes that this process has allocated and not freed, whatever its allocator holds on to for
    the next thread: that grows with how busy a machine is. Python's own objects are among them
    with PYTHONMALLOC=malloc. Without glibc 2.33 it is `memory`.
    """
    gc.collect()
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return memory()
    ask.restype = _Malloc
    info = ask()
    return int(info.uordblks) + int(info.hblkhd)


def descriptors(process: int | str = "self") -> int:
    """Open files of *process*."""
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def children(parent: int | None = None) -> list[int]:
    """
    The process ids of the children of *parent* (this process), whichever thread started them.

    By what each process says of its parent: the lists that the threads keep of their children
    miss one whose thread ends, and hands it on, while they are read.
    """
    parent = parent or os.getpid()
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at.
        with contextlib.suppress(OSError):
            # Its name, in brackets, may hold anything; state and parent follow the last one.
            _, _, rest = (each / "stat").read_text("utf-8", "replace").rpartition(")")
            if int(rest.split()[1]) == parent:
                found.append(int(each.name))
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """
    Growth for each unit of x: the median of the slopes between any two points (Theil, Sen).

    An allocator grows in steps: one of half a megabyte says nothing about what comes after it,
    and would tilt a line of least squares by more than a leak that is worth finding.
    """
    between = [
        (y2 - y1) / (x2 - x1)
        for (x1, y1), (x2, y2) in itertools.combinations(points, 2)
        if x1 != x2
    ]
    return median(between) if between else 0.0
