"""
Settings: validated values from arguments, HSMTOLL_… variables and a TOML file.

Arguments win over the environment, the environment over ``[profile.NAME]`` of the file, and that
over the file's top level. An unknown name in any of them is an error.

    model        names, types and defaults
    environment  checks the variables
    config_file  finds and reads the file
    layers       load: merges the three layers, and names the one in which a value is wrong
    consistency  checks values that contradict each other
"""

from __future__ import annotations

from hsmtoll.settings.config_file import profiles
from hsmtoll.settings.layers import load
from hsmtoll.settings.model import Host, Hsm, LocalProxy, Settings, SignerHost, not_set, variable

__all__ = [
    "Host",
    "Hsm",
    "LocalProxy",
    "Settings",
    "SignerHost",
    "load",
    "not_set",
    "profiles",
    "variable",
]
