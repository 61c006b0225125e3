"""The self-test of a profile's device, and the device's health by self-tests and grants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from hsmtoll.backoff import Backoff
from hsmtoll.errors import DeviceError, HsmTollError
from hsmtoll.signing.device_certificates import readable

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from hsmtoll.app import App
    from hsmtoll.hsm.device import Device

__all__ = ["Health", "SelfTestResult", "sign_self_test"]

#: Seconds between two self-tests of a failed device; doubled from the minimum to the maximum.
_MIN_BACKOFF: Final = 5.0
_MAX_BACKOFF: Final = 60.0


class SelfTestResult(NamedTuple):
    """
    The result of testing the devices in order until one passes. *failure* is the first device's
    error, ``None`` if one passed; *signature_wrong*: a device returned a wrong signature;
    *not_after*: end of the certificate of the device that passed, ``None`` with a kid.
    """

    failure: HsmTollError | None
    signature_wrong: bool
    signatures: int
    not_after: datetime | None = None


@dataclass(slots=True)
class Health:
    """
    Health of a profile's device: *failure* is the reason if it does not work, *proven* whether
    it has ever passed. A failed device is tested again when the *backoff* (boot clock) is over.
    """

    proven: bool = False
    failure: str | None = "the self-test has not been done yet"
    backoff: Backoff = field(default_factory=lambda: Backoff(_MIN_BACKOFF, _MAX_BACKOFF))

    def signed(self) -> None:
        """A grant was signed."""
        # A running delay is kept: an unstable device must not cause more self-tests.
        self.failure, self.backoff.failures = None, 0

    def failed(self, exc: HsmTollError) -> None:
        """Signing failed; *exc* is noted if its scope is the device or its certificate."""
        if exc.scope in ("device", "certificate"):
            self.failure = str(exc)

    def back_off(self, now: float) -> None:
        """Delay the next self-test, with exponential backoff: each may cost a signature."""
        self.backoff.failed(now)

    def tested(self, result: SelfTestResult, now: float) -> None:
        """Note the result of a self-test."""
        if result.failure is None:
            self.proven, self.failure = True, None
            return
        self.failure = str(result.failure)
        if result.signature_wrong and not self.proven:
            self.back_off(now)


def sign_self_test(app: App) -> SelfTestResult:
    """Try the devices of *app* in order, until the signature of one verifies. May wait."""
    failure, signature_wrong, signatures = None, False, 0
    for device in app.devices:
        try:
            sign, not_after = _self_test_of(app, device)
            signatures += 1
            sign()
        except HsmTollError as exc:
            failure, signature_wrong = (
                failure or exc,
                signature_wrong or exc.code == "signature-wrong",
            )
        else:
            return SelfTestResult(
                None,
                signature_wrong=signature_wrong,
                signatures=signatures,
                not_after=not_after,
            )
    return SelfTestResult(failure, signature_wrong=signature_wrong, signatures=signatures)


def _self_test_of(app: App, device: Device) -> tuple[Callable[[], None], datetime | None]:
    """
    Read the device's certificates and find its key; returns the function that signs, and the end
    of the certificate.
    """
    signer = app.local_signer(device)
    not_after = signer.chain().leaf.not_after if app.settings.kid is None else None
    pool = [*readable(device.certificates()), *app.signers.supplied().certificates]
    candidates = tuple({each.public_key for each in pool if each.public_key is not None})
    public = device.key(candidates=candidates).public
    keys = (public,) if public is not None else candidates

    def sign() -> None:
        if device.self_test(app.settings.alg, candidates=keys) is None:
            raise DeviceError(
                "self-test: the device's signature verifies with no public key that is known",
                hint="run `hsmtoll doctor`",
                code="signature-wrong",
            )

    return sign, not_after
