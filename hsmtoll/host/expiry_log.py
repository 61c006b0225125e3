"""Logs, once a day, which certificates and registered keys of a signing host end soon."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hsmtoll import files
from hsmtoll.errors import HsmTollError, sanitized
from hsmtoll.expiry import KEY_LIFETIME, KEY_NOTICE, NOTICE_DAYS, days_left
from hsmtoll.x509.certificate_files import certificates_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from hsmtoll.clock import Clock
    from hsmtoll.host.profiles import Profile
    from hsmtoll.settings import Host
    from hsmtoll.x509.certificate import Certificate

__all__ = ["ExpiryLog", "first_to_end"]

_log = logging.getLogger("hsmtoll.host")

#: Seconds between two looks, and between two lines about the same thing.
_EVERY: Final = 600.0
_DAY: Final = 86_400.0


@dataclass(slots=True)
class ExpiryLog:
    """The notices of one host. *clock* has the date; days pass by its boot clock."""

    host: Host
    profiles: Iterable[Profile]
    clock: Clock
    _next: float = 0.0
    _logged: dict[str, float] = field(default_factory=dict)

    def log_due(self) -> None:
        """Called by a timer: log what ends soon, each once a day."""
        now = self.clock.now()
        if now.boot < self._next:
            return
        self._next = now.boot + _EVERY
        for what, when, event, profile in self._ending(datetime.fromtimestamp(now.wall, UTC)):
            if now.boot >= self._logged.get(what, now.boot - _DAY) + _DAY:
                self._logged[what] = now.boot
                _log.warning("%s %s", what, when, extra={"event": event, "profile": profile})

    def _ending(self, now: datetime) -> Iterator[tuple[str, str, str, str | None]]:
        """What ends, when (in words), event and profile of each."""
        for profile in self.profiles:
            name = sanitized(profile.name)
            if profile.not_after is not None and days_left(profile.not_after, now) < NOTICE_DAYS:
                what = f"profile {name}: the certificate"
                yield what, _ends(profile.not_after, now), "certificate-ends-soon", profile.name
            for kid in sorted(profile.kids()):
                first = profile.app.key_uses.first(kid)
                if first is not None and now >= first + KEY_NOTICE:
                    what = (
                        f"profile {name}: the registered key {sanitized(kid)}, first used on "
                        f"{first:%Y-%m-%d},"
                    )
                    when = f"{_ends(first + KEY_LIFETIME, now)} or earlier, if it was not renewed"
                    yield what, when, "key-ends-soon", profile.name
        for path, variable, event in (
            (self.host.cert, "HSMTOLL_HOST__CERT", "tls-certificate-ends-soon"),
            (self.host.client_ca, "HSMTOLL_HOST__CLIENT_CA", "tls-client-ca-ends-soon"),
        ):
            if path is None:
                continue
            try:
                end = first_to_end(path, variable).not_after
            except HsmTollError:
                # A reload says what is wrong with the file.
                continue
            if days_left(end, now) < NOTICE_DAYS:
                yield f"{variable}:", _ends(end, now), event, None


def _ends(end: datetime, now: datetime) -> str:
    if end < now:
        return f"expired on {end:%Y-%m-%d}"
    return f"expires on {end:%Y-%m-%d}, {days_left(end, now)} days left"


def first_to_end(path: Path, name: str) -> Certificate:
    """The certificate in *path*, the setting *name*, that ends first. Raises ConfigurationError."""
    found = certificates_in(files.read(path, name), f"{name} {sanitized(path)}")
    return min(found, key=lambda each: each.not_after)
