"""
The page of recipes as a reader follows it: in a directory of its own and a shell with a sandbox,
from the certificates to the programs, with a signing host that the page starts.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.kit.own_device import free_port
from tests.kit.readers import Terminal, blocks, environment, pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE: Final = pages()["recipes"]

#: The shell that the page opens.
SHELL: Final = ("hsmtoll", "sandbox", "--", "bash")

#: Where the page's host listens; a test's listens at a free port.
PORT: Final = ":8443"

_FILE: Final = re.compile(r"(?://|#) (\w+\.\w+): ")

#: The programs, by the names of their files.
PROGRAMS: Final = {
    named[1]: block.text for block in blocks(PAGE) if (named := _FILE.match(block.text))
}

#: What is typed, in its order: blocks of a shell that are no programs.
TYPED: Final = [block.text for block in blocks(PAGE, "sh") if not _FILE.match(block.text)]


class Run(NamedTuple):
    """A command of the page that prints 200, and the tool that it needs."""

    command: str
    tool: str

    @property
    def over_tls(self) -> bool:
        return "SIGNER_SOCKET" not in self.command


def _run(line: str) -> Run:
    command = line.rpartition("#")[0].rstrip()
    return Run(command, next(word for word in command.split() if "=" not in word))


#: What shows 200.
RUNS: Final = [_run(line) for text in TYPED for line in text.splitlines() if line.endswith("# 200")]


@dataclass(frozen=True)
class Reader:
    """Who has followed the page to its programs, and has its files in *folder*."""

    terminal: Terminal
    folder: Path

    @classmethod
    @contextlib.contextmanager
    def at_work(cls, folder: Path) -> Iterator[Reader]:
        """Everything of the page but its runs is done; the host is ended with the block."""
        address = f":{free_port()}"
        *preparing, ending = TYPED
        for name, text in PROGRAMS.items():
            (folder / name).write_text(text, "utf-8")
        # For Node 18, as the page says.
        environ = environment() | {"NODE_OPTIONS": "--dns-result-order=ipv4first"}
        with Terminal(folder, SHELL, environ) as terminal:
            reader = cls(terminal, folder)
            try:
                for text in preparing:
                    reader.type(_without_runs(text).replace(PORT, address))
                yield reader
            finally:
                terminal.run(f"{ending}\nwait")

    def type(self, text: str) -> str:
        """Type commands, which succeed; what they print."""
        code, output = self.terminal.run(text)
        assert code == 0, f"{text}\n{output}"
        return output

    def log(self) -> str:
        """What the host said so far."""
        return (self.folder / "serve.log").read_text()

    def copy(self, name: str) -> Path:
        """A directory *name* with certificates and stores of its own, of another CA."""
        made = self.folder / name
        if not made.exists():
            made.mkdir()
            texts = [text for text in TYPED if text.startswith("openssl req ")]
            texts += [text for text in TYPED if "openssl pkcs12" in text]
            made_by = [line for text in texts for line in _without_keytool(text).splitlines()]
            # The variables, and with them the password, stay those of the page.
            kept = [line for line in made_by if not line.startswith("export ")]
            self.type("\n".join(["(", "set -e", f"cd {made}", *kept, ")"]))
        return made


def _without_runs(text: str) -> str:
    kept = [line for line in text.splitlines() if not line.endswith("# 200")]
    return _without_keytool("\n".join(kept) or "true")


def _without_keytool(text: str) -> str:
    """Where there is no Java, its stores cannot be made, and are not needed."""
    if shutil.which("keytool"):
        return text
    kept = [line for line in text.splitlines() if not line.startswith("keytool ")]
    return "\n".join(kept) or "true"
