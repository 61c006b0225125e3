"""The README and its pages as a reader meets them: sections, blocks, a terminal to type in."""

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

TOP: Final = Path(__file__).parents[2]
README: Final = TOP / "README.md"
DOCS: Final = TOP / "hsmtoll" / "docs"

#: Seconds that one command may take; more, and its terminal is closed.
PATIENCE: Final = 300.0


_FENCED: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its *kind* (the word after the fence) and its text."""

    kind: str
    text: str


def pages() -> dict[str, str]:
    """The text of the README and of every page of the documentation, by name without ``.md``."""
    return {path.stem: path.read_text("utf-8") for path in (README, *sorted(DOCS.glob("*.md")))}


def manual() -> str:
    """All pages but the change log, which may name what no longer exists."""
    return "\n".join(text for name, text in pages().items() if name != "changelog")


def headings(text: str) -> list[tuple[int, int, str]]:
    """Position, level and title of each heading. A comment in a fenced block is none."""
    prose = _FENCED.sub(lambda fenced: " " * len(fenced[0]), text)
    found = re.finditer(r"^(#+) (.*)$", prose, re.MULTILINE)
    return [(each.start(), len(each[1]), each[2]) for each in found]


def section(title: str) -> str:
    """
    From the heading *title* to the next one of its level or a higher one, on the one page that has
    that heading.
    """
    found = []
    for text in pages().values():
        known = headings(text)
        for number, (start, level, name) in enumerate(known):
            if name == title:
                ends = (at for at, other, _ in known[number + 1 :] if other <= level)
                found.append(text[start : next(ends, len(text))])
    assert len(found) == 1, f"{len(found)} sections are called {title}"
    return found[0]


def blocks(text: str, kind: str | None = None) -> list[Block]:
    """The fenced blocks of *text* in its order, or those of one kind."""
    found = [Block(fenced[1], fenced[2]) for fenced in _FENCED.finditer(text)]
    return [each for each in found if kind in (None, each.kind)]


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
            lines: list[str] = []
            for line in stdout:
                if line.startswith(end):
                    late.cancel()
                    # The line that was put before the mark, for output without an end of line.
                    output = "".join(lines)
                    return int(line.removeprefix(end)), output.removesuffix("\n")
                lines.append(line)
        late.cancel()
        raise AssertionError(f"the shell ended in: {command}\n{''.join(lines)}")

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
