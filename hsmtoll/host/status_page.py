"""
The status of a signing host as one HTML document, for its custodian: no script, nothing from
elsewhere, no way to change anything.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from string import Template
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.host.measures import quotas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.host.audit import Audit
    from hsmtoll.host.health import HostHealth
    from hsmtoll.host.profiles import Profile, Profiles

__all__ = ["HEADERS", "status_page"]

_DAY: Final = 86_400.0

#: Days before the end of a certificate from which it is shown as a warning, and as an error.
_SOON: Final = 60
_VERY_SOON: Final = 14

#: States of a PIN (`hsmtoll.hsm.device.Device.pin_state`) in words.
_PIN: Final = {
    None: ("", "not used yet"),
    "ok": ("good", "accepted"),
    "count-low": ("bad", "a wrong PIN was used"),
    "to-be-changed": ("bad", "has to be changed"),
    "final-try": ("bad", "one try is left"),
    "locked": ("bad", "locked"),
    "unset": ("bad", "not set"),
    "refused": ("bad", "refused"),
    "unresolved": ("bad", "unknown: the last try was not answered"),
    "not-tried": ("bad", "not tried: its record cannot be written"),
}

_STYLE: Final = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2430; --dim: #5a6575;
  --line: #dfe3e9; --good: #17733a; --warn: #8a5a00; --bad: #b3261e; --bar: #2f6fd0; }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1b212a; --text: #e6eaf0;
  --dim: #9aa6b6; --line: #303947; --good: #5fce8a; --warn: #f0b429; --bad: #ff8a80;
  --bar: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: baseline; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
.state { font-weight: 600; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.dim, footer, dt, th { color: var(--dim); font-weight: normal; }
.cards { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.card, table, .why { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.card { padding: .8rem 1rem; }
.why { margin: .75rem 0 0; padding: .6rem 1rem .6rem 2rem; }
dl { margin: 0; display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .2rem .8rem; }
dd { margin: 0; }
table { width: 100%; border-collapse: separate; border-spacing: 0; }
th, td { text-align: left; padding: .4rem .5rem; vertical-align: top; }
th, td[data-label^=Time] { white-space: nowrap; }
th:first-child, td:first-child { padding-left: 1rem; }
tbody td { border-top: 1px solid var(--line); }
meter { width: 100%; min-width: 6rem; height: .8rem; vertical-align: middle; }
meter::-webkit-meter-bar { background: var(--line); border: 0; border-radius: .4rem; }
meter::-webkit-meter-optimum-value { background: var(--bar); border-radius: .4rem; }
meter::-webkit-meter-suboptimum-value { background: var(--warn); border-radius: .4rem; }
meter::-webkit-meter-even-less-good-value { background: var(--bad); border-radius: .4rem; }
footer { margin-top: 1.5rem; font-size: .85rem; }
@media (max-width: 62rem) { thead { display: none; } tr, td { display: block; }
  td, td:first-child { padding: .15rem 1rem; } tbody td { border: 0; }
  tbody tr { padding: .4rem 0; }
  tbody tr + tr { border-top: 1px solid var(--line); }
  td::before { content: attr(data-label) ": "; color: var(--dim); } }
"""

_STYLE_SHA256: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

#: Only the style above, by its hash: whatever else gets into the page does nothing.
HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_SHA256}'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_PAGE: Final = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="30">
<title>$state: hsmtoll signing host</title>
<style>$style</style>
</head>
<body>
<header><h1>Signing host</h1><span class="state $kind">$state</span></header>
$why
<main>
<h2>Profiles</h2>
<div class="cards">$profiles</div>
<h2>Host</h2>
<div class="cards">$host</div>
$tables
</main>
<footer>hsmtoll $version, as of $now. The page loads itself anew every 30 seconds.</footer>
</body>
</html>
""")


def status_page(health: HostHealth, profiles: Profiles, audit: Audit, *, now: float) -> str:
    """The document; *now* in seconds since the epoch."""
    reasons = health.not_ready()
    state = ("bad", "Stopped") if health.stopped else ("bad", "Not ready")
    kind, word = state if reasons else ("good", "Ready")
    listed = "".join(f"<li>{escape(each)}</li>" for each in reasons)
    recent = audit.recent()
    return _PAGE.substitute(
        style=_STYLE,
        state=word,
        kind=kind,
        why=f'<ul class="why bad">{listed}</ul>' if reasons else "",
        profiles="".join(_profile(each, now) for each in profiles) or _nothing("no profile"),
        host=_audit(audit, now) + _policy(health, profiles),
        tables=_quotas(profiles, audit)
        + _records("Last grants and tokens", recent.granted, "What", _grant)
        + _records("Last refusals", recent.refused, "Why", _refusal),
        version=escape(version("hsmtoll")),
        now=_time(now),
    )


def _profile(profile: Profile, now: float) -> str:
    settings, failure = profile.app.settings, profile.health.failure
    left, waiting = profile.cache.left(), profile.waiting
    rows = [
        ("Device", *(("good", "signs") if failure is None else ("bad", failure))),
        ("PIN", *_PIN.get(profile.pin_state, ("bad", str(profile.pin_state)))),
        ("Certificate", *_certificate(profile.not_after, now)),
        ("Token", "", "none is held" if not left else f"ends in {_duration(left)}"),
        ("Waiting", "", f"{waiting or 'no'} request{'' if waiting == 1 else 's'}"),
    ]
    about = f"{settings.environment}, {settings.identity}"
    return _card(f'{escape(profile.name)} <span class="dim">{escape(about)}</span>', rows)


def _certificate(not_after: datetime | None, now: float) -> tuple[str, str]:
    if not_after is None:
        return "", "none in use"
    days = (not_after.timestamp() - now) // _DAY
    kind = "bad" if days < _VERY_SOON else "warn" if days < _SOON else "good"
    when = f"{not_after.astimezone(UTC):%Y-%m-%d}"
    return kind, f"ended {when}" if days < 0 else f"ends {when}, {days:.0f} days"


def _audit(audit: Audit, now: float) -> str:
    unsealed = audit.unsealed
    sealed = f"{_duration(max(0.0, now - audit.sealed_at))} ago"
    broken = audit.broken
    return _card(
        "Audit",
        [
            ("Log", *(("good", "can be written") if broken is None else ("bad", broken))),
            ("Records", "", f"{audit.seq}"),
            ("Sealed", "", f"{sealed}, {unsealed} records since" if unsealed else f"{sealed}, all"),
            ("Free space", "", f"{audit.free_bytes() / 1e9:.1f} GB"),
        ],
    )


def _policy(health: HostHealth, profiles: Profiles) -> str:
    good = profiles.reloaded
    clock = health.synchronised()
    return _card(
        "Policy and clock",
        [
            (
                "Last reload",
                "good" if good else "bad",
                "in force" if good else "failed: the old policy is in force",
            ),
            ("Loaded", "", _time(profiles.loaded_at)),
            ("SHA-256", "", f"{profiles.policy.sha256[:16]}…"),
            ("Clock", "good" if clock else "bad", "synchronised" if clock else "not synchronised"),
        ],
    )


def _quotas(profiles: Profiles, audit: Audit) -> str:
    rows = [
        [
            escape(each.caller),
            escape(each.profile),
            f"{each.used} of {each.limit} a {each.period}",
            f'<meter max="1" low=".7" high=".9" optimum="0" value="{each.share:.3f}"></meter>',
        ]
        for each in quotas(profiles.policy, audit)
    ]
    return _table("Quotas", ["Caller", "Profile", "Used", "Share"], rows)


def _records(
    heading: str,
    records: Iterable[dict[str, Any]],
    last: str,
    text: Callable[[dict[str, Any]], str],
) -> str:
    rows = [
        [
            escape(str(each["time"])[:19].replace("T", " ")),
            *(escape(str(each[name] or "")) for name in ("caller", "profile", "scope")),
            escape(text(each)),
        ]
        for each in reversed(list(records))
    ]
    return _table(heading, ["Time (UTC)", "Caller", "Profile", "Scope", last], rows)


def _grant(record: dict[str, Any]) -> str:
    if record["event"] == "release":
        return "token"
    return "grant" if record["options"]["mode"] == "grant" else "signature for a token"


def _refusal(record: dict[str, Any]) -> str:
    return str(record["outcome"])


def _card(title: str, rows: list[tuple[str, str, str]]) -> str:
    listed = "".join(
        f'<dt>{name}</dt><dd class="{kind}">{escape(value)}</dd>' for name, kind, value in rows
    )
    return f'<section class="card"><h3>{title}</h3><dl>{listed}</dl></section>'


def _table(heading: str, names: list[str], rows: list[list[str]]) -> str:
    """*rows* are HTML."""
    if not rows:
        return f"<h2>{heading}</h2>{_nothing('none')}"
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{name}">{cell}</td>' for name, cell in zip(names, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<h2>{heading}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _nothing(text: str) -> str:
    return f'<p class="dim">{text}</p>'


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _duration(seconds: float) -> str:
    for unit, size in (("days", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
