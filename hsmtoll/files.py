"""
Permission checks for files, in one rule with three roles; reading and atomic replacement.

``trust``: code, or what decides whom to trust: root or this account owns it and each directory and
link on the way, and nobody else may write there. ``secret``: nobody else may read it either.
``own``: what this account keeps there; it may be missing still.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import secrets
import stat
from pathlib import Path
from typing import Final

from hsmtoll.errors import ConfigurationError, foreign

__all__ = [
    "check_own",
    "check_trusted",
    "exposed",
    "first_untrusted_component",
    "make_directory",
    "read",
    "reclaim",
    "replace",
    "sync_directory",
]

#: Links that the kernel follows on one way (path_resolution(7)).
_LINKS: Final = 40
#: A file that is read whole is no larger.
_LARGEST: Final = 16 * 1024 * 1024


def first_untrusted_component(path: Path, *, own: bool = False) -> Path | None:
    """
    The first place from which others decide what *path* is; ``None`` if there is none.

    Itself, each link on the way and each directory that is passed must belong to root or this
    account, and nobody else may write it; excepted are a sticky directory such as /tmp, and what is
    mounted read-only, whatever its mode (a ConfigMap's volume has 0777). With *own*, a group that
    has no other member may write directories, as accounts with a group of their own and a umask of
    002 make them; and everybody, where root gave such a group a directory with the mode 2777, as
    the kubelet does with an emptyDir and fsGroup. OSError for what cannot be looked at.
    """
    *left, start = reversed(path.absolute().parts)
    here, links = Path(start), 0
    while True:
        seen = here.lstat()
        is_link = stat.S_ISLNK(seen.st_mode)
        is_directory = stat.S_ISDIR(seen.st_mode)
        sticky = is_directory and seen.st_mode & stat.S_ISVTX
        others = stat.S_IWGRP | stat.S_IWOTH
        if own and is_directory and seen.st_mode & stat.S_IWGRP and _is_private(seen.st_gid):
            is_volume = seen.st_mode & stat.S_ISGID and seen.st_uid == 0 != seen.st_gid
            others = 0 if is_volume else stat.S_IWOTH
        # The bits of a link say nothing: who may change it is its directory's to say.
        writable = seen.st_mode & others and not (is_link or sticky)
        if seen.st_uid not in {0, os.geteuid()} or (writable and not _is_read_only(here)):
            return here
        if is_link:
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(here)  # noqa: PTH115 - a Path would take "pipe:[1]" for a name
            if here.is_relative_to("/proc") and ":[" in target:
                # An open pipe, as a shell's <(…): it has no way to it.
                return None
            left += reversed(Path(target).parts)
            here = here.parent
        if not left:
            return None
        step = left.pop()
        here = here.parent if step == ".." else here / step


def _is_read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)


def _is_private(group: int) -> bool:
    """Whether this account is in *group*, and the system knows no other account that is."""
    if group not in _groups():
        return False
    try:
        members = set(grp.getgrgid(group).gr_mem)
    except KeyError:
        # A bare number, as a container's fsGroup.
        members = set()
    accounts = pwd.getpwall()
    members |= {each.pw_name for each in accounts if each.pw_gid == group}
    return members <= {each.pw_name for each in accounts if each.pw_uid == os.geteuid()}


def check_trusted(path: Path, what: str) -> None:
    """
    ConfigurationError (``unsafe-file``) where others may change *path*. *what* it is begins the
    message. Whoever can write a file that decides what is run, or whom to trust, is this account.
    """
    try:
        place = first_untrusted_component(path)
    except OSError as exc:
        raise ConfigurationError(
            f"{what} {foreign(path)}: cannot be read ({exc.strerror})"
        ) from exc
    if place is not None:
        raise _unsafe(path, what, place)


def read(
    path: Path,
    what: str,
    *,
    secret: bool = False,
    code: str | None = None,
    hint: str | None = None,
) -> bytes:
    """
    The bytes of a file in the role trust or *secret*.

    ConfigurationError, which begins with *what* it is: ``unsafe-file`` where others may change it,
    or read a secret; *code* and *hint* for what is no regular file of 16 MiB at most, or cannot be
    read.
    """
    try:
        seen = _regular(path)
        if secret and (why := exposed(seen)):
            raise ConfigurationError(
                f"{what} {foreign(path)}: {why}",
                hint=f"chmod 600 {foreign(path)}, and make a new one if it was open for long;"
                " a Secret of Kubernetes has defaultMode: 0400 and the pod a fsGroup",
                code="unsafe-file",
            )
        check_trusted(path, what)
        return _content(path)
    except OSError as exc:
        raise ConfigurationError(
            f"{what} {foreign(path)}: cannot be read ({exc.strerror})", hint=hint, code=code
        ) from exc


def _regular(path: Path) -> os.stat_result:
    # A pipe would be waited for without end, and be empty when it is read once more.
    seen = path.stat()
    if not stat.S_ISREG(seen.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return seen


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise OSError(errno.EFBIG, f"more than {_LARGEST // 1024 // 1024} MiB")
    return data


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


def check_own(path: Path, what: str) -> None:
    """
    ConfigurationError (``unsafe-file``) where others may change the directory *path*, or the
    nearest one above it that is there already.
    """
    there = path.absolute()
    try:
        while not os.path.lexists(there):
            there = there.parent
        place = first_untrusted_component(there, own=True)
    except OSError as exc:
        raise ConfigurationError(
            f"{what} {foreign(path)}: cannot be used ({exc.strerror})"
        ) from exc
    if place is not None:
        raise _unsafe(path, what, place)


def _unsafe(path: Path, what: str, place: Path) -> ConfigurationError:
    shown = foreign(place)
    return ConfigurationError(
        f"{what} {foreign(path)}: others may change {shown}",
        hint=f"root or you must own it and nobody else may write it: chmod go-w {shown}",
        code="unsafe-file",
    )


def make_directory(path: Path) -> None:
    """Make *path*, and what is missing above it, for this account alone (0700). OSError."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        # One after the other: a mode given to makedirs is for the last directory alone.
        each.mkdir(mode=0o700, exist_ok=True)


def replace(path: Path, data: bytes, *, mode: int = 0o600, fsync: bool = True) -> None:
    """
    Make *path* a file of *data* and *mode* (less the umask), in one step: a reader finds the old
    file or the new one, whole. With *fsync*, the new one is on the disk when this returns.

    A link is replaced, not what it leads to. OSError for what cannot be written, or is there and
    is no regular file, such as /dev/null.
    """
    with contextlib.suppress(FileNotFoundError):
        _regular(path)
    # A name that nobody can guess: several processes may write at once, and /tmp is shared.
    draft = path.with_name(f".{secrets.token_hex(8)}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(draft, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if fsync:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    if fsync:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring the names in the directory *path* to the disk: what is new, replaced or removed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
