"""The file of HSMTOLL_HSM__CERTIFICATES while a program lives on, and with bad ones in it."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll import doctor
from hsmtoll.errors import CertificateError, ConfigurationError
from hsmtoll.sandbox.pki import Authority, eseal_authority, pem
from hsmtoll.token import TokenRequest
from tests.kit.own_device import Lab, make_lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cryptography import x509

    from hsmtoll.app import App
    from tests.softhsm.conftest import DeviceSoftHsm

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
ROAD = TokenRequest("toll:eu/movement/road/v2")


@pytest.fixture(scope="module")
def lab(device_softhsm: DeviceSoftHsm) -> Lab:
    made = make_lab(device_softhsm.module, device_softhsm.environment, "followed")
    made.generate(acme={}, other={}, beside={})
    return made


@pytest.fixture(scope="module")
def authority() -> Authority:
    return eseal_authority()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chain.pem"


@pytest.fixture(params=["none", "process"])
def app(
    lab: Lab, authority: Authority, tmp_path: Path, file: Path, request: pytest.FixtureRequest
) -> Iterator[App]:
    """With the certificate `old` in the file."""
    put(file, old(lab, authority, tmp_path), *authority.chain)
    hsm = {"certificates": file, "isolation": request.param}
    with contextlib.closing(lab.app("acme", tmp_path, hsm=hsm)) as made:
        yield made


def public(lab: Lab, key: str, where: Path) -> bytes:
    with contextlib.closing(lab.app(key, where)) as app:
        found = app.devices[0].key().public
    assert found is not None
    return found.spki()


def old(lab: Lab, authority: Authority, where: Path) -> x509.Certificate:
    return authority.issue(public(lab, "acme", where), not_before=NOW - 90 * DAY)


def put(file: Path, *certificates: x509.Certificate | bytes) -> None:
    """By rename, as one should."""
    draft = file.with_suffix(".new")
    draft.write_bytes(b"".join(c if isinstance(c, bytes) else pem(c) for c in certificates))
    draft.replace(file)


def sent(app: App) -> bytes:
    """The leaf of an assertion."""
    signer: Any = app.signer
    header = signer.sign(ROAD, jti="1").assertion.split(".")[0]
    read = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    return base64.b64decode(read["x5c"][0])


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_renewed_certificate_in_the_file_takes_over_at_once(
    lab: Lab,
    app: App,
    authority: Authority,
    tmp_path: Path,
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hsmtoll")
    first = sent(app)
    assert sent(app) == first
    new = authority.issue(public(lab, "acme", tmp_path))
    put(file, new, *authority.chain)
    assert sent(app) == new.public_bytes(Encoding.DER) != first
    assert sum("takes over from" in r.getMessage() for r in caplog.records) == 1
    # In place, too: the same inode with other bytes.
    third = authority.issue(public(lab, "acme", tmp_path))
    file.write_bytes(pem(third, *authority.chain))
    assert sent(app) == third.public_bytes(Encoding.DER)
    assert warned(caplog) == []


@pytest.mark.parametrize("kind", ["empty", "cut", "gone", "directory", "key of another", "alone"])
def test_a_bad_new_file_keeps_what_was_there_before_and_is_told_once(
    lab: Lab,
    app: App,
    authority: Authority,
    tmp_path: Path,
    file: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    first = sent(app)
    new = authority.issue(public(lab, "acme", tmp_path))
    match kind:
        case "gone" | "directory":
            file.unlink()
            if kind == "directory":
                file.mkdir()
        case "key of another":
            put(file, authority.issue(public(lab, "other", tmp_path)), *authority.chain)
        case "alone":
            put(file, new)
        case _:
            put(file, b"" if kind == "empty" else pem(new)[:900])
    assert [sent(app) for _ in range(3)] == [first] * 3
    assert len(warned(caplog)) == 1, warned(caplog)
    assert "kept" in warned(caplog)[0]
    # A new program has nothing before it: it says what is wrong.
    with (
        contextlib.closing(lab.app("acme", tmp_path, hsm={"certificates": file})) as again,
        pytest.raises((CertificateError, ConfigurationError)),
    ):
        sent(again)
    if kind == "directory":
        file.rmdir()
    put(file, new, *authority.chain)
    assert sent(app) == new.public_bytes(Encoding.DER)


def test_a_bad_certificate_in_the_file_hides_no_good_one(
    lab: Lab, authority: Authority, tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hsmtoll")
    leaf = old(lab, authority, tmp_path)
    stranger = pem(eseal_authority("Annan").root).replace(b"MII", b"MIJ", 1)
    broken = b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"
    put(file, stranger, leaf, broken, *authority.chain, pem(leaf)[:-40])
    with contextlib.closing(lab.app("acme", tmp_path, hsm={"certificates": file})) as app:
        assert sent(app) == leaf.public_bytes(Encoding.DER)
        checks = {each.check: each for each in doctor.run(app).checks}
    left = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert [line.split(" in ")[0] for line in left] == [f"certificate {n}" for n in (1, 3, 6)]
    assert (checks["chain"].verdict, checks["certificate"].verdict) == ("ok", "ok")
    assert f"3 in the file cannot be read (certificate 1 in HSMTOLL_HSM__CERTIFICATES {file}" in (
        checks["certificate"].line
    )


def test_the_keys_own_certificate_that_cannot_be_read_is_named_and_not_said_to_be_missing(
    lab: Lab, authority: Authority, tmp_path: Path, file: Path
) -> None:
    odd = old(lab, authority, tmp_path).public_bytes(Encoding.DER)
    # A time that is none, in a certificate that holds the key's modulus.
    odd = odd.replace(b"\x17\x0d", b"\x04\x0d", 1)
    block = base64.encodebytes(odd)
    put(
        file,
        *authority.chain,
        b"-----BEGIN CERTIFICATE-----\n" + block + b"-----END CERTIFICATE-----\n",
    )
    with contextlib.closing(lab.app("acme", tmp_path, hsm={"certificates": file})) as app:
        with pytest.raises(CertificateError, match=r"certificate 3 in .* cannot be read") as caught:
            sent(app)
        checks = {each.check: each for each in doctor.run(app).checks}
    assert caught.value.code == "certificate-missing"
    assert "there is no certificate" not in str(caught.value)
    assert str(caught.value) in {each.line for each in checks.values()}
    # The control: another's that cannot be read is counted, and nothing more is said of it.
    put(file, *authority.chain, pem(old(lab, authority, tmp_path))[:300])
    with (
        contextlib.closing(lab.app("acme", tmp_path, hsm={"certificates": file})) as app,
        pytest.raises(CertificateError, match=r"none for this key.*1 certificate cannot be read"),
    ):
        sent(app)


def test_one_beside_the_key_on_the_device_is_named_by_its_label(
    lab: Lab, authority: Authority, tmp_path: Path
) -> None:
    leaf = authority.issue(public(lab, "beside", tmp_path)).public_bytes(Encoding.DER)
    with contextlib.closing(lab.app("beside", tmp_path)) as app:
        device = app.devices[0]
        facts = device.key()
        # Fields as they should be, but for a time that is none.
        odd = re.sub(rb"(\x17\x0d[0-9]{12})Z", rb"\1z", leaf, count=1)
        device.store(((odd, "its own", facts.id),), hint="")
        with pytest.raises(CertificateError, match="'its own' on the device cannot be read"):
            sent(app)


def test_the_file_is_read_though_it_stands_behind_a_link_that_is_changed(
    lab: Lab, app: App, authority: Authority, tmp_path: Path, file: Path
) -> None:
    """As the kubelet does: ..data is a link to a directory, and is replaced."""
    first = sent(app)
    for name, leaf in (("a", None), ("b", authority.issue(public(lab, "acme", tmp_path)))):
        (tmp_path / name).mkdir()
        chain = (leaf, *authority.chain) if leaf is not None else ()
        data = pem(*chain) if leaf is not None else file.read_bytes()
        (tmp_path / name / "chain.pem").write_bytes(data)
        link = tmp_path / f"{name}.link"
        link.symlink_to(name)
        link.replace(tmp_path / "..data")
        if leaf is None:
            file.unlink()
            file.symlink_to("..data/chain.pem")
            assert sent(app) == first
        else:
            assert sent(app) == leaf.public_bytes(Encoding.DER)
