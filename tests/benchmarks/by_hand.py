"""What `hsmtoll token` does when it is cold, by hand: the same libraries, no care at all."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import asn1crypto.x509  # noqa: F401 - a reader of certificates has it loaded
import click
import cryptography.x509
import httpx
import pkcs11
import pydantic_settings  # noqa: F401 - settings are read by it
from pkcs11 import Attribute, Mechanism, ObjectClass


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def main() -> None:
    env = os.environ
    label = env["HSMTOLL_HSM__KEY"].split("token=")[1].split(";", maxsplit=1)[0]
    pin = Path(env["HSMTOLL_HSM__PIN_FILE"]).read_text(encoding="utf-8")
    p11_token = pkcs11.lib(env["HSMTOLL_HSM__MODULE"]).get_token(token_label=label)
    with p11_token.open(user_pin=pin) as session:
        key: Any = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label=sys.argv[1])
        stored = session.get_objects({Attribute.CLASS: ObjectClass.CERTIFICATE})
        ders = [each[Attribute.VALUE] for each in stored]
        for der in ders:
            cryptography.x509.load_der_x509_certificate(der)
        own = {d: cryptography.x509.load_der_x509_certificate(d) for d in ders}
        leaf = next(d for d, c in own.items() if "Eksempel AB" in c.subject.rfc4514_string())
        chain = [leaf]
        while own[chain[-1]].issuer != own[chain[-1]].subject:
            issuer = own[chain[-1]].issuer
            chain.append(next(d for d, c in own.items() if c.subject == issuer))
        now = int(time.time())
        header = {"alg": "RS256", "x5c": [base64.b64encode(d).decode() for d in chain]}
        claims = {
            "aud": env["HSMTOLL_ENDPOINTS__ISSUER"],
            "iss": "x",
            "scope": "toll:eu/movement/road/v2",
            "iat": now,
            "exp": now + 120,
            "jti": str(uuid.uuid4()),
        }
        unsigned = ".".join(b64(json.dumps(part).encode()) for part in (header, claims))
        signature = key.sign(unsigned.encode(), mechanism=Mechanism.SHA256_RSA_PKCS)
    with httpx.Client(verify=env["HSMTOLL_CA_FILE"]) as client:
        form = {
            "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "assertion": f"{unsigned}.{b64(signature)}",
        }
        subject = client.post(env["HSMTOLL_ENDPOINTS__TOKEN"], data=form).json()["access_token"]
        form = {
            "grant_type": "token-exchange",
            "subject_token_type": "access_token",
            "subject_token": subject,
        }
        url = f"{env['HSMTOLL_ENDPOINTS__CUSTOMS']}/api/access/external/oauth/token"
        click.echo(client.post(url, data=form).json()["access_token"])


if __name__ == "__main__":
    main()
