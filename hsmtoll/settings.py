"""
Settings: validated values from HSMTOLL_… variables, a TOML file and arguments.

Arguments win over the environment, the environment over ``[profile.NAME]`` of the file, and
that over the file's top level. Every name that is not known is an error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, foreign
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Settings", "load", "not_set", "profiles", "variable"]

_log = logging.getLogger("hsmtoll.settings")

_PREFIX: Final = "HSMTOLL_"


def _words(value: object) -> object:
    # In the environment a list is words with white space between; in the file it may be an array.
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
        raise ValueError("a number of the maker's documents is expected, such as 0x80000001")
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
    """The device, the key on it, and how it is unlocked."""

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
    """Where the sandbox listens; allowed there alone."""

    issuer: _Text | None = None
    token: _Text | None = None
    customs: _Text | None = None


class Budget(_Group):
    """Signatures that may be spent: for one token, and in an hour."""

    per_request: Annotated[int, Field(ge=1, le=10)] = 2
    per_hour: Annotated[int, Field(ge=1, le=100_000)] = 120


class SignerHost(_Group):
    """A signing host to be asked instead of a local device."""

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
    """`hsmtoll proxy`: where it listens, which accounts may call, and which further paths."""

    listen: _Text = "127.0.0.1:8880"
    uids: Annotated[tuple[_Uid, ...], BeforeValidator(_words)] = ()
    paths: _Words = ()


class Host(_Group):
    """What the signing host itself needs."""

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
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    connections: Annotated[int, Field(ge=1, le=1024)] = 64
    connections_per_caller: Annotated[int, Field(ge=1, le=1024)] = 8
    client_crl: _Path | None = None
    # "unchecked" is for machines whose clock is kept by what the kernel does not know of.
    clock: Literal["synchronised", "unchecked"] = "synchronised"


class Settings(BaseSettings):
    """
    Everything hsmtoll can be told, named as in the environment: ``hsm.module`` is
    HSMTOLL_HSM__MODULE. Secrets show as asterisks. What a command needs is asked for when
    the command runs, so that nobody sets more than is used.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
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
    signer: SignerHost = SignerHost()
    host: Host = Host()
    local_proxy: LocalProxy = LocalProxy()

    @property
    def x5c_mode(self) -> Literal["full", "without-root", "leaf", "available"]:
        """
        HSMTOLL_X5C. Where it is not set, a Norwegian client sends the chain if it is at hand, and
        its certificate alone otherwise: the pages of Customs and of Digdir document one each.
        """
        unset = "x5c" not in self.model_fields_set
        return "available" if unset and self.identity == "norwegian" else self.x5c


def load(
    *, config: str | os.PathLike[str] | None = None, profile: str | None = None, **given: Any
) -> Settings:
    """
    The settings of this process: *given* over the environment over the file.

    *config* and *profile* win over HSMTOLL_CONFIG and HSMTOLL_PROFILE.

    Nested values are given as mappings (``hsm={"module": …}``) or flat (``hsm__module=…``).
    Raises ConfigurationError, naming the variable, the key or the argument, never a value.
    """
    _refuse_odd_variables(os.environ)
    path = _config_path(config)
    named = profile or _from_environment(_PROFILE)
    try:
        filed = _read_file(path, named) if path else {}
    except RecursionError:
        raise ConfigurationError(f"configuration file {path}: nested too deeply") from None
    if named is not None and path is None:
        raise ConfigurationError(
            f"profile {foreign(named)}: there is no configuration file to find it in",
            hint="set HSMTOLL_CONFIG or pass --config",
        )
    arguments = _nested(given)
    _refuse_unknown_keys(arguments, "argument")
    layers = (filed, EnvSettingsSource(Settings)(), arguments)
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _laid_over(merged, layer)
    try:
        # The layers are laid over each other here: an error then names the one that a value is
        # from, and the file lies below the environment.
        settings = Settings.model_validate(merged)
    except ValidationError as exc:
        # `from None`: the original carries the raw values of the whole group, the PIN among them.
        raise _spelled_out(exc, layers, path) from None
    _consistent(settings)
    return settings


def _fields(group: type[BaseModel] = Settings) -> Iterator[tuple[str, ...]]:
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Group):
            yield from ((name, *rest) for rest in _fields(kind))
        else:
            yield (name,)


def variable(*path: str) -> str:
    """The variable of a setting: ``("hsm", "module")`` is HSMTOLL_HSM__MODULE."""
    return _PREFIX + "__".join(path).upper()


def not_set(lacking: Mapping[str, str]) -> ConfigurationError:
    """The error that names all settings that are missing: what each is, by its variable."""
    *others, last = lacking
    names = f"{', '.join(others)} and {last}" if others else last
    hints = [f"{name}: {why}" if others else why for name, why in lacking.items()]
    return ConfigurationError(
        f"{names}: required, and not set", hint="\n".join(hints), code="setting-missing"
    )


_PATHS: Final = frozenset(_fields())
_VARIABLES: Final = {variable(*path): path for path in _PATHS}
#: Where the settings are read from; neither is a setting itself.
_CONFIG: Final = f"{_PREFIX}CONFIG"
_PROFILE: Final = f"{_PREFIX}PROFILE"


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"


def _refuse_odd_variables(environ: Mapping[str, str]) -> None:
    spelt: dict[str, str] = {}
    links: list[str] = []
    for name in sorted(environ):
        upper = name.upper()
        if upper.startswith(_PREFIX) and environ[name] and spelt.setdefault(upper, name) != name:
            raise ConfigurationError(
                f"variables {foreign(spelt[upper])} and {foreign(name)}: one setting, set twice",
                hint="unset one of them",
                code="setting-twice",
            )
        if upper.startswith(_PREFIX) and environ[name].endswith("\r"):
            raise ConfigurationError(
                f"variable {foreign(name)}: its value ends with a carriage return",
                hint="the file that sets it has Windows line ends (CRLF): write it with LF alone",
                code="setting-invalid",
            )
        # A PIN says so itself, and its command may begin and end with a quoted word.
        if upper.startswith(_PREFIX) and "PIN" not in upper and _is_quoted(environ[name]):
            raise ConfigurationError(
                f"{upper}: is in quotation marks; write the value without them",
                hint="shells take them away; docker's --env-file, for one, leaves them",
                code="setting-invalid",
            )
        if not upper.startswith(_PREFIX) or upper in (_CONFIG, _PROFILE, *_VARIABLES):
            continue
        if _is_service_link(name, environ[name]):
            links.append(name)
            continue
        raise ConfigurationError(
            f"variable {foreign(name)}: there is no such setting",
            hint=_nearest(upper, (*_VARIABLES, _CONFIG, _PROFILE)),
            code="setting-unknown",
        )
    if links:
        _log.warning(
            "variable %s%s: left out, it is about a Kubernetes Service of that name; "
            "enableServiceLinks: false in the pod's specification keeps them away",
            links[0],
            f" and {len(links) - 1} more" if len(links) > 1 else "",
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
        # A Service without an address of its own.
        return value == "None"
    return re.fullmatch(r"[0-9]{1,5}", value) is not None


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return did_you_mean(name, known, "`hsmtoll help settings` lists every setting")


def _from_environment(variable_name: str) -> str | None:
    values = (value for name, value in os.environ.items() if name.upper() == variable_name)
    return next(filter(None, values), None)


def _config_path(given: str | os.PathLike[str] | None) -> Path | None:
    named = given or _from_environment(_CONFIG)
    if named:
        path = Path(named)
        if str(path).startswith("~"):
            raise ConfigurationError(
                f"configuration file {foreign(path)}: there is no such file",
                hint="~ is not expanded here; write the whole path",
            )
        if str(path) == os.devnull:
            # No file at all, not even the machine's own: nobody can write anything into it.
            return None
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigurationError(
                f"configuration file {foreign(path)}: there is no such file"
            ) from None
        except OSError as exc:
            raise ConfigurationError(
                f"configuration file {foreign(path)}: cannot be read ({exc.strerror})"
            ) from exc
        return path
    places = [Path("/etc/hsmtoll")]
    # An account may have no home at all.
    with contextlib.suppress(RuntimeError):
        # A relative one is none (XDG Base Directory): it would be of the working directory.
        given_home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
        home = given_home if given_home.is_absolute() else Path.home() / ".config"
        if home.is_absolute():
            places.insert(0, home / "hsmtoll")
    for place in places:
        # What this account cannot look into is not its own: after sudo, HOME may be another's.
        with contextlib.suppress(OSError):
            if (place / "hsmtoll.toml").is_file():
                return place / "hsmtoll.toml"
    return None


def profiles(config: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The names of the profiles in the configuration file. ConfigurationError as by `load`."""
    path = _config_path(config)
    return tuple(_tables(path)[1]) if path else ()


def _tables(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top level of the configuration file, and its profiles."""
    raw = files.read(path, "configuration file")
    try:
        values = tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"configuration file {path}: cannot be read") from exc
    except tomllib.TOMLDecodeError as exc:
        # `from None`, and the place alone: the parser's own words may quote a line with a PIN.
        at = re.search(r"\(at .*\)", str(exc))
        raise ConfigurationError(
            f"configuration file {path}: not valid TOML {at[0] if at else ''}".rstrip()
        ) from None
    named = values.pop("profile", {})
    if not isinstance(named, dict) or not all(isinstance(each, dict) for each in named.values()):
        raise ConfigurationError(f"configuration file {path}: [profile.NAME] tables are expected")
    return values, named


def _read_file(path: Path, profile: str | None) -> dict[str, Any]:
    values, named = _tables(path)
    for group in (values, *named.values()):
        _refuse_unknown_keys(group, f"configuration file {path}: key")
        _warn_of_open_pin(group, path)
    if profile is None:
        return dict(values)
    if profile not in named:
        there = f"profiles there: {', '.join(map(foreign, named))}"
        raise ConfigurationError(
            f"profile {foreign(profile)}: not in {path}",
            hint=did_you_mean(profile, named, there)
            if named
            else "the file has no [profile.NAME] tables",
        )
    return _laid_over(values, named[profile])


def _warn_of_open_pin(values: Mapping[str, Any], path: Path) -> None:
    hsm = values.get("hsm")
    if isinstance(hsm, dict) and {"pin", "signing_pin"} & hsm.keys():
        with contextlib.suppress(OSError):
            if path.stat().st_mode & stat.S_IROTH:
                _log.warning(
                    "configuration file %s: it holds a PIN, and everybody can read it: chmod o-r",
                    foreign(path),
                )


def _refuse_unknown_keys(values: Mapping[str, Any], where: str) -> None:
    groups = {path[0] for path in _PATHS if len(path) > 1}
    for name, value in values.items():
        inner = value if name in groups and isinstance(value, dict) else {"": None}
        for sub in inner:
            path = (name, sub) if sub else (name,)
            if path in _PATHS or (name in groups and not sub):
                continue
            dotted = ".".join(path)
            raise ConfigurationError(
                f"{where} {foreign(dotted)}: there is no such setting",
                hint=_nearest(dotted, (*groups, *(".".join(known) for known in _PATHS))),
                code="setting-unknown",
            )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, rest = name.partition("__")
        given = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        nested = _laid_over(nested, {group: {rest: given}} if rest else {group: given})
    return nested


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        if isinstance(value, dict) and isinstance(lower, dict):
            merged[name] = _laid_over(lower, value)
        else:
            merged[name] = value
    return merged


def _spelled_out(
    exc: ValidationError, layers: tuple[dict[str, Any], ...], path: Path | None
) -> ConfigurationError:
    filed, environment, arguments = layers
    lines = []
    for error in exc.errors(include_input=False, include_url=False, include_context=False):
        place = tuple(str(part) for part in error["loc"] if isinstance(part, str))
        if _holds(arguments, place):
            name = f"argument {'__'.join(place)}"
        elif _holds(environment, place) or not _holds(filed, place):
            name = variable(*place)
        else:
            name = f"configuration file {path}: key {'.'.join(place)}"
        said = error["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {said[:1].lower()}{said[1:]}")
    return ConfigurationError(
        lines[0],
        hint="\n".join(f"also: {line}" for line in lines[1:]) or None,
        code="setting-invalid",
    )


def _holds(layer: Mapping[str, Any], place: tuple[str, ...]) -> bool:
    value: Any = layer
    for part in place:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


#: Paths that must mean the same wherever a command is run, and why.
_ABSOLUTE: Final = {
    ("hsm", "module"): "a module is code: it is never looked for in the working directory",
    ("state",): "in another working directory a refused PIN would be forgotten, and tried again",
    ("host", "policy"): "in another working directory `hsmtoll stop` would stop nothing",
    ("host", "stop_file"): "in another working directory `hsmtoll stop` would stop nothing",
}


def _consistent(settings: Settings) -> None:
    """What single values cannot show: settings that contradict each other."""
    hsm = settings.hsm
    for kind in ("pin", "signing_pin"):
        names = (kind, f"{kind}_file", f"{kind}_command", f"{kind}_prompt")
        given = [variable("hsm", name) for name in names if getattr(hsm, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(
                f"{' and '.join(given)}: a PIN comes from one source", hint="unset all but one"
            )
    parts = [
        variable("hsm", name)
        for name in ("token_label", "token_serial", "key_label", "key_id")
        if getattr(hsm, name) is not None
    ]
    if hsm.key and parts:
        raise ConfigurationError(
            f"HSMTOLL_HSM__KEY and {', '.join(parts)}: both select the key",
            hint="put everything into the URI, or use the parts alone",
        )
    if settings.kid not in (None, "thumbprint") and len(hsm.key) > 1:
        raise ConfigurationError(
            "HSMTOLL_KID: one key id cannot name several keys of HSMTOLL_HSM__KEY",
            hint="set HSMTOLL_KID=thumbprint and register each key under its RFC 7638 thumbprint",
        )
    _check_uris(hsm.key)
    for place, why in _ABSOLUTE.items():
        value: Any = settings
        for name in place:
            value = getattr(value, name)
        if value is not None and not value.is_absolute():
            raise ConfigurationError(f"{variable(*place)}: an absolute path is expected", hint=why)
    _check_signer(settings)
    _check_endpoints(settings)
    _check_proxy(settings)
    if settings.cache is not None:
        _check_cache(settings.cache.get_secret_value(), settings.cache_key_file)


def _check_uris(uris: tuple[str, ...]) -> None:
    for number, uri in enumerate(uris, 1):
        if uri.lower().startswith("pkcs11:"):
            continue
        # It may be anything, a PIN included: it is not repeated.
        raise ConfigurationError(
            f"HSMTOLL_HSM__KEY: word {number} of {len(uris)} does not start with 'pkcs11:'",
            hint="white space separates URIs; write a blank as %20"
            if number > 1
            else "`hsmtoll objects` prints the URI of every key, ready to paste",
            code="uri",
        )


#: Bytes of a Unix socket's path (unix(7): sun_path without its end).
_SOCKET_PATH: Final = 107


def _check_signer(settings: Settings) -> None:
    """A signing host: its addresses, and that every check asked for can be made."""
    signer = settings.signer
    if not signer.url:
        given = [variable("signer", name) for name in signer.model_fields_set if name != "url"]
        if given:
            # Signing here although another host was meant would be worse than an error.
            raise ConfigurationError(
                f"{', '.join(sorted(given))}: there is no HSMTOLL_SIGNER__URL",
                hint="set it to unix:///PATH or https://HOST:PORT, or unset these to sign here",
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
            "the name of a profile in the signing host's policy; its custodian knows it",
        ),
        (
            "https" in schemes and signer.client_cert is None,
            "HSMTOLL_SIGNER__CLIENT_CERT: required with a signing host over https",
            "PEM, the key in it or in HSMTOLL_SIGNER__CLIENT_KEY: it knows callers by that",
        ),
        (
            signer.client_key is not None and signer.client_cert is None,
            "HSMTOLL_SIGNER__CLIENT_KEY: there is no HSMTOLL_SIGNER__CLIENT_CERT to it",
            "set both, or neither",
        ),
        (
            signer.uid is not None and "unix" not in schemes,
            "HSMTOLL_SIGNER__UID: only a Unix socket tells the account at its other end",
            "unset it; over https the certificate shows who answers",
        ),
        (
            signer.organization is not None and signer.mode == "token",
            "HSMTOLL_SIGNER__ORGANIZATION: a token does not show whose it is",
            "unset it, or set HSMTOLL_SIGNER__MODE=grant, where the certificate shows it",
        ),
        (
            signer.organization is not None and settings.kid is not None,
            "HSMTOLL_SIGNER__ORGANIZATION and HSMTOLL_KID: a kid does not show whose key it is",
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
        raise ConfigurationError(f"{name}: neither user nor query is expected", hint=hint)
    if parts.scheme == "unix":
        path = unquote(parts.path)
        if parts.netloc or not path.startswith("/") or path.endswith("/") or "\0" in path:
            raise ConfigurationError(
                f"{name}: three slashes and an absolute path are expected", hint=hint
            )
        if len(os.fsencode(path)) > _SOCKET_PATH:
            raise ConfigurationError(
                f"{name}: the path of a socket has {_SOCKET_PATH} bytes at most",
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
            f"{', '.join(given)}: endpoints are given with HSMTOLL_ENVIRONMENT=sandbox alone",
            hint="those of test and prod are fixed; unset these, or set the environment to sandbox",
            code="endpoints-fixed",
        )
    hosts = {}
    for name, url in given.items():
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme != "https" or not host or parts.username or parts.query or parts.fragment:
            raise ConfigurationError(f"{name}: an https URL is expected, without user or query")
        if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
            # Other alphabets have dots of their own, which a client of HTTP turns into real ones;
            # what a proxy makes of %2E is its own affair.
            raise ConfigurationError(
                f"{name}: a host of ASCII letters, digits, dots and hyphens is expected",
                hint="write an international name in its xn-- form",
            )
        for real in ("maskinporten.no", "toll.no"):
            if host == real or host.endswith(f".{real}"):
                raise ConfigurationError(
                    f"{name}: the sandbox may not be under {real}",
                    hint="HSMTOLL_ENVIRONMENT=test or prod speaks to the real services",
                    code="endpoints-real",
                )
        hosts[name] = (host, _port(name, url))
    issuer, token = (hosts.get(variable("endpoints", name)) for name in ("issuer", "token"))
    if issuer and token and issuer != token:
        raise ConfigurationError(
            "HSMTOLL_ENDPOINTS__TOKEN: lies on another host than HSMTOLL_ENDPOINTS__ISSUER",
            hint="a grant is sent to its own audience alone",
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
            "HSMTOLL_PROXY: http://HOST:PORT, https://HOST:PORT or the word environment is expected"
        )


#: What redis-py takes in a URL of every kind, but for what is set here: TLS and time limits.
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
            "HSMTOLL_CACHE: redis:// without TLS is for this machine alone",
            hint="use rediss:// for another host",
        )
    options = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    weak = [name for name in options if name.lower().startswith("ssl")]
    if weak:
        raise ConfigurationError(
            f"HSMTOLL_CACHE: the option {foreign(weak[0])} is not allowed in the URL",
            hint="the server's certificate is always verified; its CA goes into HSMTOLL_CA_FILE",
        )
    other = [name for name in options if name not in _REDIS_OPTIONS]
    if other:
        raise ConfigurationError(
            f"HSMTOLL_CACHE: there is no option {foreign(other[0])} of the URL",
            hint=f"there are {', '.join(sorted(_REDIS_OPTIONS))}",
        )
    if key_file is None:
        raise ConfigurationError(
            "HSMTOLL_CACHE_KEY_FILE: required with a Redis cache, whose values are encrypted",
            hint="make one: (umask 077; head -c 32 /dev/urandom > FILE), the same on every machine",
        )
