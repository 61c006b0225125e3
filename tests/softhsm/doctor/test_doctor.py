"""The doctor before a real device, a file with its certificates, and the sandbox."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll import doctor
from hsmtoll.errors import DeviceError, NetworkError
from hsmtoll.sandbox import Sandbox
from hsmtoll.sandbox.pki import Authority, eseal_authority, pem
from hsmtoll.transport import HttpClient
from tests.kit.doctor_cases import revocation_list
from tests.kit.grants import a_grant
from tests.kit.own_device import PIN, Lab, accepted, make_lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cryptography import x509

    from hsmtoll.app import App
    from tests.softhsm.conftest import DeviceSoftHsm


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    made = make_lab(device_softhsm.module, device_softhsm.environment, "doctor")
    made.generate(
        acme={},
        loose={"SENSITIVE": False, "EXTRACTABLE": True},
        small={"bits": 1024},
        each={"ALWAYS_AUTHENTICATE": True},
        other={},
    )
    return made


@pytest.fixture(scope="module")
def authority() -> Authority:
    return eseal_authority()


@pytest.fixture(scope="module")
def leaf(
    lab: Lab, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> x509.Certificate:
    app = lab.app("acme", tmp_path_factory.mktemp("leaf"))
    public = app.devices[0].key().public
    # A login that stays would make every PIN of these tests look good.
    app.close()
    assert public is not None
    return authority.issue(public.spki())


@pytest.fixture
def chain(tmp_path: Path, leaf: x509.Certificate, authority: Authority) -> Path:
    path = tmp_path / "chain.pem"
    path.write_bytes(pem(leaf, *authority.chain))
    return path


def findings(app: App, **options: Any) -> dict[str, str]:
    try:
        report = doctor.run(app, **options)
    finally:
        app.close()
    return {c.code: c.verdict for c in report.checks if c.verdict in ("warn", "fail")}


def test_a_good_device_leaves_the_doctor_silent(lab: Lab, tmp_path: Path, chain: Path) -> None:
    app = lab.app("acme", tmp_path, hsm={"certificates": chain})
    report = doctor.run(app)
    app.close()
    assert [c for c in report.checks if c.verdict in ("warn", "fail")] == []
    assert report.exit_code == 0
    key = report.evidence()["keys"][0]
    assert key["key_as_reported_by_the_module"]["never_extractable"] is True
    assert key["device"]["pin"] == "ok"
    assert PIN not in repr(report.evidence())


@pytest.mark.parametrize(
    ("key", "code"),
    [("loose", "key-exportable"), ("small", "key-size"), ("nobody", "key-missing")],
)
def test_each_key_at_fault_has_its_code(
    lab: Lab, tmp_path: Path, chain: Path, key: str, code: str
) -> None:
    app = lab.app(key, tmp_path, hsm={"certificates": chain})
    report = doctor.run(app)
    app.close()
    assert [c.code for c in report.checks if c.verdict == "fail"] == [code]
    assert report.exit_code == 30


def test_a_certificate_of_another_key_is_not_taken(lab: Lab, tmp_path: Path, chain: Path) -> None:
    app = lab.app("other", tmp_path, hsm={"certificates": chain})
    assert findings(app) == {"certificate-missing": "fail"}


def test_an_exportable_key_that_is_allowed_is_a_warning(
    lab: Lab, tmp_path: Path, authority: Authority
) -> None:
    app = lab.app("loose", tmp_path, hsm={"allow_exportable_key": True})
    public = app.devices[0].key().public
    assert public is not None
    path = tmp_path / "loose.pem"
    path.write_bytes(pem(authority.issue(public.spki()), *authority.chain))
    app.close()
    again = lab.app("loose", tmp_path, hsm={"allow_exportable_key": True, "certificates": path})
    assert findings(again) == {"key-exportable-allowed": "warn"}


def test_a_pinpad_is_no_pin_for_every_signature(lab: Lab, tmp_path: Path) -> None:
    codes = {}
    for pin in ({}, {"signing_pin": PIN}, {"signing_pin_prompt": "pinpad"}):
        app = lab.app("each", tmp_path, hsm=pin)
        codes[str(pin)] = {"signing-pin"} & set(findings(app))
        app.close()
        app = lab.app("each", tmp_path, hsm=pin)
        with contextlib.suppress(DeviceError):
            assert app.devices[0].sign("RS256", a_grant()).value
            # The doctor predicted it.
            assert not codes[str(pin)]
        app.close()
    assert list(codes.values()) == [set(), set(), {"signing-pin"}]


def test_a_wrong_pin_is_tried_once_and_then_not_again(
    lab: Lab, tmp_path: Path, chain: Path
) -> None:
    wrong = {"pin": "99999999", "certificates": chain}
    first = doctor.run(lab.app("acme", tmp_path, hsm=wrong))
    second = doctor.run(lab.app("acme", tmp_path, hsm=wrong))
    assert (first.exit_code, second.exit_code) == (20, 21)
    assert [c.code for c in second.checks if c.verdict == "fail"] == ["pin-refused"]
    # The control: the right one is accepted, and the device has counted one wrong try.
    assert findings(lab.app("acme", tmp_path, hsm={"certificates": chain})) in (
        {},
        {"pin-count-low": "warn"},
    )
    assert findings(lab.app("acme", tmp_path, hsm={"certificates": chain})) == {}


def test_a_pin_that_only_rides_on_the_login_of_another_is_not_called_accepted(
    lab: Lab, tmp_path: Path, chain: Path
) -> None:
    app = lab.app("acme", tmp_path, hsm={"certificates": chain})
    accepted(app.devices[0])
    lines = {}
    for pin in (PIN, "99999999"):
        rider = lab.app("acme", tmp_path, hsm={"pin": pin, "certificates": chain})
        lines[pin] = next(c.line for c in doctor.run(rider).checks if c.check == "pin")
        rider.close()
    app.close()
    assert lines[PIN] == "accepted"
    assert "not verified" in lines["99999999"]


@pytest.mark.parametrize(
    ("hsm", "code"),
    [
        ({"pin": None}, "not-logged-in"),
        ({"module": "/usr/lib/nowhere.so"}, "module-path"),
        ({"module": "/usr/lib/x86_64-linux-gnu/libz.so.1"}, "module-load"),
        ({"key": ["pkcs11:token=nobody;object=acme"]}, "device-missing"),
        ({"certificates": "/nowhere/chain.pem"}, "setting-invalid"),
    ],
)
def test_what_is_missing_on_the_way_has_its_code(
    lab: Lab, tmp_path: Path, chain: Path, hsm: dict[str, Any], code: str
) -> None:
    found = findings(lab.app("acme", tmp_path, hsm={"certificates": chain, **hsm}))
    assert found == {code: "fail"}


def test_a_spy_in_between_fails_outside_the_sandbox(
    lab: Lab, tmp_path: Path, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKCS11SPY", str(lab.module))
    found = findings(lab.app("acme", tmp_path, hsm={"certificates": chain}))
    assert found == {"module-spy": "fail"}


def test_a_revoked_leaf_is_predicted_by_a_list_in_a_file(
    lab: Lab, tmp_path: Path, chain: Path, leaf: x509.Certificate, authority: Authority
) -> None:
    path = tmp_path / "list.crl"
    path.write_bytes(revocation_list(authority, leaf).public_bytes(Encoding.DER))
    found = findings(lab.app("acme", tmp_path, hsm={"certificates": chain}), crl=path)
    assert found == {"certificate-revoked": "fail"}
    path.write_bytes(revocation_list(authority).public_bytes(Encoding.PEM))
    assert findings(lab.app("acme", tmp_path, hsm={"certificates": chain}), crl=path) == {}
    path.write_bytes(b"nothing")
    found = findings(lab.app("acme", tmp_path, hsm={"certificates": chain}), crl=path)
    assert found == {"revocation-unknown": "warn"}


# ----- online -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox(authority: Authority) -> Iterator[Sandbox]:
    with Sandbox(trust=[authority], signing_bits=2048) as running:
        yield running


def there(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "environment": "sandbox",
        "endpoints": {
            "issuer": sandbox.issuer,
            "token": sandbox.token_endpoint,
            "customs": sandbox.customs,
        },
        "ca_file": sandbox.ca_file,
    }


def test_online_one_real_grant_shows_whom_maskinporten_takes_us_for(
    lab: Lab, tmp_path: Path, chain: Path, sandbox: Sandbox
) -> None:
    app = lab.app("acme", tmp_path, hsm={"certificates": chain}, **there(sandbox))
    report = doctor.run(app, online=True, scopes=("road",))
    app.close()
    checks = {c.check: c for c in report.checks}
    assert "NTRSE-5566778899" in checks["self-test"].line
    assert checks["scope toll:eu/movement/road/v2"].verdict == "ok"
    assert {c.code for c in report.checks if c.verdict == "fail"} == set()
    # Nobody is at authority.invalid: not known, and said so.
    assert checks["revocation"].code == "revocation-unknown"
    assert [one.kind for one in sandbox.received][-3:] == ["grant", "grant", "exchange"]


def test_offline_nothing_is_sent(lab: Lab, tmp_path: Path, chain: Path, sandbox: Sandbox) -> None:
    before = len(sandbox.received)
    app = lab.app("acme", tmp_path, hsm={"certificates": chain}, **there(sandbox))
    assert findings(app, scopes=("road",)) == {}
    assert len(sandbox.received) == before


def test_a_scope_that_is_not_granted_names_who_must_act(
    lab: Lab, tmp_path: Path, chain: Path, authority: Authority
) -> None:
    with Sandbox(trust=[authority], signing_bits=2048) as strict:
        strict.allow("NTRSE-5566778899", "digdir:verksemd.eu", "toll:eu/movement/road/v2")
        app = lab.app("acme", tmp_path, hsm={"certificates": chain}, **there(strict))
        report = doctor.run(app, online=True, scopes=("road", "air"))
        app.close()
    checks = {c.check: c for c in report.checks}
    assert checks["scope toll:eu/movement/road/v2"].verdict == "ok"
    air = checks["scope toll:eu/movement/air"]
    assert (air.verdict, air.code, air.who) == ("fail", "MP-250", "customs")
    assert report.exit_code == 61


def test_metadata_that_differs_is_named_and_not_obeyed(
    lab: Lab, tmp_path: Path, chain: Path, authority: Authority
) -> None:
    with Sandbox(trust=[authority], signing_bits=2048, without=frozenset({"M01"})) as odd:
        app = lab.app("acme", tmp_path, hsm={"certificates": chain}, **there(odd))
        found = findings(app, online=True)
        assert found["metadata-differs"] == "fail"
        assert [one for one in odd.received if one.kind == "grant"] == []


def test_an_unreachable_service_is_a_network_failure(lab: Lab, tmp_path: Path, chain: Path) -> None:
    nowhere = {"issuer": "https://localhost:1/", "token": "https://localhost:1/token"}
    app = lab.app(
        "acme", tmp_path, hsm={"certificates": chain}, environment="sandbox",
        endpoints={**nowhere, "customs": "https://localhost:1"},
    )  # fmt: skip
    report = doctor.run(app, online=True)
    app.close()
    assert report.exit_code == 80


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *args: object) -> None:
        del args


def test_addresses_in_certificates_do_not_lead_into_the_own_network() -> None:
    server = HTTPServer(("127.0.0.1", 0), _Hello)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    try:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{port}/list.crl"
            with pytest.raises(NetworkError) as caught:
                HttpClient().get(url, server="revocation", public=True)
            assert caught.value.code == "address-private"
            # The control: without the rule it is there.
            assert HttpClient().get(url, server="revocation").body == b"hello"
    finally:
        server.shutdown()
        server.server_close()
