"""``python -m hsmtoll`` and the command ``hsmtoll``: one call, and the exit code."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its code."""
    from hsmtoll.cli import run  # noqa: PLC0415 - importing the package must not import the CLI

    sys.exit(run())


if __name__ == "__main__":
    main()
