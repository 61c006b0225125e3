"""`hsmtoll sandbox`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hsmtoll.cli.framework import command
from hsmtoll.cli.options import EXISTING_FILE, PATH
from hsmtoll.directories import keep_temporary_files_private
from hsmtoll.errors import UsageError, import_optional, install_extra

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["sandbox"]


@command(
    # What follows CMD is CMD's, options included.
    context_settings={"allow_interspersed_args": False},
    needs="the extra sandbox; SoftHSM for CMD; no device, network, settings",
    examples=(
        "hsmtoll sandbox -- hsmtoll test-auth road",
        "hsmtoll sandbox --port 8700 --env-file sandbox.env",
    ),
)
@click.option(
    "--trust", multiple=True, type=EXISTING_FILE, help="PEM with CA certificates to trust."
)
@click.option(
    "--client", "client_file", type=EXISTING_FILE, help="Norwegian clients (TOML or JSON)."
)
@click.option("--env-file", type=PATH, help="Where to write the variables to set.")
@click.option("--port", type=click.IntRange(0, 65533), default=0, metavar="N",
              help="Maskinporten on N, Customs on N+1, admin on N+2.")  # fmt: skip
@click.option("--rules", type=click.Choice(["strict-docs", "as-observed"]), default="strict-docs",
              help="As strict as documented, or as observed.")  # fmt: skip
@click.option("--identity", type=click.Choice(["eseal", "norwegian", "norwegian-key"]),
              default="eseal", help="The identity made for CMD.")  # fmt: skip
@click.option("--admin", is_flag=True, help="CMD gets the admin endpoint: faults, requests.")
@click.argument("command", nargs=-1, metavar="[-- CMD…]", type=click.UNPROCESSED)
def sandbox(
    *,
    trust: tuple[Path, ...],
    client_file: Path | None,
    env_file: Path | None,
    port: int,
    rules: Any,
    identity: str,
    admin: bool,
    command: tuple[str, ...],
) -> int:
    """
    Run a local Maskinporten and Customs, or a command against them.

    Without CMD it runs until interrupted and prints the variables to set. With CMD it makes a
    temporary SoftHSM device and an identity, runs CMD with all variables set, and exits with the
    code of CMD, 128+N if signal N ended it.
    """
    missing = UsageError("sandbox: its server is not installed", hint=install_extra("sandbox"))
    serve = import_optional("hsmtoll.sandbox.serve", missing)
    keep_temporary_files_private()
    if command:
        identities = import_optional("hsmtoll.testing.identity", missing)
        code: int = identities.run_as(
            identity,
            command,
            trust=trust,
            client_file=client_file,
            rules=rules,
            port=port,
            env_file=env_file,
            admin=admin,
        )
    else:
        code = serve.run(
            port=port,
            trust_files=trust,
            client_file=client_file,
            env_file=env_file,
            profile=rules,
        )
    return code
