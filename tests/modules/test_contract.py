"""What every stack has to do, and one row for each of them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.kit.grants import a_grant

if TYPE_CHECKING:
    from pathlib import Path

    from tests.modules.conftest import Driver, Stack

pytestmark = pytest.mark.timeout(300)

HASHES: dict[str, Any] = {
    "RS256": hashes.SHA256(),
    "RS384": hashes.SHA384(),
    "RS512": hashes.SHA512(),
}


def public(driver: Driver) -> rsa.RSAPublicKey:
    modulus, exponent = driver.does("key")["public"]
    return rsa.RSAPublicNumbers(exponent, int(modulus, 16)).public_key()


def test_the_key_is_found_by_its_uri_and_stays_inside(stack: Stack, tmp_path: Path) -> None:
    with stack.driver(tmp_path) as driver:
        facts = driver.does("key")
    assert facts["protected"]
    assert facts["public"]


@pytest.mark.parametrize("alg", sorted(HASHES))
def test_its_signatures_verify_elsewhere(stack: Stack, tmp_path: Path, alg: str) -> None:
    with stack.driver(tmp_path) as driver:
        signature = bytes.fromhex(driver.does("sign", alg=alg, jti="one"))
        key = public(driver)
    key.verify(signature, a_grant(alg), padding.PKCS1v15(), HASHES[alg])
    paths = [tmp_path / name for name in ("key", "signature", "text")]
    parts = (
        key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        signature,
        a_grant(alg),
    )
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    judge = ["openssl", "dgst", f"-sha{alg[2:]}", "-verify", str(paths[0]), "-signature"]
    subprocess.run([*judge, *map(str, paths[1:])], check=True, capture_output=True)
    paths[2].write_bytes(b"another text")
    assert subprocess.run(
        [*judge, *map(str, paths[1:])], capture_output=True, check=False
    ).returncode


def test_it_signs_as_much_as_a_grant_with_certificates_holds(stack: Stack, tmp_path: Path) -> None:
    text = a_grant(size=7000)
    assert len(text) > 9216
    with stack.driver(tmp_path) as driver:
        signature = bytes.fromhex(driver.does("sign", alg="RS256", jti="one", size=7000))
        key = public(driver)
    key.verify(signature, text, padding.PKCS1v15(), hashes.SHA256())
    with pytest.raises(InvalidSignature):
        key.verify(signature, text[1:], padding.PKCS1v15(), hashes.SHA256())


def test_a_wrong_pin_is_tried_once_and_the_right_one_still_works(
    stack: Stack, tmp_path: Path
) -> None:
    with stack.driver(tmp_path, pin=stack.wrong_pin) as driver:
        first = driver.error("sign", alg="RS256", jti="one")
        assert (first["type"], first["exit"]) == ("PinIncorrect", 20)
        assert [driver.error("sign", alg="RS256", jti="one")["exit"] for _ in range(5)] == [21] * 5
    # With six tries every one of these devices that locks would have locked.
    with stack.driver(tmp_path) as driver:
        assert driver.does("sign", alg="RS256", jti="one")


def test_it_works_again_by_itself_after_it_was_lost(stack: Stack, tmp_path: Path) -> None:
    with stack.driver(tmp_path) as driver:
        first = driver.does("sign", alg="RS256", jti="one")
        with stack.driver(tmp_path) as newcomer:
            stack.lose()
            try:
                if stack.open_goes_on:
                    assert driver.does("sign", alg="RS256", jti="one") == first
                else:
                    assert driver.error("sign", alg="RS256", jti="one")["exit"] == 30
                    assert driver.error("sign", alg="RS256", jti="one")["code"] == "device-down"
                assert newcomer.error("sign", alg="RS256", jti="one")["exit"] == 30
            finally:
                stack.back()
            for each in (driver, newcomer):
                each.does("advance", seconds=31)
                assert each.does("sign", alg="RS256", jti="one") == first


def test_threads_share_it(stack: Stack, tmp_path: Path) -> None:
    with stack.driver(tmp_path) as driver:
        signatures = driver.does("threads", alg="RS256", jti="one", threads=4, times=20)
        (only,) = set(signatures)
        public(driver).verify(bytes.fromhex(only), a_grant(), padding.PKCS1v15(), HASHES["RS256"])


def test_a_fork_signs_or_is_told_why_not_and_the_parent_goes_on(
    stack: Stack, tmp_path: Path
) -> None:
    with stack.driver(tmp_path) as driver:
        first = driver.does("sign", alg="RS256", jti="one")
        answer = driver.does("fork", alg="RS256", jti="one")
    assert answer["parent"] == first
    if stack.fork_safe:
        assert answer["child"] == {"answer": first}
    else:
        assert answer["child"]["error"]["code"] == "forked"


def test_its_key_is_listed_with_a_uri_that_finds_it(stack: Stack, tmp_path: Path) -> None:
    with stack.driver(tmp_path) as driver:
        listed = driver.does("objects")
        facts = driver.does("key")
    assert facts["uri"] in listed
