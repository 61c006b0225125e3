"""
A soak of the signing host: two hundred callers, and what a year does to a host, again and again.

    python tests/soak/host.py [SECONDS [EVERY [CALLERS]]]

A host with one device that has two keys. Each caller has a certificate, and asks for a grant every
two seconds; each tenth request is for what it may not have, and some callers ask for tokens.
Meanwhile, one after the other, every EVERY seconds: the device is gone, the other key takes over by
a reload, the custodian stops and resumes, a wrong policy is refused, the device's process crashes,
and the host gets a new TLS certificate. Segments of the audit that are not the two newest are moved
away, as hsmtoll/docs/operations.md says. Prints one JSON object and ends with 0 if every promise
was kept:

- each grant that a caller has, has an intent and a result in the audit, under the caller's name;
- the audit verifies, all of its segments together, and the archived ones alone;
- callers heard nothing but grants, tokens, and the refusals that the events explain;
- every metric moved that had a reason to (the others are named);
- memory is level, but for what daily quotas remember of each grant.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from prometheus_client.parser import text_string_to_metric_families

from hsmtoll import jws
from hsmtoll.host.audit_log import list_records, verify
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.identity import eseal, register_identity
from hsmtoll.testing.softhsm import SoftHsm
from tests.kit.signing_host import ROAD, RunningHost, entry, exchange, make_host
from tests.soak.measure import children, memory, slope

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.signing_host import Identity

CALLERS: Final = 200
EVERY: Final = 30.0
#: Seconds between two requests of one caller.
PAUSE: Final = 2.0
#: Seconds that the device is gone, or signing is stopped; less where events follow quickly.
GONE: Final = 4.0

#: A run that is shorter shows the allocator settling: its slopes are told, not judged.
LONG: Final = 300.0
#: Bytes that a host may keep of a grant: daily quotas remember its time and jti in two windows.
MOST: Final = 1024.0

#: Seconds beyond the end of a run for what has not happened yet.
PATIENCE: Final = 200.0

#: Bytes of a segment of the audit: in a short run as well, some are archived.
SEGMENT: Final = 8 * 1024 * 1024
SHORT_SEGMENT: Final = 16 * 1024

_SERVE: Final = (
    "import sys\n"
    "from hsmtoll.host import audit\n"
    "from hsmtoll.__main__ import main\n"
    "audit._SEGMENT = int(sys.argv.pop(1))\n"
    "sys.exit(main())\n"
)

#: Statuses and words of a host that an event explains.
EXPLAINED: Final = frozenset(
    {
        (403, "policy_denied"), (403, "stopped"), (429, "quota_exceeded"),
        (503, "device_down"), (503, "busy"), (503, "temporarily_unavailable"),
    }
)  # fmt: skip

#: Labels whose values count as metrics of their own.
LABELS: Final = ("outcome", "reason")

#: Metrics that have no reason to move, by the beginning of their names, each with why not.
STILL: Final = {
    "hsmtoll_build_info": "one version runs",
    "process_start_time_seconds": "the host is not restarted",
    "process_max_fds": "a limit",
    "hsmtoll_host_audit_writable": "the disk has room",
    "hsmtoll_host_clock_synchronised": "the kernel's",
    "hsmtoll_host_clock_skew_seconds": "one clock",
    "hsmtoll_host_pin_state": "the PIN is right",
    'hsmtoll_host_connections_refused_total{"reason": "busy"}': "there is room",
    'hsmtoll_host_connections_refused_total{"reason": "crowded"}': "there is room",
}


@dataclass
class Crowd:
    """Two hundred callers, and what they got."""

    host: RunningHost
    ending: threading.Event = field(default_factory=threading.Event)
    granted: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    refused: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: Requests without a reply: their connection was closed, as a reload does with idle ones.
    turned_away: Counter[str] = field(default_factory=Counter)

    def call(self, number: int, identity: Identity) -> None:
        """One caller, on a connection that is kept while the host keeps it."""
        name, turn = caller(number), number
        path = "/v1/token" if number % 20 == 1 else "/v1/grant"
        while not self.ending.is_set():
            try:
                with contextlib.closing(self.host.connect(identity)) as connection:
                    while not self.ending.wait(PAUSE):
                        turn += 1
                        self._ask(connection, path, name, "air" if turn % 10 == 0 else "road")
            except (OSError, http.client.HTTPException) as exc:
                self.turned_away[type(exc).__name__] += 1
                time.sleep(0.2)

    def _ask(
        self, connection: http.client.HTTPConnection, path: str, name: str, scope: str
    ) -> None:
        reply = exchange(connection, "POST", path, json={**ROAD, "scope": scope})
        if reply.status != 200:
            self.refused[reply.status, reply.word] += 1
        elif path == "/v1/token":
            self.tokens += 1
        else:
            claims = jws.read_unverified(reply.body["assertion"])[1]
            self.granted.append((name, claims["jti"]))


def caller(number: int) -> str:
    """The name of a caller in the policy."""
    return f"san:dns:app{number}.example"


class Watch:
    """What `/metrics` shows all the time: which series move, by their names."""

    def __init__(self, host: RunningHost) -> None:
        self._host = host
        self._first: dict[str, float] = {}
        #: As the host counts them: it hides its /proc from its own account.
        self.open_files = 0.0
        self.moved: set[str] = set()
        self.look()

    def until(self, ending: threading.Event, pause: float) -> None:
        """Look until the end, with *pause* seconds between two looks."""
        while not ending.wait(pause):
            self.look()

    def look(self) -> None:
        """Take one sample; callers are added up."""
        now: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(self._host.health("/metrics").body["text"]):
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    kept = {n: v for n, v in sorted(sample.labels.items()) if n in LABELS}
                    now[f"{sample.name}{json.dumps(kept) if kept else ''}"] += sample.value
        self.open_files = now["process_open_fds"]
        known = bool(self._first)
        for name, value in now.items():
            # What was not there at first was zero.
            if self._first.setdefault(name, 0.0 if known else value) != value:
                self.moved.add(name)

    @property
    def still(self) -> list[str]:
        """What never had another value than at first."""
        return sorted(self._first.keys() - self.moved)


class Custodian:
    """What happens to the host, one thing after the other."""

    def __init__(
        self, host: RunningHost, keys: list[str], archive: Path, *, callers: int, every: float
    ) -> None:
        self.host = host
        self.callers = callers
        self.every = every
        self.gone = min(GONE, every / 2)
        self.archive = archive
        self.happened: Counter[str] = Counter()
        self.archived = 0
        self._keys = keys
        self._rounds: list[Callable[[], None]] = [
            self.device_is_gone, self.key_is_rotated, self.stopped_and_resumed,
            self.policy_is_wrong, self.device_crashes, self.certificate_is_new,
        ]  # fmt: skip

    @property
    def is_complete(self) -> bool:
        """Whether everything happened, and a segment was archived."""
        return len(self.happened) == len(self._rounds) and self.archived > 0

    def next(self) -> None:
        """The next event, to its end; and the segments that may go."""
        event = self._rounds[sum(self.happened.values()) % len(self._rounds)]
        event()
        self.happened[event.__name__] += 1
        self.archive_segments()

    def device_is_gone(self) -> None:
        """It comes back by itself."""
        self.host.faults.set("token-removed")
        time.sleep(self.gone)
        self.host.faults.clear("token-removed")

    def device_crashes(self) -> None:
        """Each signature ends the process that asks for it."""
        self.host.faults.set("crash", function="C_SignInit")
        time.sleep(self.gone)
        self.host.faults.clear("crash")

    def key_is_rotated(self) -> None:
        """A policy that names the other key; the old one signs until the new one has."""
        self._keys.reverse()
        self.write_policy()
        self.host.reload()

    def stopped_and_resumed(self) -> None:
        """By the file."""
        self.host.stop_file.touch()
        time.sleep(self.gone)
        self.host.stop_file.unlink()

    def policy_is_wrong(self) -> None:
        """The old one stays in force; then it is right again."""
        self.host.say("[caller")
        self.host.reload()
        time.sleep(self.gone)
        self.write_policy()
        self.host.reload()

    def certificate_is_new(self) -> None:
        """For TLS: both files are replaced, and the host is told."""
        issued = self.host.authority.issue("localhost", server=True)
        for new, name in ((issued.key, "KEY"), (issued.cert, "CERT")):
            new.replace(self.host.environ[f"HSMTOLL_HOST__{name}"])
        self.host.reload()

    def write_policy(self) -> None:
        """The callers, the first with a small quota, and the key whose turn it is."""
        callers = [
            entry(
                caller(number),
                mode=["token" if number % 20 == 1 else "grant"],
                per_minute=2 if number == 0 else 600,
                per_day=1_000_000,
            )
            for number in range(self.callers)
        ]
        key = f'[profile.acme.hsm]\nkey = "{self._keys[0]}"\n'
        self.host.write_policy(key, *callers)

    def archive_segments(self) -> None:
        """All but the two newest are moved away, each with its checkpoints."""
        for segment in sorted(self.host.audit.glob("audit-*.jsonl"))[:-2]:
            number = segment.name.removeprefix("audit-")
            first = number == "000000000001.jsonl"
            for name in ("checkpoints.jsonl" if first else f"checkpoints-{number}", segment.name):
                (self.host.audit / name).replace(self.archive / name)
            self.archived += 1


def knock(host: RunningHost) -> None:
    """Somebody without a certificate: the handshake fails."""
    with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(
        ("127.0.0.1", host.tls_port), timeout=5
    )) as plain:  # fmt: skip
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.recv(1)


# ---------------------------------------------------------------------- the run, and its figures


def soak(seconds: float, every: float, callers: int) -> dict[str, Any]:
    """Run it; the figures."""
    with (
        tempfile.TemporaryDirectory(prefix="hsmtoll-soak-") as name,
        Sandbox() as sandbox,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        device = SoftHsm.create(folder / "softhsm")
        identities = [eseal(device, label=label) for label in ("acme-2026", "acme-2027")]
        for each in identities:
            register_identity(sandbox, each)
        keys = [each.environ()["HSMTOLL_HSM__KEY"] for each in identities]
        faults = stack.enter_context(Faults(device.module, folder / "faults"))
        environ = {**identities[0].environ(), **sandbox.environ(), **faults.environ()}
        host = stack.enter_context(make_host(environ, faults=faults))
        archive = folder / "archive"
        archive.mkdir()
        custodian = Custodian(host, keys, archive, callers=callers, every=every)
        custodian.write_policy()
        segment = SEGMENT if seconds >= LONG else SHORT_SEGMENT
        host.start(
            program=(sys.executable, "-c", _SERVE, str(segment), "-v", "serve"),
            HSMTOLL_HOST__CONNECTIONS=str(callers + 50),
            HSMTOLL_BUDGET__PER_HOUR="100000",
        )
        return _run(host, custodian, seconds)


def _run(host: RunningHost, custodian: Custodian, seconds: float) -> dict[str, Any]:
    every = custodian.every
    crowd, watch = Crowd(host), Watch(host)
    threads = [
        threading.Thread(
            target=crowd.call, args=(n, host.authority.issue(f"app{n}.example")), daemon=True
        )
        for n in range(custodian.callers)
    ]
    threads.append(
        threading.Thread(target=watch.until, args=(crowd.ending, custodian.gone / 8), daemon=True)
    )
    for each in threads:
        each.start()
    assert host.process is not None
    daemon = host.process.pid
    points: dict[str, list[tuple[float, float]]] = {"daemon": [], "worker": [], "files": []}
    began = time.monotonic()
    due, looked = began + every / 2, began
    # A short run on a busy machine lasts until everything has happened.
    while (now := time.monotonic()) < began + seconds or not custodian.is_complete:
        assert host.process.poll() is None, host.log()[-2000:]
        assert now < began + seconds + PATIENCE, custodian.happened
        # After the last event there is time for what it leaves behind.
        if due <= now and (now < began + seconds - every or not custodian.is_complete):
            custodian.next()
            knock(host)
            due += every
        if now >= looked:
            looked = now + 1
            # A host settles first: its connections, its callers, its certificates.
            if now > began + seconds / 4:
                done = float(len(crowd.granted))
                points["daemon"].append((done, memory(daemon)))
                points["files"].append((done, watch.open_files))
                for process in children(daemon):
                    with contextlib.suppress(OSError):
                        points["worker"].append((done, memory(process)))
        time.sleep(0.2)
    crowd.ending.set()
    for each in threads:
        each.join(120)
    code = host.end()
    return {
        "seconds": round(time.monotonic() - began), "every": every, "callers": custodian.callers,
        "exit_code": code,
        **_figures(host, custodian, crowd, watch, points, judged=seconds >= LONG),
    }  # fmt: skip


def not_in_the_audit(granted: list[tuple[str, str]], audit: Path) -> list[str]:
    """The jti of each grant (caller, jti) without an intent of that caller and a result."""
    callers: dict[str, str] = {}
    signed: set[str] = set()
    for record in list_records(audit):
        if record["event"] == "intent":
            callers[record["jti"]] = record["caller"]
        elif record["event"] == "result" and record["outcome"] == "signed":
            signed.add(record["jti"])
    return [jti for name, jti in granted if callers.get(jti) != name or jti not in signed]


def _figures(
    host: RunningHost,
    custodian: Custodian,
    crowd: Crowd,
    watch: Watch,
    points: dict[str, list[tuple[float, float]]],
    *,
    judged: bool,
) -> dict[str, Any]:
    """What was seen, and whether it is what was promised."""
    archived_bad = verify(custodian.archive, host.public_key).bad if custodian.archived else None
    for each in host.audit.glob("*.jsonl"):
        each.replace(custodian.archive / each.name)
    report = verify(custodian.archive, host.public_key)
    callers_of: dict[str, str] = {}
    signed: set[str] = set()
    records: Counter[str] = Counter()
    for record in list_records(custodian.archive):
        records[record["event"]] += 1
        if record["event"] == "intent":
            callers_of[record["jti"]] = record["caller"]
        elif record["event"] == "result" and record["outcome"] == "signed":
            signed.add(record["jti"])
    lost = [jti for name, jti in crowd.granted if callers_of.get(jti) != name or jti not in signed]
    still = [each for each in watch.still if not each.startswith(tuple(STILL))]
    grew = {name: round(slope(seen), 1) for name, seen in points.items()}
    unexplained = {
        f"{status} {word}": count
        for (status, word), count in crowd.refused.items()
        if (status, word) not in EXPLAINED
    }
    kept = (
        bool(crowd.granted) and bool(crowd.tokens) and bool(custodian.archived)
        and not lost and not archived_bad and report.bad is None and not unexplained
        and len({jti for _, jti in crowd.granted}) == len(crowd.granted)
        and (not judged or (not still and grew["daemon"] < MOST and grew["worker"] < MOST / 4))
    )  # fmt: skip
    return {
        "grants": len(crowd.granted),
        "tokens": crowd.tokens,
        "refused": {f"{s} {word}": count for (s, word), count in crowd.refused.most_common()},
        "unexplained": unexplained,
        "turned_away": dict(crowd.turned_away),
        "events": dict(custodian.happened),
        "records": dict(records),
        "segments_archived": custodian.archived,
        "grants_not_in_the_audit": lost,
        "audit_of_the_archive": str(archived_bad or "verifies"),
        "audit": str(report.bad or "verifies"),
        "metrics_that_moved": len(watch.moved),
        "metrics_that_should_have": still,
        "memory": {
            name: {"first": seen[0][1], "last": seen[-1][1], "most": max(y for _, y in seen)}
            for name, seen in points.items() if seen
        },
        "growth_of_a_grant": grew,
        "growth_judged": judged,
        "kept": kept,
    }  # fmt: skip


def main() -> int:
    """The command."""
    words = sys.argv[1:]
    seconds = float(words[0]) if words else 3600.0
    every = float(words[1]) if len(words) > 1 else EVERY
    figures = soak(seconds, every, int(words[2]) if len(words) > 2 else CALLERS)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0 if figures["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
