"""Arguments over the environment over the file: one set of validated settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.settings import consistency
from hsmtoll.settings.config_file import config_path, read_file
from hsmtoll.settings.environment import PROFILE, check_environment, value_of
from hsmtoll.settings.model import Settings, check_names, variable

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["load"]

_Layer = dict[str, Any]


def load(
    *, config: str | os.PathLike[str] | None = None, profile: str | None = None, **given: Any
) -> Settings:
    """
    The settings of this process: *given* over the environment over the file.

    *config* and *profile* win over HSMTOLL_CONFIG and HSMTOLL_PROFILE. Nested values are given as
    mappings (``hsm={"module": …}``) or flat (``hsm__module=…``). ConfigurationError names the
    variable, key or argument that is wrong, never a value.
    """
    check_environment()
    path = config_path(config)
    filed = _file_layer(path, profile or value_of(PROFILE))
    arguments = _nested(given)
    check_names(arguments, "argument")
    layers = (filed, EnvSettingsSource(Settings)(), arguments)
    merged: _Layer = {}
    for layer in layers:
        merged = _merged(merged, layer)
    try:
        # Merged here and not by pydantic-settings, so that an error can name the layer of a value.
        settings = Settings.model_validate(merged)
    except ValidationError as exc:
        # `from None`: the original holds the values of the whole group, the PIN among them.
        raise _error(exc, layers, path) from None
    consistency.check(settings)
    return settings


def _file_layer(path: Path | None, profile: str | None) -> _Layer:
    if path is None:
        if profile is None:
            return {}
        raise ConfigurationError(
            f"profile {sanitized(profile)}: there is no configuration file to find it in",
            hint="set HSMTOLL_CONFIG or pass --config",
        )
    try:
        return _merged(*read_file(path, profile))
    except RecursionError:
        raise ConfigurationError(f"configuration file {path}: nested too deeply") from None


def _nested(flat: Mapping[str, Any]) -> _Layer:
    nested: _Layer = {}
    for name, value in flat.items():
        group, _, rest = name.partition("__")
        given = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        nested = _merged(nested, {group: {rest: given}} if rest else {group: given})
    return nested


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> _Layer:
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        if isinstance(value, dict) and isinstance(lower, dict):
            merged[name] = _merged(lower, value)
        else:
            merged[name] = value
    return merged


def _error(
    exc: ValidationError, layers: tuple[_Layer, _Layer, _Layer], path: Path | None
) -> ConfigurationError:
    """One line for each invalid value, which names the layer that it is from."""
    filed, environment, arguments = layers
    lines = []
    for error in exc.errors(include_input=False, include_url=False, include_context=False):
        place = tuple(str(part) for part in error["loc"] if isinstance(part, str))
        if _has(arguments, place):
            name = f"argument {'__'.join(place)}"
        elif _has(environment, place) or not _has(filed, place):
            name = variable(*place)
        else:
            name = f"configuration file {path}: key {'.'.join(place)}"
        message = error["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {message[:1].lower()}{message[1:]}")
    return ConfigurationError(
        lines[0],
        hint="\n".join(f"also: {line}" for line in lines[1:]) or None,
        code="setting-invalid",
    )


def _has(layer: Mapping[str, Any], place: tuple[str, ...]) -> bool:
    value: Any = layer
    for part in place:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True
