"""
The doctor and the sandbox judge the same things and share no code: what the one passes, the
other accepts; what the other refuses, the one predicted.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import ssl
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.doctor import examine
from hsmtoll.sandbox import Sandbox, Settings
from tests.kit import doctor_cases
from tests.kit.doctor_cases import BROKEN, CLIENT, GOOD, NOW, enterprise, late_seals, seals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kit.doctor_cases import Setup


@pytest.fixture(scope="module")
def judge() -> Iterator[Sandbox]:
    """Strict, with key usage enforced, which the documentation leaves open."""
    trusted = (seals(), late_seals(), enterprise())
    with Sandbox(
        settings=dataclasses.replace(Settings(), key_usage_enforced=True),
        clock=NOW.timestamp,
        trust=trusted,
    ) as sandbox:
        sandbox.register_client(CLIENT)
        yield sandbox


def sent(sandbox: Sandbox, setup: Setup) -> httpx.Response:
    """What a client without checks sends, put together here by hand."""
    alg = setup.facts.settings.alg
    header = (
        {"alg": alg, "kid": setup.kid}
        if setup.kid
        else {
            "alg": alg,
            "x5c": [
                base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in setup.x5c
            ],
        }
    )
    iat = int(NOW.timestamp())
    claims = {
        "aud": sandbox.issuer,
        "iat": iat,
        "exp": iat + 120,
        "jti": str(uuid.uuid4()),
        **setup.claims,
    }
    parts = (json.dumps(part).encode() for part in (header, claims))
    data = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    digest = {"RS256": hashes.SHA256(), "RS384": hashes.SHA384(), "RS512": hashes.SHA512()}[alg]
    signature = setup.signer.sign(data, padding.PKCS1v15(), digest)
    assertion = data + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")
    grant_type = "urn:ietf:params:oauth:grant-type:jwt-bearer"
    form = {"grant_type": grant_type, "assertion": assertion.decode()}
    return httpx.post(
        sandbox.token_endpoint, data=form, verify=ssl.create_default_context(cafile=sandbox.ca_file)
    )


ALL = {**GOOD, **BROKEN}


@pytest.mark.parametrize("name", ALL)
def test_doctor_and_sandbox_agree_about_every_setup(judge: Sandbox, name: str) -> None:
    made = ALL[name]()
    if made.refused is None:
        assert made.facts.seen[0].error or made.facts.settings.environment is None
        return
    if made.revoked is not None:
        judge.revoke(made.revoked)
    response = sent(judge, made)
    worries = [check.code for check in examine(made.facts) if check.verdict in ("warn", "fail")]
    assert (response.status_code != 200) == made.refused, response.text
    if not worries:
        assert response.status_code == 200, response.text
    if response.status_code != 200:
        assert made.code in worries


def test_consumer_and_amr_are_predicted_to_the_byte(judge: Sandbox) -> None:
    for name, build in GOOD.items():
        made = build()
        token = sent(judge, made).json()["access_token"]
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        lines = {check.check: check.line for check in examine(made.facts)}
        assert claims["consumer"]["ID"] in lines["consumer-id"], name
        assert claims["client_amr"] in lines["qualified"], name


def test_every_code_of_a_certificate_or_claim_is_among_the_setups() -> None:
    """A fault that is added to the chain's table must be added to the setups as well."""
    from hsmtoll.x509 import certificate_checks, leaf_choice, path_building

    known = {made().code for made in doctor_cases.BROKEN.values()}
    modules = (certificate_checks, leaf_choice, path_building)
    source = "".join(Path(str(each.__file__)).read_text(encoding="utf-8") for each in modules)
    words = {word for word in source.split('"') if word.startswith(("certificate-", "chain-"))}
    never_alone = {"chain-not-yet-valid"}
    assert words - never_alone <= known
