"""
Network faults by name: what goes wrong, at which endpoint, how many times (M89, T27).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENDPOINTS", "NAMES", "Fault", "Faults"]

#: Every fault, with what it does and its options.
NAMES: Final[Mapping[str, str]] = {
    "refuse": "nobody listens on the endpoint's port, until cleared (never counted)",
    "reset": "the connection is reset after the request was read",
    "reset-after": "the request takes effect, then the connection is reset instead of an answer",
    "slow": "the answer waits; seconds=2",
    "drip": "the body comes one byte at a time; seconds=0.05 between two",
    "truncated": "half of the announced body, then the connection ends",
    "endless": "a body that never ends",
    "html": "200 with an HTML page",
    "429": "throttled, no Retry-After",
    "429-retry-after": "throttled; seconds=2 in Retry-After",
    "500": "JSON error",
    "502": "HTML page of a gateway",
    "503": "HTML page; with times=1: 503, then 200",
    "401": "401, empty; at an API it also kills the token that came with the request",
    "redirect": "302; location=https://elsewhere.invalid/",
    "clock": "this side's clock is wrong; seconds=60, until cleared (never counted)",
    "echo": "400 whose error text repeats the form, secrets included",
    "newline-token": "an access_token with a line break in it",
    "expires-in": "expires_in replaced by value=",
    "rotate-keys": "Maskinporten signs with another key from now on, both published",
    "hold": "requests wait until callers=2 of them are there",
}
#: ``api`` is every call of Customs' APIs; a path prefix is an endpoint, too.
ENDPOINTS: Final = ("*", "token", "exchange", "api", "metadata", "jwk", "health")
_STANDING: Final = frozenset({"refuse", "clock"})


@dataclass(slots=True, eq=False)
class Fault:
    """A fault in force. *times*: requests it still hits (None: all); *after*: that pass before."""

    name: str
    endpoint: str = "*"
    times: int | None = None
    after: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    seen: int = 0

    def hits(self, endpoint: str, path: str) -> bool:
        """Whether the fault applies to this request."""
        if self.endpoint.startswith("/"):
            return path.startswith(self.endpoint)
        return self.endpoint in ("*", endpoint)

    def seconds(self, default: float) -> float:
        """The option `seconds`."""
        return float(self.options.get("seconds", default))


class Faults:
    """The faults in force. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Fault] = []

    def set(
        self,
        name: str,
        endpoint: str = "*",
        *,
        times: int | None = None,
        after: int = 0,
        **options: Any,
    ) -> Fault:
        """
        Set a fault; ValueError for an unknown name or endpoint.

        The first *after* requests pass, the next *times* are hit (None: all).
        """
        if name not in NAMES:
            near = did_you_mean(name, NAMES, f"there are: {', '.join(NAMES)}")
            raise ValueError(f"no fault is called {name!r}; {near}")
        if endpoint not in ENDPOINTS and not endpoint.startswith("/"):
            raise ValueError(
                f"no endpoint is called {endpoint!r}: {', '.join(ENDPOINTS)}, or /path"
            )
        if name in _STANDING and (times is not None or after):
            raise ValueError(f"{name} stays until it is cleared: it takes neither times nor after")
        fault = Fault(name, endpoint, times, after, options)
        with self._lock:
            self._all.append(fault)
        return fault

    def clear(self) -> None:
        """Clear all faults."""
        with self._lock:
            self._all.clear()

    def active(self) -> list[Fault]:
        """The faults in force."""
        with self._lock:
            return list(self._all)

    def take(self, endpoint: str, path: str) -> Fault | None:
        """The fault that hits this request, counted down. The first that was set wins."""
        with self._lock:
            for fault in self._all:
                if fault.name in _STANDING or not fault.hits(endpoint, path):
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                    if not fault.times:
                        self._all.remove(fault)
                return fault
        return None

    def standing(self, name: str, endpoint: str) -> Fault | None:
        """The fault *name* (refuse, clock) in force at *endpoint*: it lasts until cleared."""
        with self._lock:
            found = [
                one for one in self._all if one.name == name and one.endpoint in ("*", endpoint)
            ]
        return found[-1] if found else None
