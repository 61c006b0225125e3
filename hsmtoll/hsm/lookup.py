"""
What a device finds on its token after the login: certificates, and the key.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from pkcs11 import exceptions as p11

from hsmtoll.hsm.codes import about_the_device, describe
from hsmtoll.hsm.facts import StoredCertificate
from hsmtoll.hsm.reading import certificates_of, device_uri
from hsmtoll.hsm.select import on_other_tokens

if TYPE_CHECKING:
    from pkcs11 import Session

    from hsmtoll.hsm.connection import Handles
    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.hsm.login import PinLogin
    from hsmtoll.hsm.select import KeySelector
    from hsmtoll.jws import RsaPublicKey

__all__ = ["Lookup"]

_log = logging.getLogger(__name__)


class Lookup:
    """Finds what *selector* selects, after a login by *pin_login*."""

    def __init__(self, selector: KeySelector, pin_login: PinLogin) -> None:
        self._selector = selector
        self._pin_login = pin_login

    def certificates(
        self, handles: Handles, *, near: bool, force_login: bool
    ) -> tuple[StoredCertificate, ...]:
        """As `Device.certificates`."""
        if force_login:
            self._pin_login.force_log_in(handles)
        else:
            self._pin_login.log_in(handles)
        try:
            return self._selector.certificates(handles.session, near=near)
        except p11.PKCS11Error as exc:
            if about_the_device(exc):
                raise
            # Raises if the device is gone. If only the search for certificates fails, that does
            # not matter as long as they are all in a file.
            handles.token.slot.get_token()
            _log.info("reading certificates once more after: %s", describe(exc))
        handles.new_session()
        try:
            return self._selector.certificates(handles.session, near=near)
        except p11.PKCS11Error as exc:
            if about_the_device(exc):
                raise
            return (StoredCertificate(b"", "", b"", f"the search was answered {describe(exc)}"),)

    def other_certificates(self, handles: Handles) -> tuple[StoredCertificate, ...]:
        """As `Device.other_certificates`."""

        def certificates(session: Session) -> list[StoredCertificate]:
            where = str(device_uri(session.token))
            return [replace(each, label=where) for each in certificates_of(session)]

        found = on_other_tokens(handles.module, handles.token, certificates)
        return tuple(each for some in found for each in some)

    def key(self, handles: Handles, candidates: tuple[RsaPublicKey, ...]) -> KeyFacts:
        """As `Device.key`; its handle is then in *handles*, until the next login."""
        self._pin_login.log_in(handles)
        if handles.facts is not None and handles.found_with is handles.login.anchor:
            return handles.facts
        found = self._selector.keys(handles.session)
        # Some tokens hide private keys before a login without CKF_LOGIN_REQUIRED.
        if not found and self._pin_login.force_log_in(handles):
            found = self._selector.keys(handles.session)
        if not found:
            raise self._selector.missing_key_error(
                handles.module, handles.token, handles.session, logged_in=handles.login.is_logged_in
            )
        handles.key, handles.facts = self._selector.choose_key(
            handles.module, handles.session, found, candidates
        )
        handles.found_with = handles.login.anchor
        return handles.facts
