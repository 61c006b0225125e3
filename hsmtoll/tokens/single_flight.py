"""
One renewal under way, and what those are told who get nothing from it.

Who starts one, and what becomes of its token, is decided in cache.
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

#: What the thread of a flight is called.
THREAD: Final = "hsmtoll-renew"


@dataclass(slots=True, eq=False)
class PendingRenewal:
    """One renewal under way and everybody who waits for it."""

    started: float
    requirements: TokenRequirements
    phase: str = "waiting for another process"
    #: Who signed for it (`SignedGrant.identity`), once that is certain.
    identity: str | None = None
    waiting: int = 0
    outcome: AccessToken | BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    # The futures of the tasks that wait in a loop, one each, so that each can be cancelled
    # alone; None once they were woken.
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]] | None] = field(
        default_factory=dict
    )


def join_renewal_threads(seconds: float) -> float:
    """
    Wait so long for the flights in the air, in a program that ends; returns the seconds left. A
    thread that the interpreter ends in the middle of a library may take the process along.
    """
    until = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name == THREAD:
            # One that is listed and has not begun yet cannot be joined.
            while not thread.is_alive() and thread in threading.enumerate():
                time.sleep(0.001)
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
    return max(0.0, until - time.monotonic())


def min_life_unattainable_error(requirements: TokenRequirements, most: float) -> HsmTollError:
    """UsageError: a new token has only *most* seconds left, less than the required minimum."""
    lives = f"{round(most, 1):g} s"
    return errors.UsageError(
        f"a token that lives {requirements.min_life:.0f} s was asked for: new ones live {lives}",
        hint="ask for less; the lifetime is set by Maskinporten and Customs",
    )


def expired_on_arrival_error(token: AccessToken) -> HsmTollError:
    """For a token whose life was spent on its way."""
    return errors.NetworkError(
        f"a new token: it lives {token.lifetime} s, and was over when it came",
        hint="the services are slow, or the lifetime that they give is too short",
        code="token-over",
    )


def deadline_exceeded_error(pending: PendingRenewal, patience: float) -> HsmTollError:
    """For those whom *pending* has kept waiting for *patience* seconds."""
    if pending.phase == "signing":
        return errors.DeviceError(
            f"signing: the device did not answer within {patience:.0f} s",
            hint="with HSMTOLL_HSM__ISOLATION=process a module that hangs is ended, and the next"
            " call starts it again",
            code="device-hangs",
        )
    return errors.NetworkError(
        f"a new token: not here after {patience:.0f} s ({pending.phase})",
        hint="HSMTOLL_DEADLINE sets how long to wait",
        code="deadline",
    )
