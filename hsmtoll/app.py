"""
Where the parts are put together: settings in, a client or a device out. No decisions.

Nothing is opened here: what is made connects, logs in and reads files when it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import platformdirs

from hsmtoll import files
from hsmtoll.clock import Clock, Skew, SystemClock
from hsmtoll.errors import ConfigurationError, foreign
from hsmtoll.remembered import Remembered
from hsmtoll.settings import Settings, load, not_set, variable
from hsmtoll.token import TokenRequest
from hsmtoll.tokens import exchange

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.apis import Identity
    from hsmtoll.client import AsyncTollClient, TollClient
    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import ModuleFacts
    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.hsm.pin_log import Ledger, Place
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.signing.remote import Hosts
    from hsmtoll.signing.signer import Lineage, LocalSigner, Signer
    from hsmtoll.tokens.cache import Renewer
    from hsmtoll.tokens.engine import Counts, Engine
    from hsmtoll.tokens.exchange import Endpoints
    from hsmtoll.tokens.rate_limit import RateLimit
    from hsmtoll.tokens.renewal import Renewal
    from hsmtoll.tokens.stores import Store
    from hsmtoll.transport import Wire
    from hsmtoll.x509.certificate_files import Bundle
    from hsmtoll.x509.followed import CertificateFile
    from hsmtoll.x509.path_building import Chain

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


def missing(
    settings: Settings, *, grant: bool = True, device: bool = True
) -> ConfigurationError | None:
    """
    The error that names all settings without which nothing is signed, a line of the hint each;
    ``None`` where there is nothing to name. *grant*: those that a grant needs, *device*: those
    that select a key.
    """
    hsm, signer, endpoints = settings.hsm, settings.signer.url, settings.endpoints.model_dump()
    sandbox = settings.environment == "sandbox"
    parts = (hsm.token_label, hsm.token_serial, hsm.key_label, hsm.key_id)
    # What cannot be read as a URI is told when it is read.
    named_module = hsm.module or (hsm.key and all("module-path=" in each for each in hsm.key))
    wanted: list[tuple[str, object, str]] = []
    if grant:
        wanted += [
            ("HSMTOLL_ENVIRONMENT", settings.environment, _ENVIRONMENTS),
            ("HSMTOLL_IDENTITY", settings.identity, _IDENTITIES),
        ]
        wanted += [
            (variable("endpoints", name), value or not sandbox, _SANDBOX)
            for name, value in endpoints.items()
        ]
        norwegian = settings.identity == "norwegian" and not signer
        wanted.append(("HSMTOLL_ISS", settings.iss or not norwegian, _CLIENT_ID))
    if device:
        wanted += [
            ("HSMTOLL_HSM__MODULE", named_module or signer, _MODULE),
            ("HSMTOLL_HSM__KEY", hsm.key or any(parts) or signer, _KEY),
        ]
    lacking = {name: why for name, value, why in wanted if not value}
    return not_set(lacking) if lacking else None


_ENVIRONMENTS: Final = "test, prod or sandbox; there is no default, so that nobody lands in prod"
_IDENTITIES: Final = "eseal for a foreign eSeal, norwegian for a Norwegian client"
_SANDBOX: Final = "`hsmtoll sandbox` prints the values to export"
_CLIENT_ID: Final = (
    "the client id from Samarbeidsportalen; required with HSMTOLL_IDENTITY=norwegian"
)
_MODULE: Final = "the path of your device's PKCS#11 module, a .so file"
_KEY: Final = "an RFC 7512 URI; `hsmtoll objects` prints those of your device"


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
            raise not_set({"HSMTOLL_IDENTITY": _IDENTITIES})
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
                    raise not_set({variable("endpoints", name): _SANDBOX for name in lacking})
                return exchange.Endpoints(given.issuer, given.token, given.customs.rstrip("/"))
            case None:
                raise not_set({"HSMTOLL_ENVIRONMENT": _ENVIRONMENTS})

    @cached_property
    def state(self) -> Path:
        """Where this machine remembers: refused PINs, the clock's skew, who signs."""
        given = self.settings.state or _given("STATE_DIRECTORY")
        return given or _at_home(platformdirs.user_state_dir, "HSMTOLL_STATE")

    @cached_property
    def skew(self) -> Skew:
        """Of the Maskinporten that is spoken to."""
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
            return stores.FileStore(_runtime_directory())
        if url.startswith("file:"):
            return stores.FileStore(Path(url.removeprefix("file://")))
        key_file = self.settings.cache_key_file
        if key_file is None:
            raise not_set({"HSMTOLL_CACHE_KEY_FILE": "values in Redis are encrypted with it"})
        return stores.RedisStore.at(
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
            raise not_set({"HSMTOLL_HSM__KEY": _KEY})
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
            raise not_set({"HSMTOLL_HSM__MODULE": _MODULE})
        return str(given)

    @cached_property
    def ledger(self) -> Ledger:
        """Of refused PINs. Only throw-away devices are unlocked without one."""
        from hsmtoll.hsm.pin_log import Ledger

        return Ledger(self.state, optional=self.settings.environment == "sandbox")

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """One for each key named, in order."""
        if wrong := missing(self.settings, grant=False):
            raise wrong
        return tuple(self.device(uri) for uri in self.uris())

    def device(self, uri: KeyUri) -> Device:
        """The device of one key; with HSMTOLL_HSM__ISOLATION=process in processes of its own."""
        hsm = self.settings.hsm
        return self._device(
            uri,
            signing_pin=self._pin("signing_pin", None),
            public_key=self._public_key(),
            use_final_try=self.use_final_try,
            allow_exportable_key=hsm.allow_exportable_key,
            audience=self._audience,
            boot=lambda: self.clock.now().boot,
        )

    def _device(self, uri: KeyUri, **told: Any) -> Device:
        settings, path = self.settings, Path(self.module(uri))
        told |= {
            "pin": self.pin(uri),
            "ledger": self.ledger,
            "user_type": settings.hsm.user_type,
        }
        if settings.hsm.isolation == "none":
            from hsmtoll.hsm.in_process import InProcessDevice

            return InProcessDevice(path, uri, lock_timeout=settings.deadline, **told)
        from hsmtoll.hsm.pool import WorkerDevice

        told |= {"workers": settings.host.workers, **self.isolated_in}
        return WorkerDevice(path, uri, deadline=settings.deadline, **told)

    @property
    def _audience(self) -> str | None:
        """That of the grants to be signed, where the settings say so."""
        try:
            return self.endpoints.issuer
        except ConfigurationError:
            return None

    def inspect(self) -> ModuleFacts:
        """What is behind the module, seen from where `device` would put it."""
        with self._device(self._named_uris()[0]) as device:
            return device.inspect()

    def places(self) -> tuple[Place, ...]:
        """The PIN ledger's places of the devices that are named, or of all."""
        found: list[Place] = []
        for uri in self._named_uris():
            with self._device(uri) as device:
                found += device.places()
        return tuple(found)

    def _named_uris(self) -> tuple[KeyUri, ...]:
        from hsmtoll.hsm.uri import KeyUri

        return self.uris() if self.names_a_key else (KeyUri(),)

    def pin(self, uri: KeyUri | None) -> PinSource | None:
        """The source of the user PIN, or ``None`` where none is set."""
        return self._pin("pin", uri)

    def signing_pin(self, uri: KeyUri) -> PinSource | None:
        """The source of the PIN for each signature: its own, or the user PIN's."""
        return self._pin("signing_pin", None) or self._pin("pin", uri)

    def _pin(self, kind: str, uri: KeyUri | None) -> PinSource | None:
        from hsmtoll.hsm import pin as pins

        hsm = self.settings.hsm
        name = variable("hsm", kind)
        value, file, command, prompt = (
            getattr(hsm, f"{kind}{part}") for part in ("", "_file", "_command", "_prompt")
        )
        if value is not None:
            return pins.PinValue.of(value.get_secret_value(), name=name)
        if command is not None:
            return pins.PinCommand(command.get_secret_value(), name=f"{name}_COMMAND")
        if prompt == "terminal":
            return pins.PinTerminal(what="Signing PIN" if kind == "signing_pin" else "PIN")
        if prompt == "pinpad":
            return pins.PinPad()
        if file is not None:
            return pins.PinFile(file, name=f"{name}_FILE")
        if uri is not None and uri.pin_source:
            return pins.PinFile(Path(uri.pin_source), name="pin-source of HSMTOLL_HSM__KEY")
        return None

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
        from hsmtoll.x509.followed import CertificateFile

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
        from hsmtoll.signing.signer import FailoverSigner

        signers = [self.local_signer(device) for device in self.devices]
        return signers[0] if len(signers) == 1 else FailoverSigner(signers)

    def hosts(self) -> Hosts:
        """The signing hosts of HSMTOLL_SIGNER__URL, in order."""
        from hsmtoll.signing.remote import Hosts, SigningHost

        settings = self.settings
        of_each = settings.deadline / len(settings.signer.url)
        return Hosts(
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
        return self._local(device, self.endpoints.issuer, self.family, self.skew)

    def chain(self) -> Chain:
        """The proven chain of the first key named; neither identity nor environment is needed."""
        # Without an identity the rules of eSeals judge: what they take, the others take.
        family = self.settings.identity or "eseal"
        signer = self._local(self.devices[0], "", family, Skew())
        if self.pin(self.uris()[0]) is None:
            return signer.chain_without_pin()
        return signer.chain()

    def _local(self, device: Device, audience: str, family: Identity, skew: Skew) -> LocalSigner:
        from hsmtoll.signing.signer import LocalSigner

        settings = self.settings
        # Read now, so that a file that cannot be used is told before anything is asked.
        supplied = self.supplied()
        return LocalSigner(
            device,
            audience=audience,
            identity=family,
            clock=self.clock,
            skew=skew,
            alg=settings.alg,
            issuer=settings.iss,
            kid=settings.kid,
            x5c=settings.x5c_mode,
            supplied=self.certificate_file or (lambda: supplied),
            root_sha256=settings.hsm.root_sha256,
            certificate_sha256=settings.hsm.certificate_sha256,
            lineage=self._lineage,
        )

    @cached_property
    def _lineage(self) -> Lineage:
        from hsmtoll.signing.signer import Lineage

        return Lineage()

    @cached_property
    def engine(self) -> Engine:
        """The tokens of these settings."""
        from hsmtoll.tokens.cache import Cache
        from hsmtoll.tokens.engine import Engine

        if wrong := missing(self.settings):
            raise wrong
        settings = self.settings
        if not self.one_shot and not self.gives_tokens:
            # What a command finds in the cache needs no signer, nor the libraries behind one.
            _ = self.signer
        return Engine(
            lambda: self.renewal,
            endpoints=self.endpoints,
            wire=lambda: self.wire,
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
            wire=self.wire,
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
        from hsmtoll.tokens.engine import Counts

        return Counts()

    @cached_property
    def remembered(self) -> Remembered:
        """Who signs with these settings, as this machine learned it."""
        return Remembered(self.state / f"identity-{self.selector[:32]}")

    @cached_property
    def rate_limit(self) -> RateLimit:
        """Signatures left, for every command alike."""
        from hsmtoll.tokens.rate_limit import RateLimit

        return RateLimit(self.store, self.clock, per_hour=self.settings.budget.per_hour)

    @cached_property
    def wire(self) -> Wire:
        """Our own way to the token endpoints, with the proxy and the CA that were set."""
        from hsmtoll.transport import Wire

        settings = self.settings
        return Wire(
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

        return TollClient(self.engine, close=self.close)

    def aclient(self) -> AsyncTollClient:
        """For tasks."""
        from hsmtoll.client import AsyncTollClient

        return AsyncTollClient(self.engine, close=self.close)

    def pin_state(self) -> str | None:
        """The PIN as the first device that was logged in to reported it; None before a login."""
        states = (device.pin_state for device in self.__dict__.get("devices", ()))
        return next((state for state in states if state is not None), None)

    def close(self) -> None:
        """Let go of the devices that were opened."""
        for device in self.__dict__.get("devices", ()):
            device.close()


def _given(name: str) -> Path | None:
    """A directory that systemd or the login gives; a relative one would be another each time."""
    path = Path(os.environ.get(name, "").partition(":")[0])
    return path if path.is_absolute() else None


def _runtime_directory() -> Path:
    """Where a login's files live: gone after a restart where the system does it right."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        given = _given(name)
        # After su or sudo -E it is still the other account's: what we made there would be in its
        # way (XDG Base Directory: it must be owned by the user).
        if given and not _anothers(given):
            return given / "hsmtoll"
    run = Path(f"/run/user/{os.geteuid()}")
    if run.is_dir():
        return run / "hsmtoll"
    return _at_home(platformdirs.user_cache_dir, "HSMTOLL_CACHE")


def _anothers(path: Path) -> bool:
    """Whether another account than ours and root's has it, or the place where it would be made."""
    for each in (path, *path.parents):
        with contextlib.suppress(OSError):
            return each.stat().st_uid not in {0, os.geteuid()}
    return False


#: Where XDG Base Directory has these two where nothing is set.
_BELOW_HOME: Final = {"HSMTOLL_STATE": ".local/state", "HSMTOLL_CACHE": ".cache"}


def keep_temporary_files_private() -> None:
    """
    Temporary files of this process lie below the user's cache directory where others may change
    the usual place: a PIN file or a CA file there would be refused.
    """
    if files.loose(Path(tempfile.gettempdir())) is not None:
        place = _at_home(platformdirs.user_cache_dir, "HSMTOLL_CACHE")
        files.make_directory(place)
        tempfile.tempdir = str(place)


def _at_home(of: Callable[[str], str], name: str) -> Path:
    """A directory of this account, which may have no home for it to be in."""
    try:
        path = Path(of("hsmtoll"))
    except RuntimeError:
        path = Path()
    if _anothers(path):
        # HOME is another account's, as after sudo -E: what we made there would be in its way.
        with contextlib.suppress(KeyError):
            path = Path(pwd.getpwuid(os.geteuid()).pw_dir) / _BELOW_HOME[name] / "hsmtoll"
    # Older versions of platformdirs leave the ~ as it is: it would be made below whatever is here.
    if not path.is_absolute():
        raise ConfigurationError(
            f"{name}: not set, and this account has no home directory",
            hint="set HOME, or HSMTOLL_STATE and HSMTOLL_CACHE (memory: keeps nothing)",
            code="setting-missing",
        )
    return path
