"""``python -m hsmtoll`` and the command ``hsmtoll``: one call, and the exit code."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line and leave with its code."""
    _fill_gaps()
    from hsmtoll.cli import hard_exit, install_signal_handlers, install_streams, run  # noqa: PLC0415 - importing is not running

    install_streams()
    install_signal_handlers()
    hard_exit(run())


def _fill_gaps() -> None:
    """
    Take the numbers of stdin, stdout and stderr if they were closed.

    The next file to be opened would have such a number otherwise, and errors would be written
    into it. stdin and stdout are opened the wrong way round, so that using them stays an error.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is taken: this one.
            os.set_inheritable(os.open(os.devnull, mode), True)


if __name__ == "__main__":
    main()
