"""
Composition root: creates clients, devices and stores from the settings.

Nothing is opened here: the objects connect, log in and read files when they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmtoll import directories, files, required
from hsmtoll.clock import Clock, Skew, SystemClock
from hsmtoll.errors import ConfigurationError, foreign, install_extra
from hsmtoll.remembered import PersistedText
from hsmtoll.settings import Settings, load, not_set, variable
from hsmtoll.token import TokenRequest
from hsmtoll.tokens import exchange

if TYPE_CHECKING:
    from hsmtoll.apis import Identity
    from hsmtoll.client import AsyncTollClient, TollClient
    from hsmtoll.hsm.device import Device, DeviceSettings
    from hsmtoll.hsm.facts import ModuleFacts
    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.hsm.pin_log import PinLog, TokenUser
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.signing.device_chain import DeviceChain, KeyListState
    from hsmtoll.signing.local import LocalSigner
    from hsmtoll.signing.remote import FailoverHosts
    from hsmtoll.signing.signer import Signer
    from hsmtoll.tokens.cache import Renewer
    from hsmtoll.tokens.exchange import Endpoints
    from hsmtoll.tokens.rate_limit import RateLimit
    from hsmtoll.tokens.renewal import Renewal
    from hsmtoll.tokens.stores import Store
    from hsmtoll.tokens.token_service import Counts, TokenService
    from hsmtoll.transport import HttpClient
    from hsmtoll.x509.certificate_files import Bundle
    from hsmtoll.x509.path_building import Chain
    from hsmtoll.x509.reloading import CertificateFile

__all__ = ["App", "aconnect", "connect"]

#: Variables by which PKCS#11 modules find their devices.
_OF_MODULES = re.compile(
    "SOFTHSM|PKCS11|P11_|OPENSC|TPM|YUBIHSM|NFAST|CHRYSTOKI|CLOUDHSM|KMS|^CS_|^ET_", re.IGNORECASE
)


def connect(
    *, config: str | os.PathLike[str] | None = None, profile: str | None = None, **settings: Any
) -> TollClient:
    """
    A client from the environment, the configuration file, and *settings* over both.

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
    The parts of one set of settings, each made when it is first asked for.

    *one_shot* is a command that ends: it waits for a renewal instead of leaving it to the
    background, and keeps its tokens in files by default. *clock* is for tests.
    """

    settings: Settings
    one_shot: bool = False
    use_final_try: bool = False
    clock: Clock = field(default_factory=SystemClock)
    #: Of a signing host: the program of the device's processes, and its rules.
    isolated_in: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def family(self) -> Identity:
        """HSMTOLL_IDENTITY."""
        if self.settings.identity is None:
            raise not_set({"HSMTOLL_IDENTITY": required.IDENTITIES})
        return self.settings.identity

    @cached_property
    def endpoints(self) -> Endpoints:
        """Constants of test and prod; of the sandbox what is set, checked by settings."""
        match self.settings.environment:
            case "test":
                return exchange.TEST
            case "prod":
                return exchange.PROD
            case "sandbox":
                given = self.settings.endpoints
                if not (given.issuer and given.token and given.customs):
                    lacking = [name for name, url in given.model_dump().items() if not url]
                    raise not_set(
                        {variable("endpoints", name): required.SANDBOX for name in lacking}
                    )
                return exchange.Endpoints(given.issuer, given.token, given.customs.rstrip("/"))
            case None:
                raise not_set({"HSMTOLL_ENVIRONMENT": required.ENVIRONMENTS})

    @cached_property
    def state(self) -> Path:
        """Where this machine remembers: refused PINs, the clock's skew, who signs."""
        return self.settings.state or directories.state_directory()

    @cached_property
    def skew(self) -> Skew:
        """The clock correction for the configured Maskinporten."""
        name = hashlib.sha256(self.endpoints.issuer.encode()).hexdigest()[:16]
        return Skew(self.state / f"skew-{name}.json")

    @cached_property
    def store(self) -> Store:
        """HSMTOLL_CACHE; the library keeps to memory, the command line to files."""
        from hsmtoll.tokens import stores

        given = self.settings.cache
        url = given.get_secret_value() if given else ("file:" if self.one_shot else "memory:")
        if url == "memory:":
            return stores.MemoryStore()
        if url == "file:":
            return stores.FileStore(directories.runtime_directory())
        if url.startswith("file:"):
            return stores.FileStore(Path(url.removeprefix("file://")))
        key_file = self.settings.cache_key_file
        if key_file is None:
            raise not_set({"HSMTOLL_CACHE_KEY_FILE": "values in Redis are encrypted with it"})
        try:
            from hsmtoll.tokens.redis_store import RedisStore
        except ImportError as exc:
            raise ConfigurationError(
                "HSMTOLL_CACHE: redis-py is not installed",
                hint=install_extra("redis"),
                code="extra-missing",
            ) from exc
        return RedisStore.at(
            url, key_file=key_file, ca_file=self.settings.ca_file, clock=self.clock
        )

    def uris(self) -> tuple[KeyUri, ...]:
        """The keys named: HSMTOLL_HSM__KEY, or its parts as one URI."""
        from hsmtoll.hsm.uri import KeyUri

        hsm = self.settings.hsm
        if hsm.key:
            return tuple(KeyUri.parse(each) for each in hsm.key)
        key_id = bytes.fromhex(hsm.key_id) if hsm.key_id else None
        parts = (hsm.token_label, hsm.token_serial, hsm.key_label, key_id)
        if not any(parts):
            raise not_set({"HSMTOLL_HSM__KEY": required.KEY})
        return (
            KeyUri(token=hsm.token_label, serial=hsm.token_serial, object=hsm.key_label, id=key_id),
        )

    @property
    def names_a_key(self) -> bool:
        """Whether any key or device is named at all."""
        hsm = self.settings.hsm
        return bool(hsm.key or hsm.token_label or hsm.token_serial or hsm.key_label or hsm.key_id)

    def module(self, uri: KeyUri | None = None) -> str:
        """HSMTOLL_HSM__MODULE, or the URI's module-path."""
        given = self.settings.hsm.module or (uri and uri.module_path)
        if not given:
            raise not_set({"HSMTOLL_HSM__MODULE": required.MODULE})
        return str(given)

    @cached_property
    def pin_log(self) -> PinLog:
        """Of refused PINs. Only throw-away devices are unlocked without one."""
        from hsmtoll.hsm.pin_log import PinLog

        return PinLog(self.state, optional=self.settings.environment == "sandbox")

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """One for each key named, in order."""
        if wrong := required.missing(self.settings, grant=False):
            raise wrong
        return tuple(self.device(uri) for uri in self.uris())

    def device(self, uri: KeyUri) -> Device:
        """The device of one key; with HSMTOLL_HSM__ISOLATION=process in processes of its own."""
        return self._device(
            replace(
                self._token_settings(uri),
                public_key=self._public_key(),
                use_final_try=self.use_final_try,
                allow_exportable_key=self.settings.hsm.allow_exportable_key,
                audience=self._audience,
            ),
            signing_pin=self._own_signing_pin(),
        )

    def _token_settings(self, uri: KeyUri) -> DeviceSettings:
        """What is needed to look at a token; not what only its key needs, such as files."""
        from hsmtoll.hsm.device import DeviceSettings

        return DeviceSettings(
            Path(self.module(uri)),
            uri,
            user_type=self.settings.hsm.user_type,
            deadline=self.settings.deadline,
        )

    def _device(self, settings: DeviceSettings, signing_pin: PinSource | None = None) -> Device:
        pin, pin_log = self.pin(settings.uri), self.pin_log

        def boot() -> float:
            return self.clock.now().boot

        if self.settings.hsm.isolation == "none":
            from hsmtoll.hsm.in_process import InProcessDevice

            return InProcessDevice(
                settings, pin=pin, signing_pin=signing_pin, pin_log=pin_log, boot=boot
            )
        from hsmtoll.hsm.pool import WorkerDevice

        return WorkerDevice(
            settings,
            pin=pin,
            signing_pin=signing_pin,
            pin_log=pin_log,
            boot=boot,
            workers=self.settings.host.workers,
            **self.isolated_in,
        )

    @property
    def _audience(self) -> str | None:
        """That of the grants to be signed, where the settings say so."""
        try:
            return self.endpoints.issuer
        except ConfigurationError:
            return None

    def inspect(self) -> ModuleFacts:
        """What is behind the module, seen from where `device` would put it."""
        with self._device(self._token_settings(self._named_uris()[0])) as device:
            return device.inspect()

    def token_users(self) -> tuple[TokenUser, ...]:
        """The PIN log's keys for the configured tokens, or for all."""
        found: list[TokenUser] = []
        for uri in self._named_uris():
            with self._device(self._token_settings(uri)) as device:
                found += device.token_users()
        return tuple(found)

    def _named_uris(self) -> tuple[KeyUri, ...]:
        from hsmtoll.hsm.uri import KeyUri

        return self.uris() if self.names_a_key else (KeyUri(),)

    def pin(self, uri: KeyUri | None) -> PinSource | None:
        """The source of the user PIN, or ``None`` where none is set."""
        from hsmtoll.hsm.pin import source_of

        return source_of(self.settings.hsm, "pin", uri)

    def signing_pin(self, uri: KeyUri) -> PinSource | None:
        """The source of the PIN for each signature: its own, or the user PIN's."""
        return self._own_signing_pin() or self.pin(uri)

    def _own_signing_pin(self) -> PinSource | None:
        from hsmtoll.hsm.pin import source_of

        return source_of(self.settings.hsm, "signing_pin", None)

    def _public_key(self) -> RsaPublicKey | None:
        path = self.settings.hsm.public_key
        if path is None:
            return None
        from hsmtoll.jws import RsaPublicKey

        try:
            return RsaPublicKey.from_pem(
                files.read(path, "HSMTOLL_HSM__PUBLIC_KEY").decode("utf-8", "replace")
            )
        except ValueError as exc:
            raise ConfigurationError(f"HSMTOLL_HSM__PUBLIC_KEY {foreign(path)}: {exc}") from exc

    @cached_property
    def certificate_file(self) -> CertificateFile | None:
        """HSMTOLL_HSM__CERTIFICATES, which is followed."""
        path = self.settings.hsm.certificates
        if path is None:
            return None
        from hsmtoll.x509.reloading import CertificateFile

        return CertificateFile(path, "HSMTOLL_HSM__CERTIFICATES")

    def supplied(self) -> Bundle:
        """The certificates of HSMTOLL_HSM__CERTIFICATES as they are now."""
        from hsmtoll.x509.certificate_files import Bundle

        return self.certificate_file() if self.certificate_file is not None else Bundle()

    @cached_property
    def signer(self) -> Signer:
        """The signing host of HSMTOLL_SIGNER__URL, or the first usable key of HSMTOLL_HSM__KEY."""
        if self.settings.signer.url:
            return self._remote()
        from hsmtoll.signing.failover import FailoverSigner

        signers = [self.local_signer(device) for device in self.devices]
        return signers[0] if len(signers) == 1 else FailoverSigner(signers)

    def hosts(self) -> FailoverHosts:
        """The signing hosts of HSMTOLL_SIGNER__URL, in order."""
        from hsmtoll.signing.remote import FailoverHosts
        from hsmtoll.signing.signing_host import SigningHost

        settings = self.settings
        of_each = settings.deadline / len(settings.signer.url)
        return FailoverHosts(
            [
                SigningHost(
                    url,
                    settings.signer,
                    clock=self.clock,
                    ca_file=settings.ca_file,
                    timeout=settings.timeout,
                    # One that trickles leaves time for the others before callers give up.
                    deadline=of_each,
                )
                for url in settings.signer.url
            ],
            self.clock,
        )

    def _remote(self) -> Signer:
        from hsmtoll.signing.remote import RemoteSigner
        from hsmtoll.signing.verification import Expected

        settings = self.settings
        if self.gives_tokens:
            raise ConfigurationError(
                "grant: HSMTOLL_SIGNER__MODE=token gives tokens alone",
                hint="set HSMTOLL_SIGNER__MODE=grant, if the host's policy allows it",
                code="mode-token",
            )
        expected = Expected(
            audience=self.endpoints.issuer,
            family=self.family,
            issuer=settings.iss,
            kid=settings.kid,
            public_key=self._public_key(),
            organization=settings.signer.organization,
            root_sha256=settings.hsm.root_sha256,
            certificate_sha256=settings.hsm.certificate_sha256,
        )
        return RemoteSigner(
            self.hosts(),
            profile=settings.signer.profile or "",
            expected=expected,
            clock=self.clock,
            skew=self.skew,
        )

    def local_signer(self, device: Device) -> LocalSigner:
        """The signer of one device."""
        from hsmtoll.signing.local import LocalSigner

        settings = self.settings
        return LocalSigner(
            device,
            self._device_chain(device, self.family),
            audience=self.endpoints.issuer,
            clock=self.clock,
            skew=self.skew,
            alg=settings.alg,
            issuer=settings.iss,
            kid=settings.kid,
        )

    def chain(self) -> Chain:
        """The proven chain of the first key named; neither identity nor environment is needed."""
        # Without an identity the rules of eSeals judge: what they take, the others take.
        family = self.settings.identity or "eseal"
        chain = self._device_chain(self.devices[0], family)
        if self.pin(self.uris()[0]) is None:
            return chain.without_pin()
        return chain.current().chain

    def _device_chain(self, device: Device, family: Identity) -> DeviceChain:
        from hsmtoll.signing.device_chain import DeviceChain

        settings = self.settings
        # Read now, so that a file that cannot be used is told before anything is asked.
        supplied = self.supplied()
        return DeviceChain(
            device,
            identity=family,
            clock=self.clock,
            x5c=settings.x5c_mode,
            supplied=self.certificate_file or (lambda: supplied),
            root_sha256=settings.hsm.root_sha256,
            certificate_sha256=settings.hsm.certificate_sha256,
            key_list_state=self._key_list_state,
        )

    @cached_property
    def _key_list_state(self) -> KeyListState:
        from hsmtoll.signing.device_chain import KeyListState

        return KeyListState()

    @cached_property
    def token_service(self) -> TokenService:
        """The tokens of these settings."""
        from hsmtoll.tokens.cache import Cache
        from hsmtoll.tokens.token_service import TokenService

        if wrong := required.missing(self.settings):
            raise wrong
        settings = self.settings
        if not self.one_shot and not self.gives_tokens:
            # What a command finds in the cache needs no signer, nor the libraries behind one.
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
                patience=settings.deadline,
                background=not self.one_shot,
            ),
            clock=self.clock,
            skew=self.skew,
            counts=self.counts,
            family=self.family,
            default=TokenRequest(settings.scope or "", settings.resource, settings.consumer_org),
            pin_state=self.pin_state,
        )

    @cached_property
    def renewal(self) -> Renewer:
        """How a token is renewed: here, or by a signing host that gives tokens."""
        if not self.gives_tokens:
            return self.renewal_by(self.signer)
        from hsmtoll.tokens.host_tokens import RemoteTokens

        settings = self.settings
        return RemoteTokens(
            self.hosts(),
            profile=settings.signer.profile or "",
            clock=self.clock,
            attempts=settings.budget.per_request,
        )

    def renewal_by(self, signer: Signer) -> Renewal:
        """A renewal with grants of *signer*."""
        from hsmtoll.tokens.renewal import Renewal

        settings = self.settings
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
            per_request=settings.budget.per_request,
            signing="the signing host" if settings.signer.url else "signing",
        )

    @property
    def gives_tokens(self) -> bool:
        """Whether HSMTOLL_SIGNER__URL gives Customs tokens, and no grants."""
        return bool(self.settings.signer.url) and self.settings.signer.mode == "token"

    @cached_property
    def counts(self) -> Counts:
        """What was spent."""
        from hsmtoll.tokens.token_service import Counts

        return Counts()

    @cached_property
    def remembered(self) -> PersistedText:
        """Who signs with these settings, as this machine learned it."""
        return PersistedText(self.state / f"identity-{self.selector[:32]}")

    @cached_property
    def rate_limit(self) -> RateLimit:
        """Signatures left, for every command alike."""
        from hsmtoll.tokens.rate_limit import RateLimit

        return RateLimit(self.store, self.clock, per_hour=self.settings.budget.per_hour)

    @cached_property
    def http_client(self) -> HttpClient:
        """Our own way to the token endpoints, with the proxy and the CA that were set."""
        from hsmtoll.transport import HttpClient

        settings = self.settings
        return HttpClient(
            ca_file=settings.ca_file,
            proxy=settings.proxy.get_secret_value() if settings.proxy else None,
            timeout=settings.timeout,
            deadline=settings.deadline,
        )

    @cached_property
    def selector(self) -> str:
        """A hash of every setting that selects key, identity, endpoints or host profile."""
        dumped = self.settings.model_dump(mode="json")
        unlock = ("pin", "signing_pin")
        chosen = {
            "environment": dumped["environment"],
            "family": dumped["identity"],
            "iss": dumped["iss"],
            "kid": dumped["kid"],
            "endpoints": [self.endpoints.issuer, self.endpoints.token, self.endpoints.customs],
            "hsm": {k: v for k, v in dumped["hsm"].items() if not k.startswith(unlock)},
            "signer": dumped["signer"],
            # Two devices behind one module may differ by its own variables alone.
            "module": {k: v for k, v in sorted(os.environ.items()) if _OF_MODULES.search(k)},
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def client(self) -> TollClient:
        """For threads."""
        from hsmtoll.client import TollClient

        return TollClient(self.token_service, close=self.close)

    def aclient(self) -> AsyncTollClient:
        """For tasks."""
        from hsmtoll.client import AsyncTollClient

        return AsyncTollClient(self.token_service, close=self.close)

    def pin_state(self) -> str | None:
        """The PIN as the first device that was logged in to reported it; None before a login."""
        states = (device.pin_state for device in self.__dict__.get("devices", ()))
        return next((state for state in states if state is not None), None)

    def close(self) -> None:
        """Let go of the devices that were opened."""
        for device in self.__dict__.get("devices", ()):
            device.close()
