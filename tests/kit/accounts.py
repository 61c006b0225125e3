"""
Another account, for tests of what others may do: root alone can become one.

A test that does so is marked ``needs_root``; where nobody is root it says so and skips, alone
(`tests/conftest.py`). `become` is for processes that a test started: ``python -c "from
tests.kit.accounts import become; …"`` with `importable`.
"""

from __future__ import annotations

import codecs
import functools
import importlib
import os
import pkgutil
import subprocess
from pathlib import Path
from typing import Final

#: The number of an account that is nobody's.
OTHER: Final = 41001

#: Why a test that is marked ``needs_root`` did not run.
NEEDS_ROOT: Final = "needs root: another account, files that are given to one, or a system daemon"

#: The same where root is one who may not make namespaces, as in many containers.
NEEDS_NAMESPACES: Final = f"{NEEDS_ROOT}; and namespaces (CAP_SYS_ADMIN)"


@functools.cache
def is_root() -> bool:
    """Whether this account can become another one: root's number alone does not say so."""
    try:
        subprocess.run(["true"], user=OTHER, group=OTHER, extra_groups=(), check=True, cwd="/")
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def importable() -> dict[str, str]:
    """The variables with which a process of its own finds this module."""
    return {"PYTHONPATH": str(Path(__file__).parents[2])}


def import_all() -> None:
    """
    Import every module of hsmtoll, and what they import late: the tree and this Python may lie
    where the other account cannot look.
    """
    import hsmtoll

    for name in ("ascii", "idna", "latin-1", "utf-8-sig"):
        codecs.lookup(name)
    for each in pkgutil.walk_packages(hsmtoll.__path__, "hsmtoll."):
        if not each.name.endswith("__main__"):
            importlib.import_module(each.name)


def become(uid: int, gid: int | None = None) -> None:
    """Make this process one of another account, for good."""
    os.chdir("/")
    os.setgroups([])
    gid = uid if gid is None else gid
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
