"""What grows with years of records or keys, and what hostile bytes cost at most."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.host.audit import Audit
from hsmtoll.host.audit_log import segments_of, verify
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.identity import eseal, register_identity
from hsmtoll.testing.softhsm import SoftHsm
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


#: Milliseconds of one call, as of an HSM in the network.
_LATENCY: Final = 5

#: Other keys, each with a certificate.
_OTHERS: Final = """
import sys, pkcs11
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pkcs11 import Attribute as A, CertificateType, ObjectClass
from pkcs11.util.rsa import decode_rsa_private_key

made = rsa.generate_private_key(65537, 2048)
private = decode_rsa_private_key(
    made.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
)
module, token, pin, count = sys.argv[1:5]
with pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    (some, *_) = session.get_objects({A.CLASS: ObjectClass.CERTIFICATE})
    certificate = {
        A.CLASS: ObjectClass.CERTIFICATE, A.CERTIFICATE_TYPE: CertificateType.X_509,
        A.PRIVATE: False, A.SUBJECT: bytes((0x30, 0)), A.VALUE: some[A.VALUE],
    }
    for number in range(int(count)):
        named = {A.TOKEN: True, A.LABEL: f"other-{number}", A.ID: b"other%d" % number}
        for each in (private, certificate):
            session.create_object(each | named)
"""


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


def partition(stage: Stage) -> Row:
    """
    `hsmtoll token` with nothing in its cache, among many keys of others; against a C program that
    knows the labels of the key and its three certificates, and signs once. Both are processes.
    """
    others = int(os.environ.get("TOLL_BENCH_KEYS", "1500")) - 1
    device = SoftHsm.create(stage.folder / "partition")
    who = eseal(device)
    register_identity(stage.sandbox, who)
    filling = [sys.executable, "-c", _OTHERS, str(device.module), device.label, device.pin]
    subprocess.run([*filling, str(others)], env=os.environ | device.environ(), check=True)
    with Faults(device.module, stage.folder / "partition-faults") as faults:
        environ = {**who.environ(), **faults.environ(), "HSMTOLL_CACHE": "memory:"}
        labels = [who.key_label, *(f"{who.key_label}-ca-{number}" for number in (0, 3))]
        asking = [str(stage.loop), str(faults.module), device.label, who.key_label, "0"]
        asking += [str(stage.length), *labels]
        counts = {}

        def ours() -> float:
            faults.reset_counts()
            took = stage.command(sys.executable, "-m", "hsmtoll", "token", "road", **environ)
            counts["ours"] = sum(faults.calls().values())
            return took

        def bare() -> float:
            faults.reset_counts()
            took = seconds_of(
                lambda: subprocess.run(
                    asking, env=os.environ | environ, input=f"{device.pin}\ngo\n",
                    text=True, check=True, stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
            counts["bare"] = sum(faults.calls().values())
            return took

        ours()
        faults.set("latency", ms=_LATENCY)
        pair = turns(ours, bare)
    what = f"first token among {others + 1:,} keys, {_LATENCY} ms a call ({counts['ours']} calls)"
    return Row(what, f"the {counts['bare']} that cannot be avoided", "s", *pair, "≤ 2 s")


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
