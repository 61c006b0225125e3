"""
The APIs of the Customs guide: names, scopes, paths and test calls. Data and look-ups.

Source: https://toll.github.io, "Technical integration" and the pages of the APIs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from hsmtoll.errors import ConfigurationError, UsageError, sanitized
from hsmtoll.suggestions import did_you_mean

__all__ = [
    "APIS",
    "SELF_TEST_SCOPE",
    "VERSION",
    "Api",
    "Identity",
    "api_of_path",
    "at",
    "named",
    "scope_of",
]

#: Date of the guide that this table follows. Update it with every change of a row.
VERSION: Final = "2026-06-20"

Identity = Literal["eseal", "norwegian"]

#: Available to every eSeal; gives no access, and Customs does not exchange it (C27).
SELF_TEST_SCOPE: Final = "digdir:verksemd.eu"


@dataclass(frozen=True, slots=True)
class Api:
    """
    One API of the guide.

    *norwegian*, *eseal*: the scopes for the two kinds of client, ``None`` if there is none. *base*:
    path below Customs' host. *test*: path below *base* of a call that checks a token, if one is
    documented.
    """

    name: str
    norwegian: str | None
    eseal: str | None
    base: str
    test: str | None = None
    not_ready: str | None = None
    test_seen: bool = False
    no_scope: str | None = None

    def scope(self, identity: Identity) -> str:
        """
        The scope for *identity*. ConfigurationError if there is none for it; UsageError if the API
        is not ready, or its scope is not documented.
        """
        scope = self.eseal if identity == "eseal" else self.norwegian
        if self.not_ready is not None:
            raise UsageError(
                f"API {self.name}: {self.not_ready}", hint="`hsmtoll apis` lists the others"
            )
        if self.no_scope is not None:
            raise UsageError(
                f"API {self.name}: {self.no_scope}",
                hint="use the one that you got from Customs, with --scope S (in Python scope=)",
                code="scope-unnamed",
            )
        if scope is None:
            raise ConfigurationError(
                f"API {self.name}: no scope exists for HSMTOLL_IDENTITY={identity}",
                hint="`hsmtoll apis` shows which family may use which API",
                code="scope-family",
            )
        return scope


def _mode(name: str, version: str, norwegian: str, eseal: str) -> tuple[Api, Api]:
    path = f"/api/movement/{name}"
    # Documented for road; in a public client's comments for air and rail.
    test = "/test-auth" if name in ("road", "air", "rail") else None
    seen = name in ("air", "rail")
    return (
        Api(name, norwegian, eseal, f"{path}/{version}", test, test_seen=seen),
        Api(f"{name}-query", norwegian, eseal, f"{path}/status/{version}"),
    )


APIS: Final = (
    *_mode("road", "v2", "toll:movement/road/v2", "toll:eu/movement/road/v2"),
    *_mode("air", "v1", "toll:movement/air", "toll:eu/movement/air"),
    *_mode("rail", "v1", "toll:movement/rail", "toll:eu/movement/rail"),
    *_mode("maritime", "v1", "toll:movement/maritime", "toll:eu/movement/maritime"),
    Api(
        "presentation",
        "toll:movement/entry",
        "toll:eu/movement/entry",
        "/api/movement/presentation/v1",
    ),
    Api("routing", "toll:movement/entry", "toll:eu/movement/entry", "/api/movement/routing/v1"),
    Api(
        "document",
        "toll:goodsdeclaration/document.write",
        "toll:eu/goodsdeclaration/document.write",
        "/api/goodsdeclaration/document/v2",
    ),
    Api(
        "arrival",
        None,
        None,
        "/api/movement/arrival/v1",
        no_scope="the Customs guide names no scope for it",
    ),
    Api(
        "maritime-ssnn",
        "toll:movement/maritimessnn",
        None,
        "/api/movement/maritime-ssnn/v1",
    ),
    Api(
        "maritime-ssnn-query",
        "toll:movement/maritimessnn",
        None,
        "/api/movement/maritime-ssnn/status/v1",
    ),
    Api(
        "declaration-feed",
        "toll:declaration.feed",
        None,
        "",
        not_ready="not yet ready, according to the Customs guide; there is nothing to call",
    ),
    Api("verksemd.eu", None, SELF_TEST_SCOPE, ""),
)

_BY_NAME: Final = {api.name: api for api in APIS}
_BY_SCOPE: Final = {
    scope: api for api in reversed(APIS) for scope in (api.norwegian, api.eseal) if scope
}


def named(name: str) -> Api:
    """The API called *name*; UsageError with the nearest name otherwise."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UsageError(
            f"API {sanitized(name)}: there is no such API",
            hint=did_you_mean(name, _BY_NAME, "`hsmtoll apis` lists them"),
        ) from None


def scope_of(word: str, identity: Identity) -> str:
    """
    The scope that *word*, an API's name or a scope, means for *identity*.

    A scope that is not in the table is allowed if it fits the identity (C18): eSeal clients request
    ``toll:eu/…`` or the self-test, Norwegian clients ``toll:…`` without ``eu/``. Otherwise raises
    ConfigurationError (code ``scope-family``).
    """
    if word in _BY_NAME:
        return _BY_NAME[word].scope(identity)
    if ":" not in word:
        named(word)
    if any(char.isspace() or not char.isprintable() for char in word):
        raise UsageError(f"scope {sanitized(word)}: one scope a token, without white space")
    if word in _BY_SCOPE and _BY_SCOPE[word].not_ready:
        _BY_SCOPE[word].scope(identity)
    wanted = "eseal" if word.startswith("toll:eu/") or word == SELF_TEST_SCOPE else "norwegian"
    if wanted != identity:
        raise ConfigurationError(
            f"scope {sanitized(word)}: belongs to {wanted} clients, "
            f"but HSMTOLL_IDENTITY={identity}",
            hint=_twin(word, identity),
            code="scope-family",
        )
    return word


def _twin(scope: str, identity: Identity) -> str:
    known = _BY_SCOPE.get(scope)
    twin = known and (known.eseal if identity == "eseal" else known.norwegian)
    return f"use {twin}" if twin else "eSeal scopes begin with toll:eu/, Norwegian ones do not"


def api_of_path(path: str) -> Api:
    """The API whose base path *path* lies under; UsageError for any other path."""
    for api in APIS:
        if api.base and (path == api.base or path.startswith((f"{api.base}/", f"{api.base}?"))):
            return api
    raise UsageError(
        f"path {sanitized(path)}: not in the table of APIs (Customs' guide of {VERSION})",
        hint="`hsmtoll apis` lists the base paths; a newer path needs its scope: --scope S "
        "(in Python scope=)",
        code="path-unknown",
    )


def at(path: str) -> Api:
    """The API whose base path *path* lies under, or one without scopes that is not in the table."""
    try:
        return api_of_path(path)
    except UsageError:
        # The path is appended to Customs' origin and must not change the host.
        if not re.fullmatch(r"/(?!/)[!-~]*", path) or "\\" in path:
            raise UsageError(
                f"path {sanitized(path)}: a path that begins with one / is expected"
            ) from None
    base = "/".join(path.partition("?")[0].split("/")[:5])
    return Api(base, None, None, base)
