"""The self-test of a profile's device, and what it and the grants since say about the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from hsmtoll.backoff import Backoff
from hsmtoll.errors import DeviceError, HsmTollError
from hsmtoll.signing.signer import readable

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.app import App
    from hsmtoll.hsm.device import Device

__all__ = ["Health", "Tested", "sign_self_test"]

#: Seconds between two self-tests of a device that failed: at first, and at the most.
_FIRST_PAUSE: Final = 5.0
_LONGEST_PAUSE: Final = 60.0


class Tested(NamedTuple):
    """
    A self-test with each device until one passed. *failure* is the first device's, ``None`` if one
    passed; *wasted*: a device signed, and its signature was wrong.
    """

    failure: HsmTollError | None
    wasted: bool
    signatures: int


@dataclass(slots=True)
class Health:
    """
    Whether the device of a profile works: *failure* says why not, *proven* whether it ever did.
    One that failed is tested again when the *rest* (boot clock) is over.
    """

    proven: bool = False
    failure: str | None = "the self-test has not been done yet"
    rest: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE, _LONGEST_PAUSE))

    def signed(self) -> None:
        """A grant was signed."""
        # The rest goes on: a device that now signs and now fails costs no more self-tests.
        self.failure, self.rest.failures = None, 0

    def failed(self, exc: HsmTollError) -> None:
        """No grant was signed: *exc* counts if it is about the device or its certificate."""
        if exc.scope in ("device", "certificate"):
            self.failure = str(exc)

    def back_off(self, now: float) -> None:
        """No self-test before the pause is over: each may cost a signature."""
        self.rest.failed(now)

    def tested(self, result: Tested, now: float) -> None:
        """A self-test is over."""
        if result.failure is None:
            self.proven, self.failure = True, None
            return
        self.failure = str(result.failure)
        if result.wasted and not self.proven:
            self.back_off(now)


def sign_self_test(app: App) -> Tested:
    """Try the devices of *app* in order, until the signature of one verifies. May wait."""
    failure, wasted, signatures = None, False, 0
    for device in app.devices:
        try:
            sign = _self_test_of(app, device)
            signatures += 1
            sign()
        except HsmTollError as exc:
            failure, wasted = failure or exc, wasted or exc.code == "signature-wrong"
        else:
            return Tested(None, wasted=wasted, signatures=signatures)
    return Tested(failure, wasted=wasted, signatures=signatures)


def _self_test_of(app: App, device: Device) -> Callable[[], None]:
    """Find the device's certificates and key; what is returned makes the signature."""
    signer = app.local_signer(device)
    if app.settings.kid is None:
        signer.chain()
    pool = [*readable(device.certificates()), *app.supplied().certificates]
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

    return sign
