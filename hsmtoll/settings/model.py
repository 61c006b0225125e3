"""The settings: names, types and defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "PATHS",
    "PREFIX",
    "VARIABLES",
    "Endpoints",
    "Host",
    "Hsm",
    "LocalProxy",
    "Settings",
    "SignerHost",
    "check_names",
    "nearest",
    "not_set",
    "variable",
]

PREFIX: Final = "HSMTOLL_"


def _words(value: object) -> object:
    # In the environment a list is separated by white space; in the file it may be an array.
    return tuple(value.split()) if isinstance(value, str) else value


def _hex(value: str) -> str:
    bare = value.replace(":", "").lower()
    if not re.fullmatch(r"(?:[0-9a-f]{2})+", bare):
        raise ValueError("hexadecimal bytes are expected, such as 01 or a1:b2")
    return bare


def _user_type(value: object) -> int:
    try:
        number = value if isinstance(value, int) else int(str(value), 0)
    except ValueError:
        number = 0
    # CKU_SO administers a device, and CKU_CONTEXT_SPECIFIC belongs to a single signature.
    if isinstance(value, bool) or number in (0, 2) or not 0 < number < 2**32:
        raise ValueError("a number from the manufacturer's documents is expected: 0x80000001")
    return number


def _sha256(value: str) -> str:
    bare = _hex(value)
    if len(bare) != 64:
        raise ValueError("a SHA-256 is 64 hexadecimal digits")
    return bare


def _one_line(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("one line of printable characters is expected")
    return value


def _path(value: Path) -> Path:
    text = str(value)
    if text.startswith("~"):
        raise ValueError("~ is not expanded here; write the whole path")
    if text != text.strip():
        raise ValueError("begins or ends with white space; remove it")
    if text[0] in "\"'":
        raise ValueError("is in quotation marks; write the path without them")
    if "\0" in text:
        raise ValueError("has a NUL character in it")
    return value


_Path = Annotated[Path, AfterValidator(_path)]
_Text = Annotated[str, AfterValidator(_one_line)]
_Words = Annotated[tuple[_Text, ...], BeforeValidator(_words)]
_Seconds = Annotated[float, Field(gt=0, le=3600)]
_Uid = Annotated[int, Field(ge=0, lt=2**32 - 1)]
_Prompt = Literal["terminal", "pinpad"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Hsm(_Group):
    """HSMTOLL_HSM__…: the device, the key on it, and the source of its PIN."""

    module: _Path | None = None
    key: _Words = ()
    token_label: _Text | None = None
    token_serial: _Text | None = None
    key_label: _Text | None = None
    key_id: Annotated[str, AfterValidator(_hex)] | None = None
    pin: SecretStr | None = None
    pin_file: _Path | None = None
    pin_command: SecretStr | None = None
    pin_prompt: _Prompt | None = None
    signing_pin: SecretStr | None = None
    signing_pin_file: _Path | None = None
    signing_pin_command: SecretStr | None = None
    signing_pin_prompt: _Prompt | None = None
    certificates: _Path | None = None
    public_key: _Path | None = None
    root_sha256: Annotated[str, AfterValidator(_sha256)] | None = None
    certificate_sha256: Annotated[str, AfterValidator(_sha256)] | None = None
    allow_exportable_key: bool = False
    user_type: Annotated[int, BeforeValidator(_user_type)] | None = None
    isolation: Literal["none", "process"] = "none"


class Endpoints(_Group):
    """HSMTOLL_ENDPOINTS__…: URLs of the sandbox; constants in test and prod."""

    issuer: _Text | None = None
    token: _Text | None = None
    customs: _Text | None = None


class Budget(_Group):
    """HSMTOLL_BUDGET__…: maximum number of signatures, for one token and in an hour."""

    per_request: Annotated[int, Field(ge=1, le=10)] = 2
    per_hour: Annotated[int, Field(ge=1, le=100_000)] = 120


class SignerHost(_Group):
    """HSMTOLL_SIGNER__…: signing hosts, used instead of a local device."""

    url: _Words = ()
    profile: _Text | None = None
    mode: Literal["grant", "token"] = "grant"
    client_cert: _Path | None = None
    client_key: _Path | None = None
    ca_file: _Path | None = None
    uid: _Uid | None = None
    organization: _Text | None = None

    @property
    def gives_tokens(self) -> bool:
        """Whether the signing host gives Customs tokens, and no grants."""
        return bool(self.url) and self.mode == "token"


class LocalProxy(_Group):
    """HSMTOLL_LOCAL_PROXY__…: where it listens, which accounts may call, and which paths."""

    listen: _Text = "127.0.0.1:8880"
    uids: Annotated[tuple[_Uid, ...], BeforeValidator(_words)] = ()
    paths: _Words = ()


class Host(_Group):
    """HSMTOLL_HOST__…: the signing host itself."""

    socket: _Path | None = None
    listen: _Text | None = None
    cert: _Path | None = None
    key: _Path | None = None
    client_ca: _Path | None = None
    policy: _Path | None = None
    audit_dir: _Path | None = None
    audit_key: _Path | None = None
    stop_file: _Path | None = None
    metrics: _Text | None = None
    metrics_public: bool = False
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    connections: Annotated[int, Field(ge=1, le=1024)] = 64
    connections_per_caller: Annotated[int, Field(ge=1, le=1024)] = 8
    client_crl: _Path | None = None
    # "unchecked" is for clocks that a hypervisor keeps, unknown to the kernel.
    clock: Literal["synchronised", "unchecked"] = "synchronised"


class Settings(BaseSettings):
    """
    All settings: ``hsm.module`` is HSMTOLL_HSM__MODULE. Secrets are shown as asterisks.

    Everything is optional: a command reports the settings that it needs when it runs.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        enable_decoding=False,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    environment: Literal["test", "prod", "sandbox"] | None = None
    identity: Literal["eseal", "norwegian"] | None = None
    iss: _Text | None = None
    kid: _Text | None = None
    scope: _Text | None = None
    consumer_org: _Text | None = None
    resource: _Words = ()
    alg: Literal["RS256", "RS384", "RS512"] = "RS256"
    x5c: Literal["full", "without-root", "leaf"] = "full"
    hsm: Hsm = Hsm()
    endpoints: Endpoints = Endpoints()
    ca_file: _Path | None = None
    proxy: SecretStr | None = None
    timeout: _Seconds = 10.0
    deadline: _Seconds = 60.0
    cache: SecretStr | None = None
    cache_key_file: _Path | None = None
    budget: Budget = Budget()
    state: _Path | None = None
    log: Literal["text", "json"] = "text"
    signer: SignerHost = SignerHost()
    host: Host = Host()
    local_proxy: LocalProxy = LocalProxy()

    @property
    def x5c_mode(self) -> Literal["full", "without-root", "leaf", "available"]:
        """
        HSMTOLL_X5C. If it is not set, a Norwegian client sends the chain if it is available, and
        the leaf otherwise: Customs documents the one, Digdir the other.
        """
        unset = "x5c" not in self.model_fields_set
        return "available" if unset and self.identity == "norwegian" else self.x5c


def _fields(group: type[BaseModel] = Settings) -> Iterator[tuple[str, ...]]:
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Group):
            yield from ((name, *rest) for rest in _fields(kind))
        else:
            yield (name,)


def variable(*path: str) -> str:
    """The variable of a setting: ``("hsm", "module")`` is HSMTOLL_HSM__MODULE."""
    return PREFIX + "__".join(path).upper()


def not_set(lacking: Mapping[str, str]) -> ConfigurationError:
    """The error for settings that are missing: variable → what it is."""
    *others, last = lacking
    names = f"{', '.join(others)} and {last}" if others else last
    hints = [f"{name}: {why}" if others else why for name, why in lacking.items()]
    return ConfigurationError(
        f"{names}: required, and not set", hint="\n".join(hints), code="setting-missing"
    )


#: Path of each setting, such as ``("hsm", "module")``.
PATHS: Final = frozenset(_fields())
VARIABLES: Final = {variable(*path): path for path in PATHS}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The hint for a setting that does not exist."""
    return did_you_mean(name, known, "`hsmtoll help settings` lists every setting")


def check_names(values: Mapping[str, Any], where: str) -> None:
    """ConfigurationError, beginning with *where*, if *values* has a name that is no setting."""
    groups = {path[0] for path in PATHS if len(path) > 1}
    for name, value in values.items():
        members = value if name in groups and isinstance(value, dict) else ()
        paths = [(name, member) for member in members] if name in groups else [(name,)]
        for path in paths:
            if path not in PATHS:
                dotted = ".".join(path)
                raise ConfigurationError(
                    f"{where} {sanitized(dotted)}: there is no such setting",
                    hint=nearest(dotted, (*groups, *(".".join(known) for known in PATHS))),
                    code="setting-unknown",
                )
