"""What grows with years of records, and what hostile bytes cost at most."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.host.audit import Audit
from hsmtoll.host.audit_log import segments_of, verify
from tests.benchmarks.stage import Row, seconds_of, turns
from tests.kit.hostile import cases

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.benchmarks.stage import Stage

_COUNTS: Final = (10_000, 100_000, 1_000_000)
_MILLION: Final = 1_000_000
_A_DAY: Final = 10_000
#: Records of one burst, after which a checkpoint is made.
_BURST: Final = 100

#: Milliseconds of CPU that foreign bytes may cost.
_ALLOWED: Final = 200.0


class _Host:
    """Writes an audit log as a signing host does, at a clock of its own and without waiting."""

    def __init__(self, place: Path) -> None:
        place.mkdir(mode=0o700)
        self.log = place / "log"
        self.key = Ed25519PrivateKey.generate()
        self._noted = place / "noted"
        self._file = place / "audit.key"
        self._file.touch(0o600)
        encoded = s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
        self._file.write_bytes(self.key.private_bytes(*encoded))
        self._now = 1.79e9
        self.records = 0

    def start(self) -> Audit:
        """What a service does when it starts."""
        return Audit(
            self.log, self._file, now=lambda: self._now, noted=self._noted, fsync=lambda _: None
        )

    def grow(self, upto: int) -> None:
        """Two records of each grant, in bursts, and as many a day."""
        audit, digest = self.start(), hashlib.sha256(b"").hexdigest()
        while self.records < upto:
            self._now += 86_400 * _BURST / _A_DAY
            for number in range(_BURST // 2):
                known: dict[str, Any] = {
                    "caller": f"uid:{5000 + number % 5}", "profile": "acme",
                    "scope": "toll:movement/road", "jti": f"{self.records + number:032x}",
                    "options": {"mode": "grant", "consumer_org": None, "resource": []},
                    "policy_sha256": digest, "cert_sha256": digest,
                }  # fmt: skip
                audit.append("intent", **known)
                at = int(self._now)
                audit.append(
                    "result", **known, outcome="signed", iat=at, exp=at + 120,
                    assertion_sha256=digest,
                )  # fmt: skip
            audit.seal()
            self.records += _BURST
        audit.close()


def audit_large(stage: Stage) -> list[Row]:
    """As audit, for a log of years."""
    return audit(stage, (int(os.environ.get("TOLL_BENCH_RECORDS", "5_000_000")),))


def audit(stage: Stage, counts: Sequence[int] = _COUNTS) -> list[Row]:
    """Starts and verifications of one log as it grows: 10,000 records a day, 100 a checkpoint."""
    place = stage.folder / "audited"
    host, rows = _Host(place), []
    small = _Host(stage.folder / "audited-little")
    small.grow(_COUNTS[0])
    for count in counts:
        host.grow(count)

        def started(one: _Host = host) -> float:
            began = time.perf_counter()
            one.start().close()
            return time.perf_counter() - began

        def verified() -> float:
            def all_of_it() -> None:
                report = verify(host.log, host.key.public_key())
                assert (report.bad, report.sealed) == (None, host.records)

            return seconds_of(all_of_it) / host.records * _MILLION

        def hashed() -> float:
            def lines() -> None:
                for segment in segments_of(host.log):
                    with segment.open("rb") as file:
                        for line in file:
                            hashlib.sha256(line).hexdigest()

            return seconds_of(lines) / host.records * _MILLION

        named = f"{count:,} audit records"
        rows.append(
            Row(f"start after {named}", f"after {_COUNTS[0]:,}", "s",
                *turns(started, lambda: started(small)), "flat, < 2 s")
        )  # fmt: skip
        rows.append(
            Row(f"audit verify of {named}, a million", "SHA-256 of the same lines", "s",
                *turns(verified, hashed, rounds=1), "< 60 s")
        )  # fmt: skip
    shutil.rmtree(place)
    shutil.rmtree(stage.folder / "audited-little")
    return rows


def costs(_stage: Stage) -> list[Row]:
    """Of all hostile shapes the dearest, for answers and for certificates."""
    dearest = {"answer of 1 MiB": (0.0, ""), "certificate of 64 KiB": (0.0, "")}
    for who, what, reader, raw in cases(lambda reader: reader.most):
        kind = "certificate of 64 KiB" if who.startswith("a certificate") else "answer of 1 MiB"
        took = []
        for _ in range(3):
            began = time.process_time()
            reader(raw)
            took.append(time.process_time() - began)
        dearest[kind] = max(dearest[kind], (min(took) * 1e3, f"{who}, {what}"))
    return [
        Row(f"CPU of the dearest {kind} ({shape})", "what is allowed", "ms", took, _ALLOWED, "< 1")
        for kind, (took, shape) in dearest.items()
    ]
