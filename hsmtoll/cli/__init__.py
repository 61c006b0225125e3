"""
argv in; result on stdout, everything else on stderr, an exit code out.

`commands` has the list of commands; they are in modules by noun, imported when they are named. What
they share: `framework` (help, global options, completion), `options`, `input`, `streams` and
`signals`. Prompts go to the terminal. Nothing is decided here that a program would need as well.
"""

from __future__ import annotations

from hsmtoll.cli.commands import main, run
from hsmtoll.cli.signals import leave, obey_signals
from hsmtoll.cli.streams import own_streams

__all__ = ["leave", "main", "obey_signals", "own_streams", "run"]
