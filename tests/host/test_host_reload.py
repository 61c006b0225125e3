"""A policy that is read again while callers are served: what counts from when on, and for whom."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.errors import DeviceError, PolicyDenied, TryAgainLater
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import GrantRequest
from hsmtoll.host.self_test import sign_self_test
from hsmtoll.sandbox.pki import eseal_authority, pem
from hsmtoll.settings import load
from hsmtoll.tokens.renewal import Renewal
from tests.kit.own_device import workers
from tests.kit.signing_host import ME, PROFILE, RunningService, entry, eventually

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from cryptography import x509

    from hsmtoll.testing.identity import TemporaryIdentity
    from tests.kit.signing_host import RunningHost

PATIENCE = 60.0
CHANGED = PROFILE + 'alg = "RS512"\n'


def asked(service: RunningService, mode: str = "grant") -> Future[dict[str, Any]]:
    """The road, for this account."""
    have = service.grant if mode == "grant" else service.token
    return have(
        Peer.local(os.geteuid(), os.getegid()), GrantRequest("acme", "road"), gone=lambda: False
    )


@pytest.mark.parametrize("changed", [True, False])
def test_a_token_of_a_profile_that_was_changed_meanwhile_is_not_released(
    service: RunningService, host: RunningHost, monkeypatch: pytest.MonkeyPatch, *, changed: bool
) -> None:
    real, reached, may = Renewal._exchanged, threading.Event(), threading.Event()

    def held(renewal: Renewal, subject: Any) -> Any:
        reached.set()
        assert may.wait(PATIENCE)
        return real(renewal, subject)

    monkeypatch.setattr(Renewal, "_exchanged", held)
    waiting = asked(service, "token")
    assert reached.wait(PATIENCE)
    host.write_policy(entry(ME, per_day=9), before=CHANGED if changed else PROFILE)
    assert service.reload() is None
    may.set()
    if changed:
        with pytest.raises(TryAgainLater, match="the policy is being changed"):
            waiting.result(PATIENCE)
        assert host.records("release") == []
    else:
        assert waiting.result(PATIENCE)["access_token"]
    service.prove()
    assert asked(service, "token").result(PATIENCE)["access_token"]
    released = {each["policy_sha256"] for each in host.records("release")}
    assert released == {host.records("policy")[-1]["policy_sha256"]}


def test_a_certificate_in_a_file_takes_over_and_a_bad_file_is_told_by_a_reload(
    host: RunningHost,
    toll_eseal: TemporaryIdentity,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "hsmtoll")
    authority, file = eseal_authority("Fil"), tmp_path / "chain.pem"
    now = datetime.now(UTC)

    def issued(days: int) -> x509.Certificate:
        key = toll_eseal.chain[0].public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        made = authority.issue(key, not_before=now - timedelta(hours=24 - days))
        file.write_bytes(pem(made, *authority.chain))
        return made

    def leaf(service: RunningService) -> bytes:
        header = asked(service).result(PATIENCE)["assertion"].split(".")[0]
        x5c = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["x5c"]
        return base64.b64decode(x5c[0])

    first = issued(1)
    host.write_policy(entry(ME), before=f'{PROFILE}[profile.acme.hsm]\ncertificates = "{file}"\n')
    service = RunningService(load(), synchronised=lambda: True)
    with contextlib.closing(service):
        service.prove()
        assert leaf(service) == first.public_bytes(Encoding.DER)
        second = issued(2)
        eventually(lambda: leaf(service) == second.public_bytes(Encoding.DER))
        assert any("takes over from" in each.getMessage() for each in caplog.records)
        file.write_bytes(b"nothing")
        assert service.reload() is None
        warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert any("kept" in line and str(file) in line for line in warnings)
        assert leaf(service) == second.public_bytes(Encoding.DER)
        # The same bytes in the same file: a reload reads them and changes nothing.
        third = issued(3)
        assert service.reload() is None
        assert leaf(service) == third.public_bytes(Encoding.DER)
        assert service.not_ready() == []


class Proofs:
    """Self-tests that wait until they may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        monkeypatch.setattr("hsmtoll.host.profiles.sign_self_test", self._held)

    def _held(self, app: Any) -> Any:
        self.begun.set()
        assert self.may.wait(PATIENCE)
        return sign_self_test(app)


def test_a_profile_goes_on_with_the_old_key_until_the_new_one_has_proven_itself(
    service: RunningService, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs = Proofs(monkeypatch)
    before = host.signatures()
    host.write_policy(entry(ME), before=CHANGED)
    with ThreadPoolExecutor(1) as pool:
        reloaded = pool.submit(service.reload)
        assert proofs.begun.wait(PATIENCE)
        assert asked(service).result(PATIENCE)["jti"]
        assert host.records("policy") == []
        proofs.may.set()
        assert reloaded.result(PATIENCE) is None
    # Nobody has to wait for a self-test now, and none is signed again.
    assert service.not_ready() == []
    service.prove()
    assert asked(service).result(PATIENCE)["jti"]
    assert host.signatures() == before + 3
    eventually(lambda: len(workers()) == 1)


def test_a_device_that_is_busy_keeps_no_policy_from_counting(
    service: RunningService, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsmtoll.host.profiles._TAKEOVER_TIMEOUT", 0.0)
    proofs = Proofs(monkeypatch)
    before = host.signatures()
    host.write_policy(entry(ME, mode=["token"]), before=CHANGED)
    assert service.reload() is None
    # What was taken away is, whoever it is that may still have something later.
    with pytest.raises(PolicyDenied):
        asked(service).result(PATIENCE)
    with pytest.raises(DeviceError, match="not ready"):
        asked(service, "token").result(PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(service.prove)
        proofs.may.set()
        again.result(PATIENCE)
    # The one that was under way is not signed twice.
    assert service.not_ready() == []
    assert host.signatures() == before + 1
    assert asked(service, "token").result(PATIENCE)["access_token"]


def test_a_profile_that_cannot_prove_itself_counts_all_the_same_and_says_why(
    service: RunningService, host: RunningHost
) -> None:
    nowhere = PROFILE + '[profile.acme.hsm]\nkey = "pkcs11:token=nowhere;object=nothing"\n'
    host.write_policy(entry(ME), before=nowhere)
    assert service.reload() is None
    (why,) = service.not_ready()
    assert "nowhere" in why
    with pytest.raises(DeviceError, match="not ready"):
        asked(service).result(PATIENCE)
    host.write_policy(entry(ME))
    assert service.reload() is None
    service.prove()
    assert asked(service).result(PATIENCE)["jti"]


def test_a_reload_that_cannot_be_written_down_is_over_and_told(running_host: RunningHost) -> None:
    assert running_host.process is not None
    # The limit holds for what it says on standard error as well.
    for _ in range(20):
        assert running_host.ask(scope="air").status == 403
    assert running_host.ask().status == 200
    size = max(part.stat().st_size for part in running_host.audit.glob("audit-*.jsonl"))
    resource.prlimit(running_host.process.pid, resource.RLIMIT_FSIZE, (size + 10, size + 10))
    for _ in range(2):
        running_host.write_policy(entry(ME), before=CHANGED)
        running_host.reload()
        assert any(
            each.startswith("STATUS=old policy kept: audit") for each in running_host.notifications
        )
    assert running_host.ask().word == "audit_broken"
    assert running_host.end() == 0
    assert "Traceback" not in running_host.log()
    assert "never retrieved" not in running_host.log()
