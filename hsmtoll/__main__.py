"""``python -m hsmtoll`` and the command ``hsmtoll``: one call, and the exit code."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with its code."""
    from hsmtoll.cli import leave, obey_sigterm, run  # noqa: PLC0415 - importing is not running

    obey_sigterm()
    leave(run())


if __name__ == "__main__":
    main()
