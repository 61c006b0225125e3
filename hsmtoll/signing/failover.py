"""
A Signer with several keys in order of preference.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import CertificateError, ConfigurationError, DeviceError, HsmTollError
from hsmtoll.signing.local import LocalSigner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hsmtoll.signing.grant import SignedGrant
    from hsmtoll.token import TokenRequest

__all__ = ["FailoverSigner"]

_log = logging.getLogger(__name__)

#: Errors after which the next key is tried; not a wrong PIN, which the user must correct.
_FAILOVER_ERRORS: Final = (DeviceError, CertificateError)


class FailoverSigner:
    """
    Several keys in order of preference: the first usable one signs (device up, certificate valid).
    A key whose new certificate was rejected lately comes last. A device that is down raises
    ``device-down`` at once until its back-off has passed.
    """

    def __init__(self, signers: Sequence[LocalSigner]) -> None:
        self._signers = tuple(signers)
        self._in_use = self._signers[0] if self._signers else None

    def known_identity(self) -> str | None:
        """As `Signer.known_identity`, of the key that signed last."""
        return self._in_use.known_identity() if self._in_use is not None else None

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """A grant by the first usable key; if none is usable, the error of the first one."""
        first: HsmTollError | None = None
        for signer in sorted(self._signers, key=LocalSigner.rejected_lately):
            try:
                grant = signer.sign(request, jti=jti)
            except _FAILOVER_ERRORS as exc:
                # The first key's error is raised if all fail.
                first = first or exc
                first.signed |= exc.signed
            else:
                self._log_change(signer, first)
                return grant
        raise first or ConfigurationError("HSMTOLL_HSM__KEY: no key is named")

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """As `LocalSigner.rejected`; also True if another key is preferred from now on."""
        for signer in self._signers:
            if signer.known_identity() == grant.identity:
                before = signer.rejected_lately()
                if signer.rejected(grant, code):
                    return True
                return not before and signer.rejected_lately() and len(self._signers) > 1
        return False

    def _log_change(self, signer: LocalSigner, why: HsmTollError | None) -> None:
        """Log once when another key is used, and when the first is used again."""
        if signer is self._in_use:
            return
        self._in_use = signer
        number, of = self._signers.index(signer) + 1, len(self._signers)
        _log.warning("key %d of %d signs now%s", number, of, f": {why}" if why else "")
