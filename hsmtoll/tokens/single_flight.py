"""
A renewal in progress, shared by all callers that wait for it, and the errors of a failed one.

Which caller starts a renewal, and what is done with its token, is decided in cache.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hsmtoll import errors

if TYPE_CHECKING:
    import asyncio

    from hsmtoll.errors import HsmTollError
    from hsmtoll.token import AccessToken, TokenRequirements

__all__ = [
    "THREAD",
    "PendingRenewal",
    "deadline_exceeded_error",
    "expired_on_arrival_error",
    "join_renewal_threads",
    "min_life_unattainable_error",
]

#: Name of a thread that renews.
THREAD: Final = "hsmtoll-renew"


@dataclass(slots=True, eq=False)
class PendingRenewal:
    """A renewal in progress and the callers that wait for it."""

    started: float
    requirements: TokenRequirements
    phase: str = "waiting for another process"
    #: The signer (`SignedGrant.identity`), once it is known.
    identity: str | None = None
    waiting: int = 0
    outcome: AccessToken | BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    #: As *done*, for the tasks of each event loop.
    futures: dict[asyncio.AbstractEventLoop, asyncio.Future[None]] = field(default_factory=dict)


def join_renewal_threads(seconds: float) -> float:
    """
    Join renewal threads at interpreter exit, for at most *seconds*; returns the seconds left. The
    process may crash if the interpreter stops a thread inside a PKCS#11 module.
    """
    until = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name == THREAD:
            # A thread that is listed but not yet started cannot be joined.
            while not thread.is_alive() and thread in threading.enumerate():
                time.sleep(0.001)
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
    return max(0.0, until - time.monotonic())


def min_life_unattainable_error(requirements: TokenRequirements, most: float) -> HsmTollError:
    """UsageError: a new token has only *most* seconds left, less than the required minimum."""
    lives = f"{round(most, 1):g} s"
    return errors.UsageError(
        f"a token of {requirements.min_life:.0f} s was requested: new ones are valid for {lives}",
        hint="request less; the lifetime is set by Maskinporten and Customs",
    )


def expired_on_arrival_error(token: AccessToken) -> HsmTollError:
    """NetworkError: the token had expired when it arrived."""
    return errors.NetworkError(
        f"new token: had expired on arrival, its lifetime is {token.lifetime} s",
        hint="the services are slow, or the lifetime that they set is too short",
        code="token-over",
    )


def deadline_exceeded_error(pending: PendingRenewal, seconds: float) -> HsmTollError:
    """The error for callers that have waited *seconds* for *pending*."""
    if pending.phase == "signing":
        return errors.DeviceError(
            f"signing: the device did not answer within {seconds:.0f} s",
            hint="with HSMTOLL_HSM__ISOLATION=process a module that hangs is killed, and the next"
            " call starts it again",
            code="device-hangs",
        )
    return errors.NetworkError(
        f"new token: not obtained within {seconds:.0f} s ({pending.phase})",
        hint="HSMTOLL_DEADLINE sets how long to wait",
        code="deadline",
    )
