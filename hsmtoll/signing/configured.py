"""The signers that the settings name: keys on local devices, or signing hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.public_key import public_key
from hsmtoll.once import made_once
from hsmtoll.signing.device_chain import DeviceChain, KeyListState
from hsmtoll.signing.local import LocalSigner
from hsmtoll.signing.remote import FailoverHosts, RemoteSigner
from hsmtoll.signing.signing_host import SigningHost
from hsmtoll.signing.verification import Expected
from hsmtoll.x509.certificate_files import Bundle
from hsmtoll.x509.reloading import CertificateFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.apis import Identity
    from hsmtoll.clock import Clock, Skew
    from hsmtoll.hsm.device import Device
    from hsmtoll.settings import Settings
    from hsmtoll.x509.path_building import Chain

__all__ = ["LocalSigners", "remote_signer", "signing_hosts"]


@dataclass
class LocalSigners:
    """
    Creates the signers of local devices. They share the certificates of HSMTOLL_HSM__CERTIFICATES
    and what Maskinporten's answers show about the keys.
    """

    settings: Settings
    clock: Clock
    _key_list_state: KeyListState = field(default_factory=KeyListState)

    @made_once
    def certificate_file(self) -> CertificateFile | None:
        """HSMTOLL_HSM__CERTIFICATES, which is read again when it changes; None if not set."""
        path = self.settings.hsm.certificates
        return None if path is None else CertificateFile(path, "HSMTOLL_HSM__CERTIFICATES")

    def supplied(self) -> Bundle:
        """The certificates of HSMTOLL_HSM__CERTIFICATES as they are now. ConfigurationError."""
        return Bundle() if self.certificate_file is None else self.certificate_file()

    def signer(
        self,
        device: Device,
        *,
        audience: str,
        identity: Identity,
        skew: Skew,
        key_used: Callable[[str], None],
    ) -> LocalSigner:
        """
        The signer of one device; *key_used* as for `LocalSigner`. ConfigurationError if a file
        cannot be used.
        """
        settings = self.settings
        return LocalSigner(
            device,
            self._device_chain(device, identity),
            audience=audience,
            clock=self.clock,
            skew=skew,
            alg=settings.alg,
            issuer=settings.iss,
            kid=settings.kid,
            key_used=key_used,
        )

    def chain(self, device: Device, *, log_in: bool) -> Chain:
        """
        The chain that x5c carries. Without *log_in* the leaf is not proven to belong to the key.

        Needs neither identity nor environment; without an identity the rules for eSeals apply,
        which are the stricter ones.
        """
        chain = self._device_chain(device, self.settings.identity or "eseal")
        return chain.current().chain if log_in else chain.without_pin()

    def _device_chain(self, device: Device, identity: Identity) -> DeviceChain:
        settings = self.settings
        # Read once here: an unusable file is reported before anything is signed.
        supplied = self.supplied()
        return DeviceChain(
            device,
            identity=identity,
            clock=self.clock,
            x5c=settings.x5c_mode,
            supplied=self.certificate_file or (lambda: supplied),
            root_sha256=settings.hsm.root_sha256,
            certificate_sha256=settings.hsm.certificate_sha256,
            key_list_state=self._key_list_state,
        )


def signing_hosts(settings: Settings, clock: Clock) -> FailoverHosts:
    """The signing hosts of HSMTOLL_SIGNER__URL, in order."""
    urls = settings.signer.url
    return FailoverHosts(
        [
            SigningHost(
                url,
                settings.signer,
                clock=clock,
                ca_file=settings.ca_file,
                timeout=settings.timeout,
                # A slow host leaves time for the others before HSMTOLL_DEADLINE.
                deadline=settings.deadline / len(urls),
            )
            for url in urls
        ],
        clock,
    )


def remote_signer(
    settings: Settings, *, audience: str, identity: Identity, clock: Clock, skew: Skew
) -> RemoteSigner:
    """The signer at HSMTOLL_SIGNER__URL. ConfigurationError if it gives tokens and no grants."""
    if settings.signer.gives_tokens:
        raise ConfigurationError(
            "grant: the signing host gives tokens only (HSMTOLL_SIGNER__MODE=token)",
            hint="set HSMTOLL_SIGNER__MODE=grant, if the host's policy allows it",
            code="mode-token",
        )
    expected = Expected(
        audience=audience,
        family=identity,
        issuer=settings.iss,
        kid=settings.kid,
        public_key=public_key(settings),
        organization=settings.signer.organization,
        root_sha256=settings.hsm.root_sha256,
        certificate_sha256=settings.hsm.certificate_sha256,
    )
    return RemoteSigner(
        signing_hosts(settings, clock),
        profile=settings.signer.profile or "",
        expected=expected,
        clock=clock,
        skew=skew,
    )
