"""
Composition root: which part is built from which, for one set of settings.

Nothing is opened here: the parts connect, log in and read files when they are used. How the
settings are read for devices, signers and stores is in `devices`, `signing.configured` and
`tokens.configured`.

A command that finds its token in the cache loads only the modules imported at the top. Those of a
renewal (PKCS#11, HTTP, X.509) take most of a second: they are imported where the part is built.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hsmtoll import directories, required
from hsmtoll.clock import Clock, Skew, SystemClock
from hsmtoll.errors import ConfigurationError
from hsmtoll.expiry import KeyUses
from hsmtoll.once import made_once
from hsmtoll.remembered import PersistedText
from hsmtoll.settings import Settings, load, not_set
from hsmtoll.token import TokenRequest
from hsmtoll.tokens import configured
from hsmtoll.tokens.cache import Cache
from hsmtoll.tokens.token_service import Counts, TokenService

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from hsmtoll.apis import Identity
    from hsmtoll.client import AsyncTollClient, TollClient
    from hsmtoll.devices import ConfiguredDevices
    from hsmtoll.hsm.device import Device
    from hsmtoll.signing.configured import LocalSigners
    from hsmtoll.signing.local import LocalSigner
    from hsmtoll.signing.signer import Signer
    from hsmtoll.tokens.cache import Renewer
    from hsmtoll.tokens.exchange import Endpoints
    from hsmtoll.tokens.rate_limit import RateLimit
    from hsmtoll.tokens.renewal import Renewal
    from hsmtoll.tokens.stores import Store
    from hsmtoll.transport import HttpClient
    from hsmtoll.x509.path_building import Chain

__all__ = ["App", "aconnect", "connect"]


def connect(
    *, config: str | os.PathLike[str] | None = None, profile: str | None = None, **settings: Any
) -> TollClient:
    """
    A client with the settings of the environment and the configuration file; *settings* win.

    Names as in `Settings`; nested ones as ``hsm={"module": …}`` or ``hsm__module=…``. Opens
    nothing yet. Raises ConfigurationError.
    """
    return App(load(config=config, profile=profile, **settings)).client()


def aconnect(
    *, config: str | os.PathLike[str] | None = None, profile: str | None = None, **settings: Any
) -> AsyncTollClient:
    """As connect, for tasks."""
    return App(load(config=config, profile=profile, **settings)).aclient()


@dataclass
class App:
    """
    The parts of one set of settings, each built on first use.

    *one_shot*: a command that ends. It waits for a renewal instead of leaving it to the
    background, and stores its tokens in files by default. *use_final_try* and *worker* as for
    `ConfiguredDevices`. *clock* is for tests.
    """

    settings: Settings
    one_shot: bool = False
    use_final_try: bool = False
    clock: Clock = field(default_factory=SystemClock)
    worker: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    @made_once
    def family(self) -> Identity:
        """HSMTOLL_IDENTITY. ConfigurationError if not set."""
        if self.settings.identity is None:
            raise not_set({"HSMTOLL_IDENTITY": required.IDENTITIES})
        return self.settings.identity

    @made_once
    def endpoints(self) -> Endpoints:
        """The endpoints of Maskinporten and Customs. ConfigurationError if not set."""
        return configured.endpoints(self.settings)

    @made_once
    def state(self) -> Path:
        """Directory for refused PINs, the clock's skew and the signer's identity."""
        return self.settings.state or directories.state_directory()

    @made_once
    def skew(self) -> Skew:
        """The offset of the configured Maskinporten's clock."""
        name = hashlib.sha256(self.endpoints.issuer.encode()).hexdigest()[:16]
        return Skew(self.state / f"skew-{name}.json")

    @made_once
    def store(self) -> Store:
        """HSMTOLL_CACHE; by default memory for the library, files for the command line."""
        default = "file:" if self.one_shot else "memory:"
        return configured.store(self.settings, self.clock, default=default)

    @made_once
    def selector(self) -> str:
        """As `tokens.configured.selector`."""
        return configured.selector(self.settings)

    @made_once
    def remembered(self) -> PersistedText:
        """The identity of the signer, as last seen on this machine."""
        return PersistedText(self.state / f"identity-{self.selector[:32]}")

    @made_once
    def token_service(self) -> TokenService:
        """Tokens from the cache or a renewal. ConfigurationError if a setting is missing."""
        if error := required.missing(self.settings):
            raise error
        settings = self.settings
        if not self.one_shot and not settings.signer.gives_tokens:
            # Report unusable settings now; a command may find its token without a signer.
            _ = self.signer
        return TokenService(
            lambda: self.renewal,
            endpoints=self.endpoints,
            http_client=lambda: self.http_client,
            cache=Cache(
                self.store,
                self.clock,
                selector=self.selector,
                remembered=self.remembered,
                deadline=settings.deadline,
                background=not self.one_shot,
            ),
            clock=self.clock,
            skew=self.skew,
            counts=self.counts,
            family=self.family,
            default=TokenRequest(settings.scope or "", settings.resource, settings.consumer_org),
            pin_state=self._pin_state,
        )

    @made_once
    def http_client(self) -> HttpClient:
        """For the token endpoints, with the proxy and CA of the settings."""
        from hsmtoll.transport import HttpClient

        settings = self.settings
        return HttpClient(
            ca_file=settings.ca_file,
            proxy=settings.proxy.get_secret_value() if settings.proxy else None,
            timeout=settings.timeout,
            deadline=settings.deadline,
        )

    @made_once
    def hsm(self) -> ConfiguredDevices:
        """Devices, keys and PINs of the settings."""
        from hsmtoll.devices import ConfiguredDevices
        from hsmtoll.hsm.pin_log import PinLog

        try:
            audience = self.endpoints.issuer
        except ConfigurationError:
            # Commands such as `objects` and `key generate` need no environment.
            audience = None
        sandbox = self.settings.environment == "sandbox"
        return ConfiguredDevices(
            self.settings,
            # Only throw-away devices are unlocked without a record of refused PINs.
            pin_log=PinLog(self.state, optional=sandbox),
            clock=self.clock,
            audience=audience,
            use_final_try=self.use_final_try,
            worker=self.worker,
        )

    @property
    def devices(self) -> tuple[Device, ...]:
        """One for each key of the settings, in order. ConfigurationError if none is named."""
        return self.hsm.devices

    @made_once
    def signers(self) -> LocalSigners:
        """Creates the signers of local devices."""
        from hsmtoll.signing.configured import LocalSigners

        return LocalSigners(self.settings, self.clock)

    def local_signer(self, device: Device) -> LocalSigner:
        """The signer of one device."""
        return self.signers.signer(
            device,
            audience=self.endpoints.issuer,
            identity=self.family,
            skew=self.skew,
            key_used=lambda kid: self.key_uses.used(kid, self.clock.now().wall),
        )

    @made_once
    def key_uses(self) -> KeyUses:
        """The first use of each registered key (HSMTOLL_KID), as remembered on this machine."""
        return KeyUses(self.state, self.endpoints.issuer, self.settings.iss or "")

    def chain(self) -> Chain:
        """The chain of the first key; proven to belong to it only if a PIN is set."""
        device = self.devices[0]
        return self.signers.chain(device, log_in=self.hsm.pin(device.uri) is not None)

    @made_once
    def signer(self) -> Signer:
        """The signing host of HSMTOLL_SIGNER__URL, or the first usable key of HSMTOLL_HSM__KEY."""
        from hsmtoll.signing.configured import remote_signer
        from hsmtoll.signing.failover import FailoverSigner

        if self.settings.signer.url:
            return remote_signer(
                self.settings,
                audience=self.endpoints.issuer,
                identity=self.family,
                clock=self.clock,
                skew=self.skew,
            )
        signers = [self.local_signer(device) for device in self.devices]
        return signers[0] if len(signers) == 1 else FailoverSigner(signers)

    @made_once
    def renewal(self) -> Renewer:
        """Renewal here, or by a signing host that gives tokens."""
        settings = self.settings
        if not settings.signer.gives_tokens:
            return self.renewal_by(self.signer)
        from hsmtoll.signing.configured import signing_hosts
        from hsmtoll.tokens.host_tokens import RemoteTokens

        return RemoteTokens(
            signing_hosts(settings, self.clock),
            profile=settings.signer.profile or "",
            clock=self.clock,
            attempts=settings.budget.per_request,
        )

    def renewal_by(self, signer: Signer) -> Renewal:
        """A renewal with grants of *signer*."""
        from hsmtoll.tokens.renewal import Renewal

        return Renewal(
            signer=signer,
            endpoints=self.endpoints,
            http_client=self.http_client,
            rate_limit=self.rate_limit,
            clock=self.clock,
            skew=self.skew,
            selector=self.selector,
            remembered=self.remembered,
            counts=self.counts,
            per_request=self.settings.budget.per_request,
            signing="the signing host" if self.settings.signer.url else "signing",
        )

    @made_once
    def rate_limit(self) -> RateLimit:
        """HSMTOLL_BUDGET__PER_HOUR, counted in the store for all processes."""
        from hsmtoll.tokens.rate_limit import RateLimit

        return RateLimit(self.store, self.clock, per_hour=self.settings.budget.per_hour)

    def client(self) -> TollClient:
        """For threads."""
        from hsmtoll.client import TollClient

        return TollClient(self.token_service, close=self.close)

    def aclient(self) -> AsyncTollClient:
        """For tasks."""
        from hsmtoll.client import AsyncTollClient

        return AsyncTollClient(self.token_service, close=self.close)

    # Both ask whether there are devices without building them, which would import PKCS#11.

    def _pin_state(self) -> str | None:
        return self.hsm.pin_state() if "hsm" in vars(self) else None

    def close(self) -> None:
        """Close the devices that were opened."""
        if "hsm" in vars(self):
            self.hsm.close()
