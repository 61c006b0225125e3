"""A suggestion is made for what is near, and for nothing else."""

from __future__ import annotations

import click
import pytest

from hsmtoll import apis
from hsmtoll.cli import main
from hsmtoll.settings.model import PATHS, VARIABLES
from hsmtoll.suggestions import did_you_mean
from hsmtoll.testing.faults import NAMES

APIS = [api.name for api in apis.APIS]
KEYS = [".".join(path) for path in PATHS]
COMMANDS = main.list_commands(click.Context(main))


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("HSMTOLL_ENV", VARIABLES, "HSMTOLL_ENVIRONMENT"),
        ("HSMTOLL_ENVIROMENT", VARIABLES, "HSMTOLL_ENVIRONMENT"),
        ("HSMTOLL_MODULE", VARIABLES, "HSMTOLL_HSM__MODULE"),
        ("HSMTOLL_PIN_FILE", VARIABLES, "HSMTOLL_HSM__PIN_FILE"),
        ("HSMTOLL_KEY", VARIABLES, "HSMTOLL_HOST__KEY or HSMTOLL_HSM__KEY"),
        ("HSMTOLL_HSM_PIN_FILE", VARIABLES, "HSMTOLL_HSM__PIN_FILE"),
        ("HSMTOLL_SCOOP", VARIABLES, "HSMTOLL_SCOPE"),
        ("ENVIRONMENT", KEYS, "environment"),
        ("HSMTOLL_ENVIRONMENT", KEYS, "environment"),
        ("Hsm.Module", KEYS, "hsm.module"),
        ("HSMTOLL_HSM__MODULE", KEYS, "hsm.module"),
        ("pin-file", KEYS, "hsm.pin_file"),
        ("raod", APIS, "road"),
        ("Road_Query", APIS, "road-query"),
        ("declaration", APIS, "declaration-feed"),
        ("pin-worng", NAMES, "pin-wrong"),
        ("docter", COMMANDS, "doctor"),
    ],
)
def test_what_is_near_is_suggested(word: str, known: list[str], near: str) -> None:
    assert did_you_mean(word, known) == f"did you mean {near}?"


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("HSMTOLL_PORT", VARIABLES),
        ("HSMTOLL_SERVICE_HOST", VARIABLES),
        ("HSMTOLL_PORT_8443_TCP", VARIABLES),
        ("HSMTOLL_", VARIABLES),
        ("HSMTOLL_HSM", VARIABLES),
        ("ferry", APIS),
        ("", APIS),
        ("---", APIS),
        ("login", COMMANDS),
    ],
)
def test_what_is_far_is_not_suggested(word: str, known: list[str]) -> None:
    assert did_you_mean(word, known) is None
    assert did_you_mean(word, known, "see the list") == "see the list"
