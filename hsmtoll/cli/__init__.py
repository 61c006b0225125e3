"""
The command line: result on stdout, everything else on stderr, prompts on the terminal.

`commands` lists the commands; each is in the module of its subject, imported on demand. Shared
modules: `framework` (help, global options, completion), `options`, `input`, `streams` and
`signals`. Logic that a program would need as well is not here.
"""

from __future__ import annotations

from hsmtoll.cli.commands import main, run
from hsmtoll.cli.signals import hard_exit, install_signal_handlers
from hsmtoll.cli.streams import install_streams

__all__ = ["hard_exit", "install_signal_handlers", "install_streams", "main", "run"]
