"""Checks of settings together, and of addresses: what the type of one setting cannot show."""

from __future__ import annotations

import os
import re
from operator import attrgetter
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.settings.model import variable

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.settings.model import Hsm, Settings

__all__ = ["check"]


def check(settings: Settings) -> None:
    """ConfigurationError if settings contradict each other, or an address cannot be used."""
    _check_pins(settings.hsm)
    _check_key(settings)
    _check_absolute(settings)
    _check_signer(settings)
    _check_endpoints(settings)
    _check_proxy(settings)
    if settings.cache is not None:
        _check_cache(settings.cache.get_secret_value(), settings.cache_key_file)


def _check_pins(hsm: Hsm) -> None:
    for kind in ("pin", "signing_pin"):
        names = (kind, f"{kind}_file", f"{kind}_command", f"{kind}_prompt")
        given = [variable("hsm", name) for name in names if getattr(hsm, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(
                f"{' and '.join(given)}: a PIN has one source", hint="unset all but one"
            )


def _check_key(settings: Settings) -> None:
    hsm = settings.hsm
    parts = [
        variable("hsm", name)
        for name in ("token_label", "token_serial", "key_label", "key_id")
        if getattr(hsm, name) is not None
    ]
    if hsm.key and parts:
        raise ConfigurationError(
            f"HSMTOLL_HSM__KEY and {', '.join(parts)}: both select the key",
            hint="put everything into the URI, or unset HSMTOLL_HSM__KEY",
        )
    if settings.kid not in (None, "thumbprint") and len(hsm.key) > 1:
        raise ConfigurationError(
            "HSMTOLL_KID: one key id cannot identify several keys of HSMTOLL_HSM__KEY",
            hint="set HSMTOLL_KID=thumbprint and register each key under its RFC 7638 thumbprint",
        )
    for number, uri in enumerate(hsm.key, 1):
        if not uri.lower().startswith("pkcs11:"):
            # Not repeated here: it may be anything, a PIN included.
            raise ConfigurationError(
                f"HSMTOLL_HSM__KEY: word {number} of {len(hsm.key)} does not start with 'pkcs11:'",
                hint="white space separates URIs; write a space as %20"
                if number > 1
                else "`hsmtoll objects` prints the URI of every key",
                code="uri",
            )


#: Paths that must not depend on the working directory, and why.
_ABSOLUTE: Final = {
    ("hsm", "module"): "a module is code: it is never loaded from the working directory",
    ("state",): "from another working directory a refused PIN would be tried again",
    ("host", "policy"): "from another working directory `hsmtoll stop` would stop nothing",
    ("host", "stop_file"): "from another working directory `hsmtoll stop` would stop nothing",
}


def _check_absolute(settings: Settings) -> None:
    for place, why in _ABSOLUTE.items():
        path = attrgetter(".".join(place))(settings)
        if path is not None and not path.is_absolute():
            raise ConfigurationError(f"{variable(*place)}: an absolute path is expected", hint=why)


#: Bytes of a Unix socket's path (unix(7): sun_path without the terminating null byte).
_SOCKET_PATH: Final = 107


def _check_signer(settings: Settings) -> None:
    """The addresses of signing hosts, and whether every requested check of a host is possible."""
    signer = settings.signer
    if not signer.url:
        given = [variable("signer", name) for name in signer.model_fields_set if name != "url"]
        if given:
            # Otherwise a forgotten URL would make this machine sign.
            raise ConfigurationError(
                f"{', '.join(sorted(given))}: set without HSMTOLL_SIGNER__URL",
                hint="set it to unix:///PATH or https://HOST:PORT, or unset these to sign locally",
                code="signer-incomplete",
            )
        return
    schemes = {_signer_scheme(url) for url in signer.url}
    if len(set(signer.url)) < len(signer.url):
        raise ConfigurationError("HSMTOLL_SIGNER__URL: the same signing host is named twice")
    for wrong, what, hint in (
        (
            signer.profile is None,
            "HSMTOLL_SIGNER__PROFILE: required with HSMTOLL_SIGNER__URL",
            "the name of a profile in the signing host's policy; ask its operator",
        ),
        (
            "https" in schemes and signer.client_cert is None,
            "HSMTOLL_SIGNER__CLIENT_CERT: required with a signing host over https",
            "PEM, with the key or with HSMTOLL_SIGNER__CLIENT_KEY; it authenticates this caller",
        ),
        (
            signer.client_key is not None and signer.client_cert is None,
            "HSMTOLL_SIGNER__CLIENT_KEY: set without HSMTOLL_SIGNER__CLIENT_CERT",
            "set both, or neither",
        ),
        (
            signer.uid is not None and "unix" not in schemes,
            "HSMTOLL_SIGNER__UID: only a Unix socket has peer credentials",
            "unset it; over https the host's certificate authenticates it",
        ),
        (
            signer.organization is not None and signer.mode == "token",
            "HSMTOLL_SIGNER__ORGANIZATION: cannot be checked, a token is opaque",
            "unset it, or set HSMTOLL_SIGNER__MODE=grant: a grant has the certificate in it",
        ),
        (
            signer.organization is not None and settings.kid is not None,
            "HSMTOLL_SIGNER__ORGANIZATION and HSMTOLL_KID: a kid does not identify its owner",
            "unset one of them",
        ),
    ):
        if wrong:
            raise ConfigurationError(what, hint=hint, code="signer-incomplete")


def _signer_scheme(url: str) -> str:
    name = "HSMTOLL_SIGNER__URL"
    hint = "unix:///PATH or https://HOST:PORT; several with white space between"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigurationError(f"{name}: not a URL", hint=hint) from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(f"{name}: must not have a user, query or fragment", hint=hint)
    if parts.scheme == "unix":
        path = unquote(parts.path)
        if parts.netloc or not path.startswith("/") or path.endswith("/") or "\0" in path:
            raise ConfigurationError(
                f"{name}: three slashes and an absolute path are expected", hint=hint
            )
        if len(os.fsencode(path)) > _SOCKET_PATH:
            raise ConfigurationError(
                f"{name}: the path of a socket is limited to {_SOCKET_PATH} bytes",
                hint="choose a shorter one, such as /run/hsmtoll/socket",
            )
    elif parts.scheme == "https" and parts.hostname and parts.path in ("", "/"):
        _port(name, url)
    else:
        raise ConfigurationError(f"{name}: not the address of a signing host", hint=hint)
    return parts.scheme


def _check_endpoints(settings: Settings) -> None:
    given = {
        variable("endpoints", name): value
        for name, value in settings.endpoints.model_dump().items()
        if value is not None
    }
    if not given:
        return
    if settings.environment != "sandbox":
        raise ConfigurationError(
            f"{', '.join(given)}: allowed only with HSMTOLL_ENVIRONMENT=sandbox",
            hint="the endpoints of test and prod are fixed; unset these, or use the sandbox",
            code="endpoints-fixed",
        )
    hosts = {}
    for name, url in given.items():
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme != "https" or not host or parts.username or parts.query or parts.fragment:
            raise ConfigurationError(f"{name}: an https URL is expected, without user or query")
        if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
            # HTTP clients turn the full stops of other scripts into dots, and proxies may decode
            # %2E: neither must lead to the real services.
            raise ConfigurationError(
                f"{name}: a host of ASCII letters, digits, dots and hyphens is expected",
                hint="write an international name in its xn-- form",
            )
        for real in ("maskinporten.no", "toll.no"):
            if host == real or host.endswith(f".{real}"):
                raise ConfigurationError(
                    f"{name}: must not be under {real}",
                    hint="HSMTOLL_ENVIRONMENT=test or prod uses the real services",
                    code="endpoints-real",
                )
        hosts[name] = (host, _port(name, url))
    issuer, token = (hosts.get(variable("endpoints", name)) for name in ("issuer", "token"))
    if issuer and token and issuer != token:
        raise ConfigurationError(
            "HSMTOLL_ENDPOINTS__TOKEN: on another host than HSMTOLL_ENDPOINTS__ISSUER",
            hint="a grant is only sent to its audience",
        )


def _port(name: str, url: str) -> int:
    try:
        return urlsplit(url).port or 443
    except ValueError:
        raise ConfigurationError(f"{name}: the port is not a number in 1…65535") from None


def _check_proxy(settings: Settings) -> None:
    proxy = settings.proxy and settings.proxy.get_secret_value()
    if not proxy or proxy == "environment":
        return
    try:
        parts = urlsplit(proxy)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        fine = False
    if not fine:
        raise ConfigurationError(
            "HSMTOLL_PROXY: http://HOST:PORT, https://HOST:PORT or `environment` is expected"
        )


#: Options of a Redis URL that are passed on. Not TLS and time limits, which are set here.
_REDIS_OPTIONS: Final = frozenset(
    {
        "client_name", "db", "health_check_interval", "max_connections", "password", "protocol",
        "username",
    }
)  # fmt: skip


def _check_cache(url: str, key_file: Path | None) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts = None
    if parts is None or "\0" in url:
        raise ConfigurationError("HSMTOLL_CACHE: not a URL") from None
    match parts.scheme:
        case "memory" if url == "memory:":
            return
        case "file" if url == "file:" or (url.startswith("file:///") and len(parts.path) > 1):
            return
        case "redis" | "rediss" | "unix":
            pass
        case _:
            raise ConfigurationError(
                "HSMTOLL_CACHE: memory:, file:, file:///DIR, redis://… or rediss://… is expected"
            )
    local = parts.scheme == "unix" or host in ("localhost", "127.0.0.1", "::1")
    if parts.scheme == "redis" and not local:
        raise ConfigurationError(
            "HSMTOLL_CACHE: redis:// is without TLS, and allowed on this machine only",
            hint="use rediss:// for another host",
        )
    options = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    weak = [name for name in options if name.lower().startswith("ssl")]
    if weak:
        raise ConfigurationError(
            f"HSMTOLL_CACHE: the option {sanitized(weak[0])} is not allowed in the URL",
            hint="the server's certificate is always verified; its CA goes into HSMTOLL_CA_FILE",
        )
    other = [name for name in options if name not in _REDIS_OPTIONS]
    if other:
        raise ConfigurationError(
            f"HSMTOLL_CACHE: the URL has the unknown option {sanitized(other[0])}",
            hint=f"known options: {', '.join(sorted(_REDIS_OPTIONS))}",
        )
    if key_file is None:
        raise ConfigurationError(
            "HSMTOLL_CACHE_KEY_FILE: required with Redis, where values are encrypted",
            hint="make one: (umask 077; head -c 32 /dev/urandom > FILE), the same on every machine",
        )
