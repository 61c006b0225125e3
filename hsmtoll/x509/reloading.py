"""
A certificate file that is read again when it changes; an unusable new file is not used.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.x509.certificate_files import Bundle, bundle_in

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["CertificateFile"]

_log = logging.getLogger(__name__)

#: Certificates that cannot be read are named up to this number, and counted beyond it.
_SHOWN: Final = 10


class CertificateFile:
    """
    The certificates of the file at *path*; *name* is the setting, for messages. A call returns the
    same `Bundle` until the file changes, by inode, size and times.

    ConfigurationError if the file was never usable. If it becomes unusable later, the last good
    bundle is kept, with one warning for each version of the file.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._setting = name
        self._name = f"{name} {sanitized(path)}"
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._bundle: Bundle | None = None

    def __call__(self, *, afresh: bool = False) -> Bundle:
        """The bundle; *afresh* reads the file even if it seems unchanged."""
        with self._lock:
            try:
                identity = _identity(self._path.stat())
                if self._bundle is not None and identity == self._seen and not afresh:
                    return self._bundle
                raw = files.read(self._path, self._setting)
                return self._accept(bundle_in(raw, self._name), identity)
            except OSError as exc:
                error = ConfigurationError(f"{self._name}: cannot be read ({exc.strerror})")
                identity = ()
            except ConfigurationError as exc:
                error = exc
            if self._bundle is None:
                raise error
            if identity != self._seen or afresh:
                _log.warning("%s; its previous certificates are kept", error)
            self._seen = identity
            return self._bundle

    def _accept(self, bundle: Bundle, identity: tuple[int, ...]) -> Bundle:
        self._seen = identity
        for each in bundle.unreadable[:_SHOWN]:
            _log.info("%s is left out: %s", each.where, each.why)
        if len(bundle.unreadable) > _SHOWN:
            _log.info("%s: %d others are left out", self._name, len(bundle.unreadable) - _SHOWN)
        # Equal certificates: keep the same object, so that users see no change.
        if self._bundle == bundle:
            return self._bundle
        if self._bundle is not None:
            _log.info("%s: read again, %d certificates", self._name, len(bundle.certificates))
        self._bundle = bundle
        return bundle


def _identity(seen: os.stat_result) -> tuple[int, ...]:
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns
