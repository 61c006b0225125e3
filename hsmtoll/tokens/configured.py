"""Endpoints, store and cache key, as the settings name them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hsmtoll import directories, required
from hsmtoll.errors import ConfigurationError, import_optional, install_extra
from hsmtoll.settings import not_set, variable
from hsmtoll.tokens import exchange
from hsmtoll.tokens.stores import FileStore, MemoryStore

if TYPE_CHECKING:
    from hsmtoll.clock import Clock
    from hsmtoll.settings import Settings
    from hsmtoll.tokens.exchange import Endpoints
    from hsmtoll.tokens.stores import Store

__all__ = ["endpoints", "selector", "store"]

#: Variables by which PKCS#11 modules find their devices.
_MODULE_VARIABLES: Final = re.compile(
    "SOFTHSM|PKCS11|P11_|OPENSC|TPM|YUBIHSM|NFAST|CHRYSTOKI|CLOUDHSM|KMS|^CS_|^ET_", re.IGNORECASE
)


def endpoints(settings: Settings) -> Endpoints:
    """
    Constants for test and prod, HSMTOLL_ENDPOINTS__… for the sandbox.

    ConfigurationError if the environment, or an endpoint of the sandbox, is not set.
    """
    match settings.environment:
        case "test":
            return exchange.TEST
        case "prod":
            return exchange.PROD
        case "sandbox":
            given = settings.endpoints
            if not (given.issuer and given.token and given.customs):
                lacking = [name for name, url in given.model_dump().items() if not url]
                raise not_set({variable("endpoints", name): required.SANDBOX for name in lacking})
            return exchange.Endpoints(given.issuer, given.token, given.customs.rstrip("/"))
        case None:
            raise not_set({"HSMTOLL_ENVIRONMENT": required.ENVIRONMENTS})


def store(settings: Settings, clock: Clock, *, default: str) -> Store:
    """
    The store of HSMTOLL_CACHE, or of *default*, a URL as well.

    ConfigurationError if redis-py or the key file for Redis is missing, or cannot be used.
    """
    url = settings.cache.get_secret_value() if settings.cache else default
    if url == "memory:":
        return MemoryStore()
    if url == "file:":
        return FileStore(directories.runtime_directory())
    if url.startswith("file:"):
        return FileStore(Path(url.removeprefix("file://")))
    key_file = settings.cache_key_file
    if key_file is None:
        raise not_set({"HSMTOLL_CACHE_KEY_FILE": "values in Redis are encrypted with it"})
    missing = ConfigurationError(
        "HSMTOLL_CACHE: redis-py is not installed",
        hint=install_extra("redis"),
        code="extra-missing",
    )
    redis_store = import_optional("hsmtoll.tokens.redis_store", missing)
    made: Store = redis_store.RedisStore.at(
        url, key_file=key_file, ca_file=settings.ca_file, clock=clock
    )
    return made


def selector(settings: Settings) -> str:
    """
    SHA-256 (hex) of all settings that select key, identity, endpoints or the host's profile.

    ConfigurationError as by `endpoints`.
    """
    dumped = settings.model_dump(mode="json")
    at = endpoints(settings)
    unlocking = ("pin", "signing_pin")
    selecting = {
        "environment": dumped["environment"],
        "family": dumped["identity"],
        "iss": dumped["iss"],
        "kid": dumped["kid"],
        "endpoints": [at.issuer, at.token, at.customs],
        "hsm": {k: v for k, v in dumped["hsm"].items() if not k.startswith(unlocking)},
        "signer": dumped["signer"],
        # Two devices of one module may differ by the module's own variables only.
        "module": {k: v for k, v in sorted(os.environ.items()) if _MODULE_VARIABLES.search(k)},
    }
    return hashlib.sha256(json.dumps(selecting, sort_keys=True).encode()).hexdigest()
