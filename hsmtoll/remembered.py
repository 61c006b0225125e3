"""
A short text in a file of its own, which later processes read.

Not for secrets, nor for data that must not be lost: after a failed write it is learned again.
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
    """A text in the file *path* (0600, replaced atomically); in memory if there is no path."""

    path: Path | None = None
    text: str | None = None

    def read(self) -> str | None:
        """The current text, as written by this or another process."""
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                self.text = self.path.read_text(encoding="ascii").strip() or self.text
        return self.text

    def write(self, text: str) -> None:
        """Write *text*; if that fails, it is kept in memory and the next process learns it anew."""
        if text == self.read():
            return
        self.text = text
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            files.make_directory(self.path.parent)
            files.replace(self.path, text.encode("ascii"), fsync=False)
