"""The README as its reader meets it: sections, blocks, and a terminal to type their commands in."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

README: Final = Path(__file__).parents[2] / "README.md"

#: Seconds that one command may take; more, and its terminal is closed.
PATIENCE: Final = 300.0


class Block(NamedTuple):
    """A fenced block: its *kind* (the word after the fence) and its text."""

    section: str
    kind: str
    text: str


def blocks(kind: str | None = None, section: str | None = None) -> list[Block]:
    """The blocks of one kind and section, or all, in the README's order."""
    found = []
    for part in re.split(r"^## ", README.read_text("utf-8"), flags=re.MULTILINE):
        title = part.partition("\n")[0]
        fences = re.finditer(r"^```(\w+)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        found += [Block(title, fence[1], fence[2]) for fence in fences]
    return [each for each in found if kind in (None, each.kind) and section in (None, each.section)]


def commands(block: Block) -> list[tuple[str, str | None]]:
    """(command, what it shows) of a console block; of a shell's, where nothing is shown, None."""
    if block.kind == "console":
        found = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
        return list(zip(found[1::2], found[2::2], strict=True))
    joined = block.text.replace("\\\n", " ")
    return [(line, None) for line in joined.splitlines() if line.strip()]


def shows(output: str, expected: str) -> bool:
    """Whether *output* is *expected*, where ``…`` stands for anything: in a line, or as lines."""
    lines = (
        r"(?:.*\n)*"
        if line == "…"
        else "[^\n]*".join(re.escape(part) for part in line.split("…")) + r"\n"
        for line in expected.splitlines()
    )
    # A body is printed as it came, which may be without a line's end.
    whole = f"{output}\n" if output and not output.endswith("\n") else output
    return re.fullmatch("".join(lines), whole) is not None


def environment() -> dict[str, str]:
    """What a reader has who installed hsmtoll: it is on the PATH, and nothing of it is set."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HSMTOLL_", "SOFTHSM"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}


class Terminal:
    """
    A shell that reads its commands from us one by one, and keeps variables and directory from one
    to the next. *argv* opens it.
    """

    def __init__(
        self,
        folder: Path,
        argv: Sequence[str] = ("bash",),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            argv, cwd=folder, env=dict(environ or environment()), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate("exit\n", timeout=30)
        self._process.kill()
        self._process.wait()

    def run(self, command: str) -> tuple[int, str]:
        """Its exit code, and what it wrote to stdout and stderr."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        end = f"-- {secrets.token_hex(8)}"
        with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as script:
            script.write(f"{command}\n")
            script.flush()
            Path(script.name).chmod(0o644)
            stdin.write(f". {shlex.quote(script.name)} < /dev/null; printf '\\n{end} %d\\n' $?\n")
            stdin.flush()
            late = threading.Timer(PATIENCE, self._process.kill)
            late.start()
            said: list[str] = []
            for line in stdout:
                if line.startswith(end):
                    late.cancel()
                    # The line that was put before the mark, for output without an end of line.
                    output = "".join(said)
                    return int(line.removeprefix(end)), output.removesuffix("\n")
                said.append(line)
        late.cancel()
        raise AssertionError(f"the shell ended in: {command}\n{''.join(said)}")

    def follow(self, block: Block) -> int:
        """Type each command of *block*, which shows what it says. How many there were."""
        for command, expected in commands(block):
            code, output = self.run(command)
            # What begins with an error's line is an example of one.
            failing = (expected or "").startswith("hsmtoll: ")
            assert failing or code == 0, f"{command}\n{output}"
            assert expected is None or shows(output, expected), (
                f"$ {command}\n{output}\nis not\n{expected}"
            )
        return len(commands(block))
