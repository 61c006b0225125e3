"""
Everything that a module shows, as values: for users who look for the right URI, and for the doctor.

Works without a PIN, and then shows what needs no login. Nothing is signed. Everything here is
called with `hsmtoll.hsm.module.PKCS11_LOCK` held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pkcs11 import Attribute, ObjectClass, TokenFlag
from pkcs11.exceptions import PKCS11Error

from hsmtoll.errors import HsmTollError
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import describe, translate_pkcs11_errors
from hsmtoll.hsm.connection import Login
from hsmtoll.hsm.facts import ModuleFacts, TokenFacts
from hsmtoll.hsm.module import Module, open_module
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from hsmtoll.hsm.reading import (
    certificates_of,
    device_facts,
    device_uri,
    key_facts,
    login_key,
    pin_state,
    user_name,
)
from hsmtoll.hsm.uri import KeyUri

if TYPE_CHECKING:
    from pathlib import Path

    from pkcs11 import Slot, Token

    from hsmtoll.hsm.device import DeviceSettings

__all__ = ["module_facts", "token_users"]


def module_facts(
    path: Path, uri: KeyUri, pin_log: PinLog, problem: HsmTollError | None
) -> ModuleFacts:
    """
    Everything that the module at *path* shows without a further login. *problem* is why the login
    to the token of *uri* failed, if it did.

    Raises ConfigurationError and DeviceError for the module itself.
    """
    module = open_module(path)
    tokens = [_token(module, slot, token, pin_log) for slot, token in module.slots()]
    if problem is not None:
        tokens = [
            replace(one, problem=str(problem))
            if uri.matches(token=one.uri.token, serial=one.uri.serial)
            else one
            for one in tokens
        ]
    return ModuleFacts(
        path=module.path,
        manufacturer=module.lib.manufacturer_id,
        description=module.lib.library_description,
        version=module.lib.library_version,
        cryptoki=module.lib.cryptoki_version,
        tokens=tuple(tokens),
        login=problem,
    )


def token_users(settings: DeviceSettings) -> tuple[TokenUser, ...]:
    """The PIN log's keys for the tokens that the URI of *settings* names."""
    module = open_module(settings.module_path)
    return tuple(
        _token_user(token, user)
        for slot, token in module.slots()
        if not isinstance(token, PKCS11Error)
        and settings.uri.matches(**device_facts(module, slot, token))
        for user in (user_name(settings.user_type), "signing")
    )


def _token(module: Module, slot: Slot, token: Token | PKCS11Error, pin_log: PinLog) -> TokenFacts:
    if isinstance(token, PKCS11Error):
        return TokenFacts(
            uri=KeyUri(slot_id=slot.slot_id),
            slot_id=slot.slot_id,
            slot_description=slot.slot_description,
            problem=f"the slot answers {describe(token)}",
        )
    flags = token.flags
    refused, unresolved = pin_log.refusals(_token_user(token, "user"))
    seen = TokenFacts(
        uri=device_uri(token),
        slot_id=slot.slot_id,
        slot_description=slot.slot_description,
        initialized=bool(flags & TokenFlag.TOKEN_INITIALIZED),
        login_required=bool(flags & TokenFlag.LOGIN_REQUIRED),
        pinpad=bool(flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH),
        pin_state=pin_state(flags),
        refused=refused,
        unresolved=unresolved,
        firmware=token.firmware_version,
    )
    try:
        with translate_pkcs11_errors("reading the objects"):
            return _objects(module, token, seen)
    except HsmTollError as exc:
        # An uninitialised token has no objects. Some initialised ones lack the flag, so the attempt
        # is made for all.
        return replace(seen, problem=str(exc)) if seen.initialized else seen


def _objects(module: Module, token: Token, seen: TokenFacts) -> TokenFacts:
    login = module.logins.get(login_key(token)) or Login(module)
    session = login.session(token)
    try:
        found = cryptoki.find_objects(session, {Attribute.CLASS: ObjectClass.PRIVATE_KEY})
        keys = tuple(key_facts(module, session, found))
        stored = tuple(certificates_of(session))
    finally:
        login.release(session)
    device = device_uri(token)
    named = tuple(
        (replace(device, object=one.label, id=one.id, type="cert"), one) for one in stored
    )
    there = not seen.login_required or login.is_logged_in
    return replace(seen, keys=keys, certificates=named, logged_in=there)


def _token_user(token: Token, user: str) -> TokenUser:
    uri = device_uri(token)
    return TokenUser(
        uri.manufacturer or "", uri.model or "", uri.serial or "", uri.token or "", user
    )
