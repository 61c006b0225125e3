"""The HSMTOLL_… variables: unknown, repeated and wrongly quoted ones are errors."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
from typing import Final

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.settings.model import PREFIX, VARIABLES, nearest

__all__ = ["CONFIG", "PROFILE", "check_environment", "value_of"]

_log = logging.getLogger("hsmtoll.settings")

#: The variables that select what is read; neither is a setting itself.
CONFIG: Final = f"{PREFIX}CONFIG"
PROFILE: Final = f"{PREFIX}PROFILE"


def value_of(name: str) -> str | None:
    """The value of a variable, in any case; None if it is not set or empty."""
    values = (value for given, value in os.environ.items() if given.upper() == name)
    return next(filter(None, values), None)


def check_environment() -> None:
    """
    Check the HSMTOLL_… variables. ConfigurationError if one is unknown, is set twice (in another
    case), has quotation marks around its value or a carriage return at the end.
    """
    ours = {name: each for name, each in sorted(os.environ.items()) if _is_ours(name)}
    spelt: dict[str, str] = {}
    for name, value in ours.items():
        if value and (other := spelt.setdefault(name.upper(), name)) != name:
            raise ConfigurationError(
                f"variables {sanitized(other)} and {sanitized(name)}: the same setting, set twice",
                hint="unset one of them",
                code="setting-twice",
            )
        _check_value(name, value)
    unknown = {name: each for name, each in ours.items() if name.upper() not in _KNOWN}
    links = [name for name, value in unknown.items() if _is_service_link(name, value)]
    for name in unknown:
        if name not in links:
            raise ConfigurationError(
                f"variable {sanitized(name)}: there is no such setting",
                hint=nearest(name.upper(), _KNOWN),
                code="setting-unknown",
            )
    if links:
        _log.warning(
            "variable %s%s: ignored, Kubernetes sets it for a Service of that name; "
            "enableServiceLinks: false in the pod's specification prevents it",
            links[0],
            f" and {len(links) - 1} more" if len(links) > 1 else "",
        )


_KNOWN: Final = (*VARIABLES, CONFIG, PROFILE)


def _is_ours(name: str) -> bool:
    return name.upper().startswith(PREFIX)


def _check_value(name: str, value: str) -> None:
    if value.endswith("\r"):
        raise ConfigurationError(
            f"variable {sanitized(name)}: its value ends with a carriage return",
            hint="the file that sets it has Windows line ends (CRLF): save it with LF",
            code="setting-invalid",
        )
    # A PIN may have quotation marks, and a PIN command may begin and end with a quoted word.
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    if quoted and "PIN" not in name.upper():
        raise ConfigurationError(
            f"{name.upper()}: is in quotation marks; write the value without them",
            hint="shells remove them; docker's --env-file, for one, does not",
            code="setting-invalid",
        )


# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_LINK: Final = re.compile(
    r"HSMTOLL(?:_[A-Z0-9]+)*?_"
    r"(?:(?P<host>SERVICE_HOST)|(?P<port>SERVICE_PORT(?:_[A-Z0-9]+)*)|(?P<url>PORT)"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:(?P<all>)|_(?P<part>PROTO|PORT|ADDR)))"
)
_LINK_URL: Final = re.compile(r"(?:tcp|udp|sctp)://(\[?[0-9A-Fa-f.:]+\]?):[0-9]{1,5}")


def _is_service_link(name: str, value: str) -> bool:
    """Whether the kubelet has set it for a Service called hsmtoll or hsmtoll-SOMETHING."""
    found = _LINK.fullmatch(name)
    if found is None:
        return False
    if found["url"] or found["all"] is not None:
        return _LINK_URL.fullmatch(value) is not None
    if found["part"] == "PROTO":
        return value in ("tcp", "udp", "sctp")
    if found["host"] or found["part"] == "ADDR":
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(value))
        # A headless Service has no address.
        return value == "None"
    return re.fullmatch(r"[0-9]{1,5}", value) is not None
