"""
What the README and its pages show is run as their reader would: in order, by the commands of a page
alone.

The signing host needs root and accounts: tests/host/test_readme_host.py.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.kit import readers
from tests.kit.readers import PATIENCE, Terminal, blocks, commands, pages, section, shows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.identity import TemporaryIdentity

#: The shell that the README opens for its examples.
SHELL: Final = ("hsmtoll", "sandbox", "--", "bash")

#: A key of one's own, from an empty device to its successor.
OWN_KEY: Final = [*blocks(section("Your own key")), *blocks(pages()["keys"])]

#: What has tests of its own, or is run with settings of its own.
ELSEWHERE: Final = [*OWN_KEY, *blocks(pages()["signing-host"])]

#: What is shown on each page that shows a command's output.
SHOWN: Final = {
    name: [each for each in blocks(text, "console") if each not in ELSEWHERE]
    for name, text in pages().items()
}
PROGRAMS: Final = [
    pytest.param(each.text, id=f"{name}-{number}")
    for name, text in pages().items()
    for number, each in enumerate(blocks(text, "python"))
]


def test_the_readme_opens_the_shell_that_its_examples_need() -> None:
    assert f"`{' '.join(SHELL)}`" in section("Five minutes with the sandbox")


@pytest.mark.parametrize("page", [name for name, shown in SHOWN.items() if shown])
def test_every_command_of_a_page_shows_what_the_page_says(tmp_path: Path, page: str) -> None:
    with Terminal(tmp_path, SHELL) as shell:
        assert sum(shell.follow(each) for each in SHOWN[page]) > 0
        # The control: a command that shows something else is noticed.
        code, output = shell.run("hsmtoll test-auth raod")
        assert code == 2, output
        assert not shows(output, "200 OK\n")


@contextlib.contextmanager
def second_terminal(folder: Path, command: str, made: Path) -> Iterator[None]:
    """*command* goes on in another terminal, until the end of the block; it makes a file first."""
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=readers.environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            until = time.monotonic() + PATIENCE
            while not (made.exists() and made.read_text()):
                assert process.poll() is None, f"it ended: {command}"
                assert time.monotonic() < until, f"{command} made no {made.name}"
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def test_set_up_leads_from_an_empty_device_to_a_call(tmp_path: Path) -> None:
    followed = 0
    with contextlib.ExitStack() as stack:
        shell = stack.enter_context(Terminal(tmp_path))
        for block in OWN_KEY:
            command = block.text.strip()
            if command.startswith("hsmtoll sandbox "):
                # It runs until it is interrupted, in the same directory.
                folder = tmp_path / "customs"
                stack.enter_context(second_terminal(folder, command, folder / "sandbox.env"))
            else:
                followed += shell.follow(block)
        # The control: without the settings that it made, nothing of this would have worked.
        code, output = shell.run("unset HSMTOLL_HSM__KEY; hsmtoll chain")
        assert code == 10, output
    assert followed >= 20


def test_the_settings_that_set_up_calls_enough_are_as_many_as_it_says() -> None:
    (exported,) = (
        each for each in blocks(section("Your own key"), "sh") if "HSMTOLL_IDENTITY=" in each.text
    )
    named = set(re.findall(r" (HSMTOLL_\w+)=", exported.text))
    # The sixth is a place, which has a default.
    assert len(named - {"HSMTOLL_STATE"}) == 5
    assert "Five are enough" in section("Your own key")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_of_a_page_runs(
    tmp_path: Path, program: str, toll_eseal: TemporaryIdentity, toll_sandbox: Sandbox
) -> None:
    (tmp_path / "test_readme_example.py").write_text(program, encoding="utf-8")
    # An example for pytest is run by it, in a project of its own and without any settings.
    as_test = "def test_" in program
    # What customers do in Altinn, the test does.
    delegated = "consumer_org=" in program
    for customer in ("910000001", "910000002"):
        toll_sandbox.delegate(customer, "NTRSE-5566778899", "toll:eu/movement/road/v2")
    theirs = {**toll_eseal.environ(), **toll_sandbox.environ()} if delegated else {}
    argv = ("bash",) if as_test or delegated else SHELL
    with Terminal(tmp_path, argv, readers.environment() | theirs) as shell:
        code, output = shell.run(
            "python -m pytest -q --rootdir=. -p no:cacheprovider test_readme_example.py"
            if as_test
            else "python test_readme_example.py"
        )
    assert code == 0, output
    assert "Traceback" not in output


def test_a_block_is_split_into_its_commands() -> None:
    console = readers.Block("console", "$ one\na\nb\n$ two\n")
    assert commands(console) == [("one", "a\nb\n"), ("two", "")]
    assert commands(readers.Block("sh", "one \\\n  two\n\nthree\n")) == [
        ("one    two", None),
        ("three", None),
    ]


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nc\n", "a\nb\n", False),
        ("a\nb\nc\n", "a\nb\n", False),
        ("1. CN=x (until)\n", "1. CN=x…\n", True),
        ("2. CN=x\n", "1. CN=x…\n", False),
        ("a\nb\nc\n", "a\n…\nc\n", True),
        ("a\nb\nd\n", "a\n…\nc\n", False),
        ("a\nx\n", "a…\n", False),
    ],
)
def test_the_comparison_takes_what_fits_and_nothing_else(
    output: str, expected: str, same: bool
) -> None:
    assert shows(output, expected) is same
