"""The doctor asks issuers: an OCSP responder and revocation lists, all of them openssl's own."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll import doctor
from hsmtoll.doctor.facts import revocation_of
from tests.kit.own_device import Lab, free_port, make_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.doctor.findings import Check
    from tests.softhsm.conftest import DeviceSoftHsm

PATIENCE = 30.0

_CONFIG = """
[req]
distinguished_name = subject
prompt = no
[subject]
CN = any
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[intermediate]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
crlDistributionPoints = URI:http://127.0.0.1:{lists}/root.crl
[leaf]
keyUsage = critical, digitalSignature, nonRepudiation
authorityKeyIdentifier = keyid
authorityInfoAccess = OCSP;URI:http://127.0.0.1:{ocsp}
crlDistributionPoints = URI:http://127.0.0.1:{lists}/intermediate.crl
[responder]
keyUsage = critical, digitalSignature
extendedKeyUsage = OCSPSigning
authorityKeyIdentifier = keyid
[stranger]
keyUsage = critical, digitalSignature
authorityKeyIdentifier = keyid
[ca]
default_ca = this
[this]
database = {folder}/$ENV::WHO.txt
default_md = sha256
default_crl_days = 2
"""


@dataclass
class Issuer:
    """A root, an intermediate and a leaf for a device's key, made by openssl in *folder*."""

    folder: Path
    ocsp: int
    lists: int

    def openssl(self, *argv: str, who: str = "nobody") -> None:
        done = subprocess.run(
            ["openssl", *argv], cwd=self.folder, env=os.environ | {"WHO": who},
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def make(self, public_key: bytes) -> None:
        config = _CONFIG.format(folder=self.folder, ocsp=self.ocsp, lists=self.lists)
        (self.folder / "config").write_text(config)
        (self.folder / "leaf.pub").write_bytes(public_key)
        made = ("req", "-config", "config", "-newkey", "rsa:2048", "-nodes")
        self.openssl(*made, "-x509", "-days", "300", "-extensions", "authority",
                     "-subj", "/C=SE/O=Tillit/CN=Root", "-keyout", "root.key",
                     "-out", "root.pem")  # fmt: skip
        seal = "/C=SE/O=Eksempel AB/organizationIdentifier=NTRSE-5566778899/CN=Eksempel AB"
        for serial, (name, by, subject, more) in enumerate(
            (
                ("intermediate", "root", "/C=SE/O=Tillit/CN=Intermediate", ()),
                ("leaf", "intermediate", seal, ("-force_pubkey", "leaf.pub")),
                ("responder", "intermediate", "/C=SE/O=Tillit/CN=Responder", ()),
                ("stranger", "intermediate", "/C=SE/O=Tillit/CN=Stranger", ()),
            ),
            0x10,
        ):
            self.openssl(*made, "-new", "-subj", subject, "-keyout", f"{name}.key",
                         "-out", f"{name}.csr")  # fmt: skip
            self.openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.pem",
                         "-CAkey", f"{by}.key", "-set_serial", hex(serial), "-days", "200",
                         "-extfile", "config", "-extensions", name, "-out", f"{name}.pem",
                         *more)  # fmt: skip
        chain = [self.folder / f"{each}.pem" for each in ("leaf", "intermediate", "root")]
        (self.folder / "chain.pem").write_bytes(b"".join(each.read_bytes() for each in chain))

    def says(self, *, leaf: str = "V", intermediate: str = "V") -> None:
        """What is in its books, and its lists from now on: ``V`` for valid, ``R`` for revoked."""
        for who, of, serial, word in (
            ("root", "intermediate", "10", intermediate),
            ("intermediate", "leaf", "11", leaf),
        ):
            at = "260101000000Z,keyCompromise" if word == "R" else ""
            line = "\t".join((word, "400101000000Z", at, serial, "unknown", f"/CN={of}"))
            (self.folder / f"{who}.txt").write_text(f"{line}\n")
            self.openssl("ca", "-config", "config", "-gencrl", "-cert", f"{who}.pem",
                         "-keyfile", f"{who}.key", "-out", f"{who}.crl", who=who)  # fmt: skip

    @contextlib.contextmanager
    def responder(self, signer: str = "responder") -> Iterator[None]:
        """`openssl ocsp` on the port that the leaf names."""
        argv = ["openssl", "ocsp", "-port", str(self.ocsp), "-index", "intermediate.txt",
                "-CA", "intermediate.pem", "-rsigner", f"{signer}.pem", "-rkey", f"{signer}.key",
                "-ndays", "1", "-ignore_err"]  # fmt: skip
        with subprocess.Popen(
            argv, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as one:
            try:
                until = time.monotonic() + PATIENCE
                while not _listens(self.ocsp):
                    assert one.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.05)
                yield
            finally:
                one.terminate()


def _listens(port: int) -> bool:
    # Asked of the system: a probe would be a request that is answered first.
    listening = "0A"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines():
            _, local, _, state, *_ = line.split()
            if local.endswith(f":{port:04X}") and state == listening:
                return True
    return False


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    made = make_lab(device_softhsm.module, device_softhsm.environment, "revocation")
    made.generate(acme={})
    return made


@pytest.fixture(scope="module")
def made(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    folder = tmp_path_factory.mktemp("issuer")
    serve = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = Issuer(folder, free_port(), int(server.server_address[1]))
        app = lab.app("acme", folder)
        public = app.devices[0].key().public
        app.close()
        assert public is not None
        one.make(public.spki())
        yield one
        server.shutdown()


@pytest.fixture
def issuer(made: Issuer) -> Issuer:
    """Its lists are to be had; its responder is not there before a test starts it."""
    made.says()
    return made


def checked(lab: Lab, tmp_path: Path, issuer: Issuer) -> Check:
    """What the doctor says of revocation, when it may ask around."""
    nowhere = {
        "issuer": "https://localhost:1/",
        "token": "https://localhost:1/token",
        "customs": "https://localhost:1",
    }
    chain = issuer.folder / "chain.pem"
    app = lab.app(
        "acme", tmp_path, hsm={"certificates": chain}, environment="sandbox", endpoints=nowhere
    )
    try:
        report = doctor.run(app, online=True)
    finally:
        app.close()
    (check,) = (each for each in report.checks if each.check == "revocation")
    return check


def test_a_leaf_that_stands_is_said_to_by_its_responder(
    lab: Lab, tmp_path: Path, issuer: Issuer
) -> None:
    with issuer.responder():
        check = checked(lab, tmp_path, issuer)
    # The leaf by OCSP, the intermediate by the root's list.
    assert (check.verdict, check.line) == (
        "ok",
        "2 certificates are not revoked, according to CRL, OCSP",
    )


def test_a_leaf_that_was_taken_back_is_predicted_by_its_responder(
    lab: Lab, tmp_path: Path, issuer: Issuer
) -> None:
    issuer.says(leaf="R")
    with issuer.responder():
        check = checked(lab, tmp_path, issuer)
    assert (check.verdict, check.code, check.who) == ("fail", "certificate-revoked", "issuer")
    assert "Eksempel AB" in check.line
    assert "2026-01-01 00:00 UTC (keyCompromise), says its issuer's OCSP" in check.line


def test_where_no_responder_answers_the_list_does(lab: Lab, tmp_path: Path, issuer: Issuer) -> None:
    check = checked(lab, tmp_path, issuer)
    assert (check.verdict, check.line) == ("ok", "2 certificates are not revoked, according to CRL")
    issuer.says(leaf="R")
    check = checked(lab, tmp_path, issuer)
    assert check.code == "certificate-revoked"
    assert "says its issuer's CRL" in check.line


def test_an_intermediate_that_was_taken_back_is_predicted_too(
    lab: Lab, tmp_path: Path, issuer: Issuer
) -> None:
    issuer.says(intermediate="R")
    with issuer.responder():
        check = checked(lab, tmp_path, issuer)
    assert check.code == "certificate-revoked"
    assert "Intermediate" in check.line


def test_a_responder_that_was_not_made_one_is_not_believed(
    lab: Lab, tmp_path: Path, issuer: Issuer
) -> None:
    # Its books say that the leaf stands, and so would the doctor, if it believed them.
    for each in issuer.folder.glob("*.crl"):
        each.unlink()
    with issuer.responder("stranger"):
        check = checked(lab, tmp_path, issuer)
    assert (check.verdict, check.code) == ("warn", "revocation-unknown")
    assert "Eksempel AB" in check.line


def test_nobody_who_answers_is_not_known_and_said_so(
    lab: Lab, tmp_path: Path, issuer: Issuer
) -> None:
    for each in issuer.folder.glob("*.crl"):
        each.unlink()
    check = checked(lab, tmp_path, issuer)
    assert (check.verdict, check.code) == ("warn", "revocation-unknown")
    assert f"http://127.0.0.1:{issuer.lists}/intermediate.crl answered 404" in check.line


def test_outside_the_sandbox_no_address_of_the_own_network_is_asked(
    lab: Lab, tmp_path: Path, issuer: Issuer
) -> None:
    app = lab.app("acme", tmp_path, hsm={"certificates": issuer.folder / "chain.pem"})
    assert app.settings.environment == "test"
    with issuer.responder():
        chain = app.local_signer(app.devices[0]).chain()
        statuses = revocation_of(app, chain, crl=None, online=True)
    app.close()
    assert [each.status for each in statuses] == [None, None]
    assert all("own network, and is not requested" in str(each.problem) for each in statuses)
