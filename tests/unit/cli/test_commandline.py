"""What all commands have in common: help, global options in any place."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from hsmtoll import apis
from hsmtoll.cli import main, run
from hsmtoll.cli.framework import Group
from tests.kit.readers import pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def walk(command: click.Command, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield names, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            each = command.get_command(context, name)
            assert each is not None
            yield from walk(each, *names, name)


EVERY = dict(walk(main))
ALONE = {names: each for names, each in EVERY.items() if not isinstance(each, click.Group)}
#: Where the option is the command's own.
OWN_PROFILE = {("policy", "test"), ("audit", "list")}


def shown(*argv: str) -> str:
    done = CliRunner().invoke(main, argv, prog_name="hsmtoll", terminal_width=78)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("names", EVERY, ids=" ".join)
def test_each_help_has_an_example_and_says_in_one_line_what_it_needs(
    names: tuple[str, ...],
) -> None:
    text = shown(*names, "--help")
    assert re.search(r"^Examples?:\n  hsmtoll |^Examples?:\n  (ssh|eval) .*hsmtoll ", text, re.M)  # noqa: FURB167 - short
    assert names == () or len(re.findall(r"^Needs: .*\.$", text, re.M)) == 1  # noqa: FURB167 - short
    assert max(map(len, text.splitlines())) <= 80
    for jargon in ("predict", "leaves with", "go on", "memory of", "the same as an option"):
        assert jargon not in text.lower()


@pytest.mark.parametrize("names", EVERY, ids=" ".join)
def test_help_command_is_the_same_as_the_option(names: tuple[str, ...]) -> None:
    assert shown("help", *names) == shown(*names, "--help")


def test_help_of_no_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "key", "improt"]) == 2
    assert "did you mean import?" in capsys.readouterr().err
    assert run(["help", "token", "road"]) == 2


def test_help_shows_each_page_of_the_manual_as_it_is_and_lists_them() -> None:
    listed = dict(line.split(maxsplit=1) for line in shown("help", "topics").splitlines())
    assert {"changelog", "devices", "operations", "security"} <= set(listed)
    assert set(listed) == {name for name in pages() if name != "README"}
    for topic in set(listed) - set(main.list_commands(click.Context(main))):
        text = shown("help", topic)
        assert text == pages()[topic]
        assert text.startswith(f"# {listed[topic]}\n")


def test_help_of_no_topic_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "devises"]) == 2
    assert "did you mean devices?" in capsys.readouterr().err
    assert run(["help", "tokne"]) == 2
    assert "did you mean token?" in capsys.readouterr().err
    assert run(["help", "../LICENSE"]) == 2
    assert "hsmtoll help topics" in capsys.readouterr().err
    assert run(["help", "devices", "more"]) == 2


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each hsmtoll in an example."""
    lexed = shlex.shlex(line, posix=True, punctuation_chars="|<>&;()")
    lexed.whitespace_split = True
    words = list(lexed)
    for at, word in enumerate(words):
        if word == "hsmtoll":
            rest = words[at + 1 :]
            ends = (n for n, w in enumerate(rest) if set(w) <= set("|<>&;()"))
            yield rest[: next(ends, None)]


@pytest.mark.parametrize("names", EVERY, ids=" ".join)
def test_each_example_is_a_command_line_that_is_taken(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.pub").touch()
    examples = " ".join(getattr(EVERY[names], "examples", ())).replace("\\ ", " ")
    lines = re.split(r" (?=hsmtoll |ssh |eval )", examples)
    taken = 0
    for line in lines:
        here = line.replace("/var/lib/hsmtoll/audit", str(tmp_path))
        for argv in calls(here.replace('"$(', " ( ").replace(')"', " )")):
            parse(main, click.Context(main, info_name="hsmtoll"), argv)
            taken += 1
    assert taken


def parse(command: click.Command, context: click.Context, argv: list[str]) -> None:
    """As click does for a command that is run; whatever is wrong is raised."""
    if not isinstance(command, click.Group):
        command.make_context(context.info_name, argv, parent=context.parent)
    elif argv:
        name, found, rest = command.resolve_command(context, argv)
        assert found is not None
        parse(found, click.Context(found, info_name=name, parent=context), rest)


def first_sentence(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split()).removesuffix(".")


def test_every_command_stands_in_one_list_with_its_own_first_sentence_and_none_is_cut() -> None:
    assert isinstance(main, Group)
    listed = [name for rows in main.summaries().values() for name in rows]
    assert len(listed) == len(set(listed))
    for rows in main.summaries().values():
        for name, summary in rows.items():
            assert summary == f"{first_sentence(EVERY[name,])}."
    lines = [line for line in shown("--help").splitlines() if re.match(r"  [a-z]", line)]
    for name in listed:
        (row,) = [row for row in lines if row.startswith(f"  {name} ")]
        assert row.endswith(".")
        assert "..." not in row
    for names, group in EVERY.items():
        if names and isinstance(group, click.Group):
            text = shown(*names, "--help")
            assert all(re.search(rf"^  {name} .*\.$", text, re.M) for name in group.commands)  # noqa: FURB167 - short


@pytest.mark.parametrize("names", EVERY, ids=" ".join)
def test_global_options_are_taken_after_each_command(names: tuple[str, ...]) -> None:
    shown(*names, "--config", "c.toml", "--profile", "p", "-v", "--help")
    text = shown(*names, "--help")
    assert "--config FILE" in text
    assert text.count("--profile") == 1 or names in OWN_PROFILE | {("policy",)}
    refused = CliRunner().invoke(main, [*names, "--confg", "c.toml", "--help"])
    assert refused.exit_code == 2


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two configuration files, with two profiles each: `stop` shows which one is read."""
    for name in [name for name in os.environ if name.upper().startswith("HSMTOLL_")]:
        monkeypatch.delenv(name)
    for file in ("a", "b"):
        lines = [f'host.policy = "{tmp_path}/{file}-none/policy.toml"']
        for profile in ("x", "y"):
            folder = tmp_path / f"{file}-{profile}"
            folder.mkdir()
            lines += [f"[profile.{profile}.host]", f'policy = "{folder}/policy.toml"']
        (tmp_path / f"{file}-none").mkdir()
        (tmp_path / f"{file}.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("--config a.toml stop", "a-none"),
        ("stop --config a.toml", "a-none"),
        ("--config a.toml stop --config b.toml", "b-none"),
        ("--config a.toml --profile x stop", "a-x"),
        ("--config a.toml stop --profile=y", "a-y"),
        ("--config a.toml --profile x stop --profile y", "a-y"),
        ("--profile x stop --config b.toml", "b-x"),
    ],
)
def test_an_option_after_the_command_wins(policies: Path, line: str, read: str) -> None:
    assert run(line.split()) == 0
    assert [each.parent.name for each in policies.glob("*/stop")] == [read]


def test_options_may_stand_between_the_words_of_a_command_as_well(
    policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (policies / "a-x" / "policy.toml").write_text("")
    for line in (
        "policy --config a.toml --profile x test --profile acme uid:1 road",
        "--profile x policy test --profile acme --config a.toml uid:1 road",
    ):
        code = run(line.split())
        captured = capsys.readouterr()
        assert code == 90, captured.err
        assert "grant: " in captured.out


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("apis", logging.WARNING),
        ("-v apis", logging.INFO),
        ("apis -v", logging.INFO),
        ("-v apis -v", logging.DEBUG),
        ("apis -vvv", logging.DEBUG),
    ],
)
def test_verbosity_adds_up(line: str, level: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 0
    assert logging.getLogger("hsmtoll").level == level
    assert "road" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("docter", "did you mean doctor?"),
        ("tok road", "did you mean token?"),
        ("login", "see `hsmtoll --help`"),
        ("key improt", "did you mean import?"),
        ("apis --jsn", "did you mean --json?"),
        ("apis --frobnicate", "see `hsmtoll apis --help`"),
        ("completion", "Choose from: bash, zsh, fish\n"),
        ("audit verify --public-key=~/x .", "~ is not expanded here"),
        ("stop --config=~/host.toml", "~ is not expanded here"),
    ],
)
def test_a_command_line_that_is_misspelt_is_told_what_is_near(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2


def test_the_apis_as_json_are_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["apis", "--json"]) == 0
    captured = json.loads(capsys.readouterr().out)
    assert captured["schema"] == 1
    assert [each["name"] for each in captured["apis"]] == [api.name for api in apis.APIS]
