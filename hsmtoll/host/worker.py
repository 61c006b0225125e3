"""
The worker process of a signing host's device (module `hsmtoll.host.worker`).

As `hsmtoll.hsm.worker`, but it signs only grants of its profile that the policy permits to some
caller. It reads the policy file itself, again whenever the file has changed.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Final

from hsmtoll.errors import HsmTollError, PolicyDenied, sanitized
from hsmtoll.host.policy import GrantRequest, Policy, allows
from hsmtoll.hsm import worker
from hsmtoll.signing.grant import LIFETIME, MIN_LEFT, ParsedGrant

__all__ = ["Rules", "main"]

_log = logging.getLogger(__name__)

#: Seconds that iat may be ahead of this machine's clock.
_AHEAD: Final = 10


class Rules:
    """
    Decides what this process signs. *opening*: ``policy`` (a path), ``profile``, and ``issuer``,
    ``kid`` and ``certificate_sha256`` of the profile's settings, ``None`` where not set.
    """

    def __init__(self, opening: dict[str, Any]) -> None:
        self._path = Path(opening["policy"])
        self._opening = opening
        self._seen: tuple[int, ...] | None = None
        self._policy: Policy | None = None

    def _reread(self) -> None:
        """Reload the policy if the file has changed; keep the previous one if it is invalid."""
        seen = _identity(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._policy = Policy.load(self._path)
        except HsmTollError as exc:
            _log.warning("the device's process keeps the previous policy: %s", exc)

    def __call__(self, read: ParsedGrant) -> None:
        """PolicyDenied (``not-allowed``) for a grant that the policy permits to no caller."""
        self._check_profile(read)
        request = read.grant.request
        grant_request = GrantRequest(
            self._opening["profile"],
            request.scope,
            request.consumer_org,
            request.resource,
            request.authorization_details,
        )
        self._reread()
        if self._policy is None or not allows(self._policy, grant_request):
            raise _refused(f"the policy allows it to no caller: {sanitized(grant_request.scope)}")

    def _check_profile(self, read: ParsedGrant) -> None:
        opening, grant = self._opening, read.grant
        leaf = read.leaf.sha256 if read.leaf is not None else None
        for name, found, expected in (
            ("iss", grant.issuer, opening["issuer"] or grant.issuer),
            ("kid", grant.kid, opening["kid"] if opening["kid"] != "thumbprint" else grant.kid),
            ("x5c", leaf, opening["certificate_sha256"] or leaf),
        ):
            if found != expected:
                raise _refused(f"{name} is not the profile's: {sanitized(found)}")
        if (opening["kid"] is None) != (grant.kid is None):
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
        hint="the policy file does not allow this grant: was it changed without a reload?",
        code="not-allowed",
    )


def main(descriptor: int, stderr: int | None = None) -> None:
    """As `hsmtoll.hsm.worker.main`."""
    worker.main(descriptor, stderr, rules=Rules)
