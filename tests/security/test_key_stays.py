"""
The private key stays in the device: asked for in both ways PKCS#11 has, and refused, while the
same questions are answered for a control key that was made to be taken out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kit.grants import DEFINED

_PROGRAM = r"""
import json
import sys

import pkcs11
from pkcs11 import Attribute as A, KeyType, Mechanism, MechanismFlag, ObjectClass

SECRETS = (A.PRIVATE_EXPONENT, A.PRIME_1, A.PRIME_2, A.EXPONENT_1, A.EXPONENT_2, A.COEFFICIENT)


def answers(key, wrapping):
    found = {}
    for secret in SECRETS:
        try:
            found[secret.name] = f"{len(key[secret])} bytes"
        except pkcs11.PKCS11Error as error:
            found[secret.name] = type(error).__name__
    try:
        found["wrap"] = f"{len(wrapping.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP_PAD))} bytes"
    except pkcs11.PKCS11Error as error:
        found["wrap"] = type(error).__name__
    return found


token = pkcs11.lib(sys.argv[1]).get_token(token_label="lab")
with token.open(rw=True, user_pin="1234") as session:
    wrapping = session.generate_key(
        KeyType.AES, 256, store=False, capabilities=MechanismFlag.WRAP | MechanismFlag.UNWRAP
    )
    found = {}
    for label, protected in (("ours", True), ("control", False)):
        _, key = session.generate_keypair(
            KeyType.RSA, 2048, id=label.encode(), label=label, store=True,
            private_template={A.SENSITIVE: protected, A.EXTRACTABLE: not protected},
        )
        found[label] = answers(key, wrapping)
print(json.dumps(found))
"""

_OURS = (
    DEFINED
    + """
import sys
from pathlib import Path
from hsmtoll.errors import DeviceError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
for label in ("ours", "control"):
    uri = KeyUri.parse("pkcs11:token=lab;object=" + label)
    with InProcessDevice(DeviceSettings(Path(sys.argv[1]), uri),
                pin=PinValue.of("1234"), pin_log=PinLog(Path(sys.argv[2]))) as device:
        try:
            facts = device.key()
            device.sign("RS256", a_grant())
            print(label, facts.protected, facts.never_extractable)
        except DeviceError as error:
            print(label, error.code)
"""
)

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")


def test_neither_reading_nor_wrapping_gets_our_key_out_and_both_get_the_control_out(
    tmp_path: Path,
) -> None:
    import json

    (tmp_path / "tokens").mkdir()
    configuration = tmp_path / "softhsm2.conf"
    configuration.write_text(
        f"directories.tokendir = {tmp_path}/tokens\nobjectstore.backend = file\n"
    )
    environment = {**os.environ, "SOFTHSM2_CONF": str(configuration)}

    def run(*argv: str) -> str:
        return subprocess.run(
            argv, env=environment, check=True, capture_output=True, text=True
        ).stdout

    run(
        "softhsm2-util", "--init-token", "--free", "--label", "lab", "--pin", "1234",
        "--so-pin", "56785678",
    )  # fmt: skip
    found = json.loads(run(sys.executable, "-c", _PROGRAM, str(SOFTHSM)))
    attributes = ("PRIVATE_EXPONENT", "PRIME_1", "PRIME_2", "EXPONENT_1", "EXPONENT_2",
                  "COEFFICIENT")  # fmt: skip
    assert {found["ours"][name] for name in attributes} == {"AttributeSensitive"}
    assert found["ours"]["wrap"] in {"KeyUnextractable", "KeyNotWrappable"}
    # a number may begin with a zero byte that is left out
    assert all(found["control"][name].endswith(" bytes") for name in attributes)
    assert found["control"]["wrap"].endswith(" bytes")

    output = run(sys.executable, "-c", _OURS, str(SOFTHSM), str(tmp_path / "state"))
    assert output.splitlines() == ["ours True True", "control key-exportable"]
