"""
Switches of the sandbox for behaviour that the services' documentation leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PROFILES", "Profile", "Settings"]

Profile = Literal["strict-docs", "as-observed"]


@dataclass(frozen=True, slots=True)
class Settings:
    """
    How strict, and which of two documented answers. Times in seconds.

    *environment* decides which Norwegian policies are accepted (M31, M36). *longest_grant* is
    the bound of M54. *tolerate* names what ``as-observed`` lets pass: ``nbf``, ``resource`` as
    a string, ``aud`` as a list of one.
    *lifetimes* gives access-token lifetimes per scope (M82), *lifetime* the others.
    *without* is the rules that are switched off, by id.
    """

    environment: Literal["test", "prod"] = "test"
    longest_grant: int = 120
    tolerate: frozenset[str] = frozenset()
    lifetime: int = 600
    lifetimes: Mapping[str, int] = field(default_factory=lambda: {"digdir:verksemd.eu": 120})
    signing_bits: int = 4096
    eseal_authority: Literal["etsi-en-319-412", "etsi_en_119_612"] = "etsi-en-319-412"
    root_in_x5c: bool = False
    key_usage_enforced: bool = False
    invalid_subject_status: Literal[400, 401] = 401
    exchange_twice: bool = True
    polling_delay: float = 1.5
    success_status: Literal[200, 202] = 200
    failure_status: Literal[200, 202] = 202
    without: frozenset[str] = frozenset()


PROFILES: Final[Mapping[Profile, Settings]] = {
    "strict-docs": Settings(),
    "as-observed": Settings(longest_grant=180, tolerate=frozenset({"nbf", "resource", "aud-list"})),
}
