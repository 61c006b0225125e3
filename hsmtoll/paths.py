"""Where a path leads, step by step: whoever may change one decides what is found; and to what."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["check_regular", "exposed", "loose", "reclaim"]

#: Links that the kernel follows on one way (path_resolution(7)).
_LINKS: Final = 40


def loose(path: Path) -> Path | None:
    """
    The first place from which others decide what *path* is; ``None`` if there is none.

    Itself, each link on the way and each directory that is passed must belong to root or this
    user, and nobody else may write it; excepted are a sticky directory such as /tmp, and what is
    mounted read-only, whatever its mode (a ConfigMap's volume has 0777). OSError for what cannot be
    looked at.
    """
    *left, start = reversed(path.absolute().parts)
    here, links = Path(start), 0
    while True:
        seen = here.lstat()
        is_link = stat.S_ISLNK(seen.st_mode)
        sticky = stat.S_ISDIR(seen.st_mode) and seen.st_mode & stat.S_ISVTX
        # The bits of a link say nothing: who may change it is its directory's to say.
        writable = seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (is_link or sticky)
        if seen.st_uid not in {0, os.geteuid()} or (writable and not _read_only(here)):
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


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def exposed(seen: os.stat_result) -> str | None:
    """
    Who else may use a file with a secret in it, in words; ``None`` if nobody may.

    It belongs to root or this user, and nobody else has a right; but root's file of mode 0440 may
    be of a group of ours or root's: so the kubelet (fsGroup) and systemd (credentials) give them.
    """
    mode = stat.S_IMODE(seen.st_mode)
    if seen.st_uid not in {0, os.geteuid()}:
        return f"it belongs to another account (uid {seen.st_uid})"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may read or change it (mode {mode:04o})"
    handed_out = mode == 0o440 and seen.st_uid == 0 and seen.st_gid in {0, *_groups()}
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and not handed_out:
        return f"others may read it (mode {mode:04o})"
    return None


def _groups() -> set[int]:
    return {os.getegid(), *os.getgroups()}


def reclaim(directory: Path) -> None:
    """
    Take a directory of ours, and the files in it, back from a group of ours that was given it all.

    With each mount of a volume with fsGroup the kubelet sets g+rw on every file and g+rwxs on every
    directory in it. Whatever looks otherwise is left as it is, for the check that follows.
    """
    seen = directory.lstat()
    given = stat.S_ISDIR(seen.st_mode) and seen.st_mode & stat.S_ISGID
    if not given or not _of_our_group(seen) or not seen.st_mode & stat.S_IRWXG:
        return
    for each in directory.iterdir():
        there = each.lstat()
        if stat.S_ISREG(there.st_mode) and _of_our_group(there):
            each.chmod(there.st_mode & stat.S_IRWXU)
    directory.chmod(seen.st_mode & stat.S_IRWXU)


def _of_our_group(seen: os.stat_result) -> bool:
    return (
        seen.st_uid == os.geteuid() and seen.st_gid in _groups() and not seen.st_mode & stat.S_IRWXO
    )


def check_regular(path: Path) -> None:
    """
    OSError for what is no regular file, or is not there. A pipe would be waited for without end,
    and be empty when it is read once more.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
