"""Where a path leads, step by step: whoever may change one decides what is found; and to what."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["check_regular", "loose"]

#: Links that the kernel follows on one way (path_resolution(7)).
_LINKS: Final = 40


def loose(path: Path) -> Path | None:
    """
    The first place from which others decide what *path* is; ``None`` if there is none.

    Itself, each link on the way and each directory that is passed must belong to root or this
    user, and nobody else may write it, a sticky directory such as /tmp excepted. OSError for what
    cannot be looked at.
    """
    *left, start = reversed(path.absolute().parts)
    here, links = Path(start), 0
    while True:
        seen = here.lstat()
        is_link = stat.S_ISLNK(seen.st_mode)
        sticky = stat.S_ISDIR(seen.st_mode) and seen.st_mode & stat.S_ISVTX
        # The bits of a link say nothing: who may change it is its directory's to say.
        writable = seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (is_link or sticky)
        if seen.st_uid not in {0, os.geteuid()} or writable:
            return here
        if is_link:
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            left += reversed(here.readlink().parts)
            here = here.parent
        if not left:
            return None
        step = left.pop()
        here = here.parent if step == ".." else here / step


def check_regular(path: Path) -> None:
    """
    OSError for what is no regular file, or is not there. A pipe would be waited for without end,
    and be empty when it is read once more.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
