"""
When certificates and registered keys end, and how long before it is said.

A registered key expires one year after it was posted (M39), a date that only Maskinporten knows.
The day of its first grant on this machine is the nearest one that is known here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from hsmtoll.remembered import PersistedText

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KEY_LIFETIME", "KEY_NOTICE", "NOTICE_DAYS", "KeyUses", "days_left"]

#: Days before a certificate ends: issuers take weeks to deliver a new one.
NOTICE_DAYS: Final = 60

#: After the first use of a registered key: when it ends, and when that is said.
KEY_LIFETIME: Final = timedelta(days=365)
KEY_NOTICE: Final = timedelta(days=330)


def days_left(end: datetime, now: datetime) -> int:
    """Whole days from *now* to *end*; negative after it."""
    return (end - now).days


@dataclass(slots=True)
class KeyUses:
    """
    The first use of each registered key of the client *iss* at the Maskinporten *issuer*, in files
    of *directory* (HSMTOLL_STATE).
    """

    directory: Path
    issuer: str
    iss: str
    #: The keys that have signed in this process.
    kids: set[str] = field(default_factory=set)

    def used(self, kid: str, now: float) -> None:
        """Note that *kid* has signed a grant *now* (POSIX time)."""
        if kid in self.kids:
            return
        self.kids.add(kid)
        if self.first(kid) is None:
            when = datetime.fromtimestamp(now, UTC)
            PersistedText(self.path(kid)).write(when.isoformat(timespec="seconds"))

    def first(self, kid: str) -> datetime | None:
        """When *kid* was first used here; None if it was not, or that is not known any more."""
        try:
            when = datetime.fromisoformat(PersistedText(self.path(kid)).read() or "")
        except ValueError:
            return None
        return when if when.tzinfo is not None else None

    def path(self, kid: str) -> Path:
        """The file to remove when the same key was posted again."""
        name = f"{self.issuer}\n{self.iss}\n{kid}"
        return self.directory / f"key-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
