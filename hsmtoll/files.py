"""
Permission checks for files, by one rule for three roles; reading and atomic replacement.

``trust``: code, or files that decide whom to trust. The file and each directory and link on its
path belong to root or this account, and nobody else may write them. ``secret``: in addition nobody
else may read it. ``own``: directories in which this account keeps files; they may not exist yet.
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

from hsmtoll.errors import ConfigurationError, sanitized

__all__ = [
    "NotPrivate",
    "check_own",
    "check_trusted",
    "exposed",
    "first_untrusted_component",
    "make_directory",
    "make_private_directory",
    "not_private",
    "read",
    "reclaim",
    "replace",
    "sync_directory",
]

#: Links that the kernel follows in one path (path_resolution(7)).
_LINKS: Final = 40
#: Bytes. Larger files are refused.
_LARGEST: Final = 16 * 1024 * 1024


def first_untrusted_component(path: Path, *, own: bool = False) -> Path | None:
    """
    The first component through which others can change what *path* is; ``None`` if there is none.

    The file and each directory and link on its path must belong to root or this account, and nobody
    else may write them. Exceptions: sticky directories such as /tmp, and read-only mounts of any
    mode (a ConfigMap's volume has 0777). With *own*, a group without other members may write
    directories (accounts with a group of their own and umask 002 create such), and everybody may
    write a directory of root with mode 2777 and such a group (the kubelet creates it for an
    emptyDir with fsGroup). OSError if a component cannot be examined.
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
        # The mode of a link is meaningless; its directory decides who may replace it.
        writable = seen.st_mode & others and not (is_link or sticky)
        if seen.st_uid not in {0, os.geteuid()} or (writable and not _is_read_only(here)):
            return here
        if is_link:
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(here)  # noqa: PTH115 - a Path would take "pipe:[1]" for a name
            if here.is_relative_to("/proc") and ":[" in target:
                # An open pipe, as of a shell's <(…), has no path.
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
    """Whether this account is the only member of *group*."""
    if group not in _groups():
        return False
    try:
        members = set(grp.getgrgid(group).gr_mem)
    except KeyError:
        # A number without a name, such as a container's fsGroup.
        members = set()
    accounts = pwd.getpwall()
    members |= {each.pw_name for each in accounts if each.pw_gid == group}
    return members <= {each.pw_name for each in accounts if each.pw_uid == os.geteuid()}


def check_trusted(path: Path, what: str) -> None:
    """
    ConfigurationError (``unsafe-file``), beginning with *what*, if others may change *path*: with a
    file that decides what is run, or whom to trust, they could act as this account.
    """
    try:
        place = first_untrusted_component(path)
    except OSError as exc:
        raise ConfigurationError(
            f"{what} {sanitized(path)}: cannot be read ({exc.strerror})"
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
    The bytes of a file in the role ``trust``, or *secret*.

    ConfigurationError, beginning with *what*: ``unsafe-file`` if others may change it, or read a
    secret; with *code* and *hint* if it is not a regular file of at most 16 MiB, or cannot be read.
    """
    try:
        seen = _regular(path)
        if secret and (why := exposed(seen)):
            raise ConfigurationError(
                f"{what} {sanitized(path)}: {why}",
                hint=f"chmod 600 {sanitized(path)}, and replace the secret if others could read it;"
                " in Kubernetes, set defaultMode: 0400 for the Secret and fsGroup for the pod",
                code="unsafe-file",
            )
        check_trusted(path, what)
        return _content(path)
    except OSError as exc:
        raise ConfigurationError(
            f"{what} {sanitized(path)}: cannot be read ({exc.strerror})", hint=hint, code=code
        ) from exc


def _regular(path: Path) -> os.stat_result:
    # Reading a pipe may block for ever, and a second read finds it empty.
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
    Why a file with a secret is exposed to other accounts; ``None`` if it is not.

    It must belong to root or this account, without permissions for others. Exception: a file of
    root with mode 0440 and root's or one of our groups, as the kubelet (fsGroup) and systemd
    (credentials) create them.
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
    Remove the group's permissions from a directory of this account and its files, if the kubelet
    has set them.

    At each mount of a volume with fsGroup the kubelet sets g+rw on all files and g+rwxs on all
    directories in it. Anything else is left unchanged, for the check that follows.
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
    ConfigurationError (``unsafe-file``), beginning with *what*, if others may change the directory
    *path*, or the nearest existing one above it.
    """
    there = path.absolute()
    try:
        while not os.path.lexists(there):
            there = there.parent
        place = first_untrusted_component(there, own=True)
    except OSError as exc:
        raise ConfigurationError(
            f"{what} {sanitized(path)}: cannot be used ({exc.strerror})"
        ) from exc
    if place is not None:
        raise _unsafe(path, what, place)


def _unsafe(path: Path, what: str, place: Path) -> ConfigurationError:
    shown = sanitized(place)
    return ConfigurationError(
        f"{what} {sanitized(path)}: others may change {shown}",
        hint=f"root or you must own it and nobody else may write it: chmod go-w {shown}",
        code="unsafe-file",
    )


def make_directory(path: Path) -> None:
    """Create *path* and missing parents with mode 0700. Raises OSError."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        # One by one: the mode given to makedirs applies to the last directory only.
        each.mkdir(mode=0o700, exist_ok=True)


class NotPrivate(PermissionError):
    """Others can use or replace a directory. *place*: that one, or the one above it."""

    def __init__(self, why: str, place: Path) -> None:
        super().__init__(errno.EPERM, why)
        self.place = place


def make_private_directory(path: Path) -> None:
    """
    Create *path* (mode 0700) if it is missing, after `reclaim`. Raises NotPrivate if another
    account can use it, or can change a directory above it; OSError.
    """
    make_directory(path)
    reclaim(path)
    if (why := not_private(path.lstat(), stat.S_IFDIR)) is not None:
        raise NotPrivate(why, path)
    if (place := first_untrusted_component(path, own=True)) is not None:
        raise NotPrivate(f"others can change {sanitized(place)}", place)


def not_private(seen: os.stat_result, kind: int) -> str | None:
    """Why *seen* is no file of *kind* (such as ``stat.S_IFREG``) for this account alone."""
    if stat.S_IFMT(seen.st_mode) != kind:
        return "is not a file or directory of this program"
    if seen.st_uid != os.geteuid():
        return "belongs to another account"
    if mode := stat.S_IMODE(seen.st_mode) & 0o077:
        may = "change" if mode & 0o022 else "read"
        return f"others can {may} it, mode {stat.S_IMODE(seen.st_mode):04o}"
    return None


def replace(path: Path, data: bytes, *, mode: int = 0o600, fsync: bool = True) -> None:
    """
    Write *data* to *path* with *mode* (less the umask), atomically: a reader finds the whole old
    file or the whole new one. With *fsync*, the new one is on disk when this returns.

    A link is replaced, not its target. OSError if *path* cannot be written, or exists and is not a
    regular file, such as /dev/null.
    """
    with contextlib.suppress(FileNotFoundError):
        _regular(path)
    # An unpredictable name: several processes may write at once, and /tmp is shared.
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
    """fsync the directory *path*: files that were created, replaced or removed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
