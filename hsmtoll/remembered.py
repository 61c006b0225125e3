"""
A small fact that this machine remembers from one process to the next, in a file of its own.

Nothing secret and nothing that must not be lost: what cannot be kept is learned again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsmtoll import files

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PersistedText"]


@dataclass(slots=True)
class PersistedText:
    """Text at *path*, replaced whole, 0600; without a path, or a disk, in memory."""

    path: Path | None = None
    text: str | None = None

    def read(self) -> str | None:
        """What is known now, by this process or another one."""
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                self.text = self.path.read_text(encoding="ascii").strip() or self.text
        return self.text

    def write(self, text: str) -> None:
        """Keep *text*; a disk that is full or closed costs the next process a lesson, no more."""
        if text == self.read():
            return
        self.text = text
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            files.make_directory(self.path.parent)
            files.replace(self.path, text.encode("ascii"), fsync=False)
