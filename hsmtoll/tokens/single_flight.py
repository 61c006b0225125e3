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
    from hsmtoll.token import AccessToken, Wish

__all__ = ["THREAD", "Flight", "late", "over", "see_out", "too_much"]

#: What the thread of a flight is called.
THREAD: Final = "hsmtoll-renew"


@dataclass(slots=True, eq=False)
class Flight:
    """One renewal under way and everybody who waits for it."""

    started: float
    wish: Wish
    doing: str = "waiting for another process"
    #: Who signed for it (`SignedGrant.identity`), once that is certain.
    identity: str | None = None
    waiting: int = 0
    outcome: AccessToken | BaseException | None = None
    landed: threading.Event = field(default_factory=threading.Event)
    # The futures of the tasks that wait in a loop, one each, so that each can be cancelled
    # alone; None once they were woken.
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]] | None] = field(
        default_factory=dict
    )


def see_out(seconds: float) -> float:
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


def too_much(wish: Wish, most: float) -> HsmTollError:
    """For a *wish* longer than the *most* seconds that a new token has left when it comes."""
    lives = f"{round(most, 1):g} s"
    return errors.UsageError(
        f"a token that lives {wish.min_life:.0f} s was asked for: new ones live {lives}",
        hint="ask for less; the lifetime is set by Maskinporten and Customs",
    )


def over(token: AccessToken) -> HsmTollError:
    """For a token whose life was spent on its way."""
    return errors.NetworkError(
        f"a new token: it lives {token.lifetime} s, and was over when it came",
        hint="the services are slow, or the lifetime that they give is too short",
        code="token-over",
    )


def late(flight: Flight, patience: float) -> HsmTollError:
    """For those whom *flight* has kept waiting for *patience* seconds."""
    if flight.doing == "signing":
        return errors.DeviceError(
            f"signing: the device did not answer within {patience:.0f} s",
            hint="with HSMTOLL_HSM__ISOLATION=process a module that hangs is ended, and the next"
            " call starts it again",
            code="device-hangs",
        )
    return errors.NetworkError(
        f"a new token: not here after {patience:.0f} s ({flight.doing})",
        hint="HSMTOLL_DEADLINE sets how long to wait",
        code="deadline",
    )
