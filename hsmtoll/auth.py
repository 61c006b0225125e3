"""
Auth for httpx and httpx2, sync and async: the bearer token on requests to Customs' origin only.

Tokens are obtained elsewhere; the assertion and Maskinporten's token are not used here.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import httpx

from hsmtoll import apis
from hsmtoll.errors import ConfigurationError, HsmTollError, UsageError, sanitized
from hsmtoll.token import TokenRequirements

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from hsmtoll.token import AccessToken, TokenRequest
    from hsmtoll.tokens.token_service import TokenService

__all__ = ["AsyncTollAuth", "TollAuth", "with_httpx2"]

_log = logging.getLogger("hsmtoll.client")

#: Name of the request extension with the bearer token that we have set.
_BEARER_EXTENSION: Final = "hsmtoll.bearer"

_Kind = TypeVar("_Kind", bound="TollAuth")


class TollAuth(httpx.Auth):
    """
    Authentication for httpx.Client and httpx.AsyncClient, and with `with_httpx2` for those of
    httpx2. Raises as `TollClient.token`.
    """

    #: Types of a body that can be sent again; a streamed one is consumed.
    _repeatable: ClassVar[tuple[type, ...]] = (httpx.ByteStream,)

    def __init__(self, token_service: TokenService, request: TokenRequest) -> None:
        self._token_service = token_service
        self._request = request
        self._customs = httpx.URL(token_service.endpoints.customs)
        # httpx lower-cases both and omits a default port.
        self._origin = self._customs.scheme, self._customs.netloc

    def _check(self, request: httpx.Request) -> None:
        """Before a token is requested, check the URL and the headers of the request."""
        url, netloc = request.url, request.url.netloc
        if (url.scheme, netloc) != self._origin:
            raise ConfigurationError(
                f"call to {sanitized(request.url.host)}: "
                f"the token is for {self._customs.host} only",
                hint="use another client for other hosts",
                code="foreign-origin",
            )
        given, host = request.headers.get("authorization"), request.headers.get("host", "")
        # A request may be sent twice: the second time it has our own header.
        if given is not None and given != request.extensions.get(_BEARER_EXTENSION):
            raise UsageError(
                "call: it has an Authorization header of its own",
                hint="leave it out; hsmtoll sets it",
            )
        if host.lower() != netloc.decode("ascii").lower():
            raise UsageError(
                "call: it has a Host header of its own",
                hint="leave it out; it would send the token to another server behind the address",
            )

    def _with_bearer(self, request: httpx.Request, token: AccessToken) -> httpx.Request:
        request.headers["Authorization"] = request.extensions[_BEARER_EXTENSION] = (
            f"Bearer {token.value}"
        )
        return request

    def _should_retry(
        self, request: httpx.Request, response: httpx.Response, token: AccessToken
    ) -> bool:
        """Whether to renew the token after a 401 and send the request again."""
        return (
            response.status_code == httpx.codes.UNAUTHORIZED
            and isinstance(request.stream, self._repeatable)
            and self._token_service.worth_renewing(token.value, self._request)
        )

    def _explain(self, request: httpx.Request, response: httpx.Response) -> None:
        """Log the token's scope and the scope that the path needs: the usual cause of a 403."""
        if response.status_code != httpx.codes.FORBIDDEN:
            return
        try:
            api = apis.api_of_path(request.url.path)
            opens = f"API {api.name}, which {api.scope(self._token_service.family)} opens"
        except HsmTollError:
            opens = "no API of `hsmtoll apis`"
        _log.warning("call: 403 for a token with %s; the path is of %s", self._request.scope, opens)

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """Send with the token; after a 401, once more with a renewed one."""
        self._check(request)
        token_service = self._token_service
        token = token_service.token(self._request)
        response = yield self._with_bearer(request, token)
        if self._should_retry(request, response, token):
            token = token_service.token(self._request, TokenRequirements(avoid=token.value))
            response = yield self._with_bearer(request, token)
        self._explain(request, response)

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """As sync_auth_flow, for tasks: waiting for a token blocks no thread."""
        self._check(request)
        token_service = self._token_service
        token = await token_service.atoken(self._request)
        response = yield self._with_bearer(request, token)
        if self._should_retry(request, response, token):
            token = await token_service.atoken(self._request, TokenRequirements(avoid=token.value))
            response = yield self._with_bearer(request, token)
        self._explain(request, response)


class AsyncTollAuth(TollAuth):
    """As TollAuth; returned by `AsyncTollClient.auth`."""


def with_httpx2(kind: type[_Kind]) -> type[_Kind]:
    """
    *kind*, also for the clients of httpx2 if that is installed: each library takes only subclasses
    of its own Auth. Both read the flows by the same attributes of a request and a response.
    """
    made: type[_Kind] = _classes()[kind.__name__]
    return made


@cache
def _classes() -> dict[str, Any]:
    """Both classes by name, made from those of httpx2 as well if it can be imported."""
    plain = (TollAuth, AsyncTollAuth)
    try:
        import httpx2  # noqa: PLC0415 - an extra
    except ImportError:
        return {kind.__name__: kind for kind in plain}
    repeatable = {"_repeatable": (httpx.ByteStream, httpx2.ByteStream)}
    return {kind.__name__: type(kind.__name__, (kind, httpx2.Auth), repeatable) for kind in plain}
