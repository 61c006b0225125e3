"""The devices that the settings name: which keys, in which modules, unlocked with which PINs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmtoll import required
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import source_of
from hsmtoll.hsm.pool import WorkerDevice
from hsmtoll.hsm.public_key import public_key
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.once import made_once
from hsmtoll.settings import not_set

if TYPE_CHECKING:
    from hsmtoll.clock import Clock
    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import ModuleFacts
    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.hsm.pin_log import PinLog, TokenUser
    from hsmtoll.settings import Settings

__all__ = ["ConfiguredDevices"]


@dataclass
class ConfiguredDevices:
    """
    The devices of *settings*. Creating this object opens none of them.

    *pin_log*: the record of refused PINs. *audience*: of all grants that may be signed; None if the
    settings name none. *use_final_try*: log in even at the last try before the PIN is locked.
    *worker*: ``program`` and ``rules`` of the worker processes, if not the default ones.

    Every method raises ConfigurationError if a setting that it needs is missing.
    """

    settings: Settings
    pin_log: PinLog
    clock: Clock
    audience: str | None = None
    use_final_try: bool = False
    worker: dict[str, Any] = field(default_factory=dict)

    @made_once
    def devices(self) -> tuple[Device, ...]:
        """One for each key that is named, in order."""
        if error := required.missing(self.settings, grant=False):
            raise error
        return tuple(self.device(uri) for uri in self.uris())

    def uris(self) -> tuple[KeyUri, ...]:
        """The keys that are named: HSMTOLL_HSM__KEY, or its parts as one URI."""
        named = self._named()
        if not named:
            raise not_set({"HSMTOLL_HSM__KEY": required.KEY})
        return named

    def _named(self) -> tuple[KeyUri, ...]:
        hsm = self.settings.hsm
        if hsm.key:
            return tuple(KeyUri.parse(each) for each in hsm.key)
        key_id = bytes.fromhex(hsm.key_id) if hsm.key_id else None
        uri = KeyUri(
            token=hsm.token_label, serial=hsm.token_serial, object=hsm.key_label, id=key_id
        )
        return () if uri == KeyUri() else (uri,)

    def module(self, uri: KeyUri) -> Path:
        """HSMTOLL_HSM__MODULE, or the module-path of *uri*."""
        path = self.settings.hsm.module or uri.module_path
        if not path:
            raise not_set({"HSMTOLL_HSM__MODULE": required.MODULE})
        return Path(path)

    def pin(self, uri: KeyUri) -> PinSource | None:
        """The source of the user PIN; None if none is set."""
        return source_of(self.settings.hsm, "pin", uri)

    def signing_pin(self, uri: KeyUri) -> PinSource | None:
        """The source of the PIN for each signature: its own, or the user PIN's."""
        return source_of(self.settings.hsm, "signing_pin", None) or self.pin(uri)

    def device(self, uri: KeyUri) -> Device:
        """The device of the key *uri*."""
        return self._device(
            replace(
                self._token_settings(uri),
                public_key=public_key(self.settings),
                use_final_try=self.use_final_try,
                allow_exportable_key=self.settings.hsm.allow_exportable_key,
                audience=self.audience,
            ),
            signing_pin=source_of(self.settings.hsm, "signing_pin", None),
        )

    def _token_settings(self, uri: KeyUri) -> DeviceSettings:
        """What is needed to look at a token; not what only its key needs, such as files."""
        return DeviceSettings(
            self.module(uri),
            uri,
            user_type=self.settings.hsm.user_type,
            deadline=self.settings.deadline,
        )

    def _device(self, settings: DeviceSettings, signing_pin: PinSource | None = None) -> Device:
        parts: dict[str, Any] = {
            "pin": self.pin(settings.uri),
            "signing_pin": signing_pin,
            "pin_log": self.pin_log,
            "boot": lambda: self.clock.now().boot,
        }
        if self.settings.hsm.isolation == "none":
            return InProcessDevice(settings, **parts)
        return WorkerDevice(settings, workers=self.settings.host.workers, **parts, **self.worker)

    def inspect(self) -> ModuleFacts:
        """What the module shows, opened in the same process as for a signature."""
        with self._device(self._token_settings(self._named_or_any()[0])) as device:
            return device.inspect()

    def token_users(self) -> tuple[TokenUser, ...]:
        """The PIN log's keys for the tokens that are named, or for all tokens of the module."""
        found: list[TokenUser] = []
        for uri in self._named_or_any():
            with self._device(self._token_settings(uri)) as device:
                found += device.token_users()
        return tuple(found)

    def _named_or_any(self) -> tuple[KeyUri, ...]:
        return self._named() or (KeyUri(),)

    def pin_state(self) -> str | None:
        """The PIN as the first device with a login reported it; None before a login."""
        states = (device.pin_state for device in self._made())
        return next((state for state in states if state is not None), None)

    def close(self) -> None:
        """Close the devices."""
        for device in self._made():
            device.close()

    def _made(self) -> tuple[Device, ...]:
        return self.devices if "devices" in vars(self) else ()
