"""The command `hsmtoll proxy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hsmtoll import required
from hsmtoll.cli.framework import command
from hsmtoll.cli.log import at_least_info, say
from hsmtoll.errors import UsageError, import_optional, install_extra

if TYPE_CHECKING:
    from hsmtoll.cli.options import GlobalOptions

__all__ = ["proxy"]


@command(
    needs="network, HSMTOLL_ENVIRONMENT; device or signing host; the extra host",
    examples=(
        "hsmtoll proxy",
        "hsmtoll proxy --listen unix:/run/hsmtoll/proxy.sock",
    ),
)
@click.option(
    "--listen", metavar="unix:PATH|127.0.0.1:PORT",
    help="Instead of HSMTOLL_LOCAL_PROXY__LISTEN.",
)  # fmt: skip
@click.pass_obj
def proxy(options: GlobalOptions, *, listen: str | None) -> int:
    """
    Add Customs tokens to the requests of local programs.

    Forwards requests for the paths of `hsmtoll apis` to Customs, with the token of the path's
    scope. SIGTERM ends it. `hsmtoll help local-proxy` has the rules.
    """
    missing_server = UsageError("proxy: its server is not installed", hint=install_extra("host"))
    server = import_optional("hsmtoll.proxy.server", missing_server)
    app = options.app(one_shot=False)
    if (missing := required.missing(app.settings)) is not None:
        raise missing
    settings = app.settings.local_proxy
    if listen is not None:
        settings = settings.model_copy(update={"listen": listen})
    # One line a request.
    at_least_info("hsmtoll.proxy")
    code: int = server.serve(
        app.aclient(),
        settings,
        grace=app.settings.deadline,
        ready=lambda where: say(f"proxy: listening on {where}", event="ready"),
    )
    return code
