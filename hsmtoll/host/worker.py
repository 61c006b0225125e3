"""
The process that a signing host's device is isolated in: `hsmtoll.host.worker`.

It signs what `hsmtoll.hsm.worker` does, but of grants only those of its profile that the policy
file allows to some caller. The file is read here, whenever another one is in its place.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Final

from hsmtoll.errors import HsmTollError, PolicyDenied, foreign
from hsmtoll.host.policy import Ask, Policy, allows
from hsmtoll.hsm import worker
from hsmtoll.signing.grant import LIFETIME, MIN_LEFT, Read

__all__ = ["Rules", "main"]

_log = logging.getLogger(__name__)

#: Seconds that iat may be ahead of this machine's clock. Behind, a grant may be as old as one that
#: is still given out.
_AHEAD: Final = 10


class Rules:
    """
    What this process signs. *told*: ``policy`` (a path), ``profile``, and what the profile's
    settings fix, else ``None``: ``issuer``, ``kid``, ``certificate_sha256``.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self._path = Path(told["policy"])
        self._told = told
        self._seen: tuple[int, ...] | None = None
        self._policy: Policy | None = None

    def _reread(self) -> None:
        """Read the file where it was changed; one that cannot be used leaves the rules alone."""
        seen = _identity(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._policy = Policy.load(self._path)
        except HsmTollError as exc:
            _log.warning("the device's process keeps the policy that it has: %s", exc)

    def __call__(self, read: Read) -> None:
        """PolicyDenied (``not-allowed``) for a grant that no caller may have."""
        self._check_profile(read)
        request = read.grant.request
        ask = Ask(
            self._told["profile"],
            request.scope,
            request.consumer_org,
            request.resource,
            request.authorization_details,
        )
        self._reread()
        if self._policy is None or not allows(self._policy, ask):
            raise _refused(f"no caller may have it: {foreign(ask.scope)}")

    def _check_profile(self, read: Read) -> None:
        told, grant = self._told, read.grant
        leaf = read.leaf.sha256 if read.leaf is not None else None
        for name, found, expected in (
            ("iss", grant.issuer, told["issuer"] or grant.issuer),
            ("kid", grant.kid, told["kid"] if told["kid"] != "thumbprint" else grant.kid),
            ("x5c", leaf, told["certificate_sha256"] or leaf),
        ):
            if found != expected:
                raise _refused(f"{name} is not the profile's: {foreign(found)}")
        if (told["kid"] is None) != (grant.kid is None):
            raise _refused("the profile's grants have either a kid or certificates")
        age = time.time() - read.iat
        if not -_AHEAD <= age <= LIFETIME - MIN_LEFT:
            raise _refused(f"iat is {age:.0f} s away from this machine's clock")


def _identity(path: Path) -> tuple[int, ...]:
    try:
        seen = path.stat()
    except OSError:
        return ()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def _refused(why: str) -> PolicyDenied:
    return PolicyDenied(
        f"the device's process did not sign: {why}",
        hint="the daemon asked for what its policy file does not allow: was that changed, and not"
        " loaded again?",
        code="not-allowed",
    )


def main(descriptor: int, stderr: int | None = None) -> None:
    """As `hsmtoll.hsm.worker.main`."""
    worker.main(descriptor, stderr, rules=Rules)
