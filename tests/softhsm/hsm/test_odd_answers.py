"""Attributes that no device should have: an error that says so, or an object passed over."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hsmtoll.jws import RsaPublicKey
from tests.kit.grants import DEFINED
from tests.softhsm.conftest import stand_between

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.testing.softhsm import SoftHsm

#: ODD is the attribute's number and what its value becomes: a length, or "=" and its last byte.
_ODD = """
static word attributes(word session, word object, attribute *asked, word count) {
    word (*answer)(word, word, attribute *, word) = real->functions[24];
    word rv = answer(session, object, asked, count);
    const char *odd = getenv("ODD");
    char *rest = "";
    word type = odd ? strtoul(odd, &rest, 16) : 0;
    for (word n = 0; odd && n < count; n++) {
        if (asked[n].type != type) continue;
        if (*rest == ':') {
            asked[n].length = strtoul(rest + 1, NULL, 10);
            if (asked[n].length == 0) rv = 0;
        } else if (asked[n].value) {
            memset(asked[n].value, 0, asked[n].length);
            ((char *)asked[n].value)[asked[n].length - 1] = strtoul(rest + 1, NULL, 10);
        }
    }
    return rv;
}
"""

#: A device whose model is another one as soon as a file is there.
_RENAMED = """
static word info(word slot, char *out) {
    word (*answer)(word, char *) = real->functions[6];
    word rv = answer(slot, out);
    FILE *there = fopen(getenv("RENAMED"), "r");
    if (there) memcpy(out + 64, "another model   ", 16), fclose(there);
    return rv;
}
"""

_USED_TWICE = (
    DEFINED
    + """
import os, sys
from pathlib import Path
from hsmtoll import HsmTollError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
module, state, uri, pin = sys.argv[1:]
device = InProcessDevice(
    DeviceSettings(Path(module), KeyUri.parse(uri)),
    pin=PinValue.of(pin), pin_log=PinLog(Path(state)),
)
for _ in range(2):
    device.sign("RS256", a_grant())
    device.close()
Path(os.environ["RENAMED"]).touch()
try:
    device.sign("RS256", a_grant())
except HsmTollError as error:
    print(error.code, error)
"""
)

_ASK = (
    DEFINED
    + """
import sys
from pathlib import Path
from hsmtoll import HsmTollError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
module, state, uri, pin = sys.argv[1:]
pin_options = {"pin": PinValue.of(pin), "pin_log": PinLog(Path(state))}
with InProcessDevice(DeviceSettings(Path(module), KeyUri.parse(uri)), **pin_options) as device:
    try:
        device.sign("RS256", a_grant())
        print("public" if device.key().public else "hidden")
    except HsmTollError as error:
        print(error.exit_code, error.code)
with InProcessDevice(DeviceSettings(Path(module), KeyUri.parse(uri)), **pin_options) as device:
    seen = device.inspect()
print(*[len(each.keys) for each in seen.tokens if each.problem is None and each.keys] or ["none"])
"""
)


@pytest.fixture(scope="module")
def key(toll_softhsm: SoftHsm) -> str:
    toll_softhsm.generate_key("odd", b"\x60")
    return "odd"


@pytest.mark.parametrize(
    ("odd", "output"),
    [
        (None, "public"),
        # CKA_SENSITIVE, CK_BBOOL: of four bytes, of none. What cannot be read is not protected.
        ("103:4", "30 key-exportable"),
        ("103:0", "30 key-exportable"),
        # CKA_SIGN, which python-pkcs11 reads of every key that it finds.
        ("108:4", "30 module-answer"),
        # CKA_PUBLIC_EXPONENT: one that no RSA key has tells nothing.
        ("122=1", "hidden"),
        ("122=2", "hidden"),
        # CKA_KEY_TYPE of no bytes.
        ("100:0", "30 key-type"),
    ],
)
def test_an_attribute_that_its_type_cannot_have_is_no_mistake_of_ours(
    toll_softhsm: SoftHsm, key: str, tmp_path: Path, odd: str | None, output: str
) -> None:
    module = stand_between(tmp_path / "odd", _ODD, C_GetAttributeValue="attributes")
    argv = map(str, (module, tmp_path / "state", toll_softhsm.uri(key), toll_softhsm.pin))
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *argv], env={**os.environ, **({"ODD": odd} if odd else {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[:1] == [output], done.stderr
    # To look round is never an error.
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("numbers", [(2**2047 + 1, 1), (2**2047 + 1, 2), (2**2047, 65537), (1, 3)])
def test_numbers_that_are_no_key_verify_nothing(numbers: tuple[int, int]) -> None:
    assert not RsaPublicKey(*numbers).verify("RS256", b"e30.e30", b"\1" * 256)


def test_a_device_that_becomes_another_is_told_by_what_changed(
    toll_softhsm: SoftHsm, key: str, tmp_path: Path
) -> None:
    module = stand_between(tmp_path / "renamed", _RENAMED, C_GetTokenInfo="info")
    uri = f"pkcs11:token={toll_softhsm.label};object={key}"
    argv = map(str, (module, tmp_path / "state", uri, toll_softhsm.pin))
    done = subprocess.run(
        [sys.executable, "-c", _USED_TWICE, *argv],
        env={**os.environ, "RENAMED": str(tmp_path / "now")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("device-changed "), done.stderr
    assert done.stdout.endswith("before: model 'another model', was 'SoftHSM v2'\n")
    assert "serial" not in done.stdout
