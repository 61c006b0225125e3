"""
The module, the session and the login that a device has open, and the session for writing.

Everything here is called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from pkcs11 import Attribute, ObjectClass
from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError, sanitized
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import SESSION_LIMIT_ERRORS
from hsmtoll.hsm.module import is_current, open_module
from hsmtoll.hsm.reading import login_key, token_identity

if TYPE_CHECKING:
    from pkcs11 import Object, Session, Token

    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.pin import Pin, PinSource
    from hsmtoll.hsm.select import KeySelector

__all__ = ["Connection", "Handles", "Login"]

#: The fields of the tuple that `named` returns.
_IDENTITY_FIELDS: Final = ("manufacturer", "model", "serial", "label")


@dataclass(slots=True, eq=False)
class Login:
    """The login of this process on one PKCS#11 token, shared by all devices on it."""

    module: Module
    #: The session that logged in; closing it logs out all sessions on the token.
    anchor: Session | None = None
    logged_in_by_others: bool = False
    pin: Pin | None = field(default=None, repr=False)
    source: PinSource | None = field(default=None, repr=False)
    #: The connections of this process that use it.
    users: WeakSet[Connection] = field(default_factory=WeakSet)
    #: A login is required although the token has no flag CKF_LOGIN_REQUIRED.
    wanted: bool = False
    #: The mechanism that includes the hash fails: hash here and sign with CKM_RSA_PKCS.
    hash_here: bool = False

    @property
    def is_logged_in(self) -> bool:
        """Whether this process is logged in to the token."""
        return self.anchor is not None or self.logged_in_by_others

    def end(self) -> None:
        """Log out; all sessions of the process on this token lose their private keys."""
        self.module.close(self.anchor)
        self.anchor, self.logged_in_by_others = None, False

    def session(self, token: Token) -> Session:
        """Open a session, or return the login's if the device has no further one."""
        try:
            return token.open()
        except SESSION_LIMIT_ERRORS:
            if self.anchor is None:
                raise
            return self.anchor

    def release(self, session: Session) -> None:
        """Close what `session` returned, unless it is the login's."""
        if session is not self.anchor:
            self.module.close(session)

    def alive(self) -> bool:
        """Whether the login still works, so that a restart of the module would end it."""
        if self.anchor is None:
            return self.logged_in_by_others
        try:
            self.anchor.token.slot.get_token()
            # Search for an object that does not exist: fast, even on a device with many objects.
            cryptoki.find_objects(
                self.anchor, {Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: "hsmtoll"}
            )
        except p11.PKCS11Error:
            return False
        return True


@dataclass(slots=True, eq=False)
class Handles:
    """The handles of one device. All are stale after a restart of the module or a new login."""

    module: Module
    token: Token
    login: Login
    session: Session
    key: Object | None = None
    found_with: Session | None = None
    facts: KeyFacts | None = None

    def new_session(self) -> None:
        """Replace the session, which a failed operation may have left in an undefined state."""
        self.login.release(self.session)
        self.key = self.facts = None
        self.session = self.login.session(self.token)


class Connection:
    """
    The handles of one device: opened by the first call, discarded after an error, opened again by
    the next call. The token must stay the one that was used first.
    """

    def __init__(self, settings: DeviceSettings, selector: KeySelector) -> None:
        self._path = settings.module_path
        self._name = sanitized(settings.uri)
        self._selector = selector
        self._handles: Handles | None = None
        self._first_identity: tuple[str, str, str, str] | None = None
        #: The login that the device used last, even if its handles are discarded.
        self.login: Login | None = None
        #: How often handles were opened.
        self.openings = 0

    @property
    def is_open(self) -> bool:
        """Whether there are handles, which may be stale."""
        return self._handles is not None

    @property
    def was_used(self) -> bool:
        """Whether a call has succeeded."""
        return self._first_identity is not None

    def handles(self) -> Handles:
        """
        The handles, opened if necessary. DeviceError (``device-missing``, ``device-ambiguous``,
        ``device-changed``) and the errors of `open_module`.
        """
        module = open_module(self._path)
        handles = self._handles
        if handles is not None and handles.module is module:
            return handles
        token = self._selector.token(module)
        self._check_same_token(token)
        login = module.logins.setdefault(login_key(token), Login(module))
        before = self.login
        if before is not None and before is not login and self.was_used:
            # The module was restarted: reuse the PIN that this device has accepted.
            login.pin, login.source = login.pin or before.pin, login.source or before.source
        self._handles = Handles(module, token, login, login.session(token))
        self.login = login
        login.users.add(self)
        self.openings += 1
        return self._handles

    def remember_token(self, token: Token) -> None:
        """Accept no other token from now on. Call it after a success."""
        self._first_identity = self._first_identity or token_identity(token)

    def _check_same_token(self, token: Token) -> None:
        """DeviceError (``device-changed``) if the token is not the one that was used before."""
        known, now = self._first_identity, token_identity(token)
        if known is None or known == now:
            return
        changed = [
            each for each in zip(_IDENTITY_FIELDS, known, now, strict=True) if each[1] != each[2]
        ]
        # A field that is empty now was read while another process was writing it.
        half_written = any(old and not new for _, old, new in changed)
        differences = ", ".join(
            f"{name} '{sanitized(new)}', was '{sanitized(old)}'" for name, old, new in changed
        )
        raise DeviceError(
            f"{self._name} is another device than before: {differences}",
            hint="It was initialised anew, or exchanged. Start again to use it as it is.",
            code="device-changed",
            retryable=half_written,
        )

    def discard(self) -> None:
        """Close the session; the login stays, for other devices and for the next call."""
        handles, self._handles = self._handles, None
        if handles is None or not is_current(handles.module):
            return
        handles.login.release(handles.session)
        handles.login.users.discard(self)

    def close(self) -> None:
        """Close the session; the last device on a token logs out."""
        handles, self._handles = self._handles, None
        login, self.login = self.login, None
        if handles is not None:
            handles.login.release(handles.session)
        if login is not None:
            login.users.discard(self)
            if not login.users:
                login.end()
                login.pin = None
