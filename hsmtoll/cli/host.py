"""The signing host: `hsmtoll serve`, `health`, `policy test`, `audit …`, `stop` and `resume`."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from hsmtoll.cli.framework import command, group
from hsmtoll.cli.log import at_least_info, say
from hsmtoll.cli.options import (
    EXISTING_FILE,
    NEEDS_POLICY,
    GlobalOptions,
    as_json_option,
    complete_apis,
)
from hsmtoll.cli.streams import print_json, print_result
from hsmtoll.errors import (
    AuditBroken,
    ConfigurationError,
    PolicyDenied,
    UsageError,
    import_optional,
    install_extra,
    sanitized,
)
from hsmtoll.host import emergency_stop
from hsmtoll.host.audit_log import list_records, verify
from hsmtoll.host.emergency_stop import stop_file, stopped_by
from hsmtoll.host.policy import explain
from hsmtoll.host.probe import probe
from hsmtoll.host.required import needed

__all__ = ["audit", "health", "policy", "resume", "serve", "stop"]


@command(
    needs="a device, the settings HSMTOLL_HOST__…, the extra host",
    examples=("hsmtoll serve",),
)
@click.pass_obj
def serve(options: GlobalOptions) -> int:
    """
    Run the signing host for the callers in its policy.

    SIGTERM ends it. SIGHUP reads policy and certificates again.
    """
    missing_server = UsageError("serve: its server is not installed", hint=install_extra("host"))
    server = import_optional("hsmtoll.host.server", missing_server)
    settings = options.settings()
    # Refusals, reloads and readiness.
    at_least_info("hsmtoll.host")
    code: int = server.serve(
        settings,
        config=options.config,
        profile=options.profile,
        ready=partial(say, "signing host: ready", event="ready"),
    )
    return code


@command(
    needs="HSMTOLL_HOST__METRICS, or a local proxy; no device",
    examples=("hsmtoll health", "hsmtoll health --ready", "hsmtoll health --proxy"),
)
@click.option(
    "--ready", is_flag=True, help="Whether it can sign or get tokens now; default: whether it runs."
)
@click.option("--proxy", is_flag=True, help="Ask `hsmtoll proxy` instead of the signing host.")
@click.pass_obj
def health(options: GlobalOptions, *, ready: bool, proxy: bool) -> None:
    """
    Ask a signing host or local proxy how it is, for a probe.

    Exits with 0 if it is live (or ready), with 1 and the reasons if not.
    """
    from hsmtoll.settings import not_set, variable  # noqa: PLC0415 - 0.2 s that help does not need

    settings = options.settings()
    group, member = ("local_proxy", "listen") if proxy else ("host", "metrics")
    where, name = getattr(getattr(settings, group), member), variable(group, member)
    if where is None:
        raise not_set({name: "the address of the host's metrics listener, such as 127.0.0.1:9464"})
    probe(where, name, "ready" if ready else "live")
    click.echo("ready" if ready else "live")


@group(
    needs=NEEDS_POLICY,
    examples=("hsmtoll policy test --profile acme uid:1001 road",),
)
def policy() -> None:
    """Explain the signing host's policy."""


@policy.command(
    "test",
    needs=NEEDS_POLICY,
    examples=("hsmtoll policy test --profile acme uid:1001 road",),
)
@click.option("--profile", required=True, metavar="P",
              help="Profile of the policy that the caller asks for.")  # fmt: skip
@click.option("--mode", type=click.Choice(["grant", "token"]), help="Default: both.")
@as_json_option
@click.argument("caller")
@click.argument("scope", metavar="API|SCOPE", shell_complete=complete_apis)
@click.pass_obj
def policy_test(
    options: GlobalOptions,
    *,
    profile: str,
    mode: str | None,
    as_json: bool,
    caller: str,
    scope: str,
) -> int:
    """
    Show what a caller may have, with the line of the policy that decides.

    CALLER is uid:N, gid:N, san:dns:NAME or san:uri:URI. Exits with 90 if nothing is allowed.
    """
    path = needed(options.settings().host.policy, "policy")
    verdicts = explain(path, profile, caller, scope)
    chosen = {each: verdicts[each] for each in verdicts if mode in (None, each)}
    print_result(
        {
            each: {"allowed": allowed, "reason": reason}
            for each, (allowed, reason) in chosen.items()
        },
        *(f"{each}: {reason}" for each, (_, reason) in chosen.items()),
        as_json=as_json,
    )
    return 0 if any(allowed for allowed, _ in chosen.values()) else PolicyDenied.exit_code


@group(
    needs="the directory of an audit; no device and no running host",
    examples=("hsmtoll audit list --since 2026-11-01",),
)
def audit() -> None:
    """Verify and list the log of what was signed for whom."""


class _DateTime(click.DateTime):
    """A day or a time, as ISO 8601 writes them."""

    def __init__(self) -> None:
        super().__init__(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"])

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(
                f"{sanitized(value)}: 2026-11-01 or 2026-11-01T08:00:00 is expected, in UTC",
                param,
                ctx,
            )


_date_time = _DateTime()


@audit.command(
    "verify",
    needs="the public half of the audit's key; PATH or HSMTOLL_HOST__AUDIT_DIR",
    examples=(
        "hsmtoll audit verify --public-key audit.pub /var/lib/hsmtoll/audit",
        "hsmtoll audit verify --public-key audit.pub --since 2026-11-01 \\",
        "  /var/lib/hsmtoll/audit",
    ),
)
@as_json_option
@click.option("--public-key", required=True, type=EXISTING_FILE, help="Of the audit key (PEM).")
@click.option("--head", metavar="SEQ:HASH", help="From a reply or the system log.")
@click.option(
    "--since", type=_date_time, metavar="WHEN", help="From the segment on in which WHEN (UTC) lies."
)
@click.argument("path", nargs=-1, type=click.Path(path_type=Path, exists=True), metavar="[PATH…]")
@click.pass_obj
def audit_verify(
    options: GlobalOptions,
    *,
    as_json: bool,
    public_key: Path,
    head: str | None,
    since: datetime | None,
    path: tuple[Path, ...],
) -> None:
    """
    Find the first record that is not as it was written.

    Exits with 91 if a record was changed, removed, reordered or cut off, or is not covered by a
    checkpoint where one is due. PATH is the audit's directory, or some of its segments
    (audit-N.jsonl) that follow each other, with their checkpoints beside them; without it, it is
    HSMTOLL_HOST__AUDIT_DIR. Intents without a result are listed: the host ended between the two,
    or is signing now.
    """
    path = path or (_audit_place(options, None),)
    report = verify(path, public_key, head, since=_utc(since))
    if report.bad is not None:
        certain = f"up to record {report.sealed} all is" if report.sealed else "no record is"
        raise AuditBroken(
            f"audit {sanitized(path[0])}: {report.bad}",
            hint=f"keep it as evidence; {certain} certain to be as it was written",
            code="audit-broken",
        )
    if head is not None and int(head.partition(":")[0]) < report.after:
        raise UsageError("head: it is of a record in an older segment, which was not read")
    found = {
        "first": report.after + 1,
        "records": report.seq,
        "head": f"{report.seq}:{report.head}",
        "anchored": report.sealed,
        "unverified": report.unverified,
        "open_intents": list(report.open_intents.values()),
    }
    cut = (
        () if head else ("a log that was cut off at an earlier checkpoint shows only with --head",)
    )
    print_result(found, *report.described(), *cut, as_json=as_json)


def _audit_place(options: GlobalOptions, path: Path | None) -> Path:
    return path or needed(options.settings().host.audit_dir, "audit_dir")


@audit.command(
    "list",
    needs="PATH or HSMTOLL_HOST__AUDIT_DIR, usually by --config FILE",
    examples=(
        "hsmtoll audit list --since 2026-11-01",
        "hsmtoll audit list /var/lib/hsmtoll/audit --caller uid:1001 --json",
    ),
)
@click.option("--caller", metavar="NAME", help="uid:N, gid:N, san:dns:NAME or san:uri:URI.")
@click.option("--profile", metavar="P")
@click.option(
    "--since", type=_date_time, metavar="WHEN", help="2026-11-01 or 2026-11-01T08:00:00, UTC."
)
@click.option("--until", type=_date_time, metavar="WHEN", help="Records before WHEN.")
@click.option("--json", "as_json", is_flag=True, help="The records whole, for a program.")
@click.argument("path", type=click.Path(path_type=Path, exists=True), required=False)
@click.pass_obj
def audit_list(
    options: GlobalOptions,
    *,
    caller: str | None,
    profile: str | None,
    since: datetime | None,
    until: datetime | None,
    as_json: bool,
    path: Path | None,
) -> None:
    """
    List what was signed, released and refused.

    PATH is the directory of the audit, HSMTOLL_HOST__AUDIT_DIR where none is given.
    """
    place = _audit_place(options, path)
    span = {"since": _utc(since), "until": _utc(until)}
    records = list_records(place, caller=caller, profile=profile, **span)
    if as_json:
        print_json({"records": list(records)})
        return
    shown = ("seq", "time", "event", "caller", "profile", "scope", "jti", "outcome")
    for at, each in enumerate(records):
        if at == 0:
            click.echo("  ".join(shown))
        click.echo("  ".join(sanitized(each[name] or "-") for name in shown))


def _utc(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


@command(needs=NEEDS_POLICY, examples=("hsmtoll stop",))
@click.pass_obj
def stop(options: GlobalOptions) -> None:
    """
    Stop the signing host before its next signature, until resume.

    Creates the stop file, by default beside the policy. It also stops a host that starts later.
    """
    path = stop_file(options.settings())
    click.echo(f"stopped: {path}" if emergency_stop.stop(path) else f"stopped already: {path}")


@command(needs=NEEDS_POLICY, examples=("hsmtoll resume",))
@click.pass_obj
def resume(options: GlobalOptions) -> None:
    """End a stop: the signing host signs again."""
    path = stop_file(options.settings())
    was = emergency_stop.resume(path)
    why = stopped_by(path)
    if why is not None:
        raise ConfigurationError(f"resume: still stopped: {why}", hint=f"look at {path.parent}")
    click.echo(f"resumed: {path}" if was else f"was not stopped: {path}")
