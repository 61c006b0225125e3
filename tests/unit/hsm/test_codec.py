"""Values between a device and its worker: whole, by their types, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hsmtoll.errors import DeviceError, HsmTollError, PinNotTried
from hsmtoll.hsm.codec import decode, encode, hints
from hsmtoll.hsm.device import Device
from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, Stored, StoredCertificate
from hsmtoll.hsm.pin_log import TokenUser
from hsmtoll.hsm.pipe import Opening, Reply
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey, SigningInput
from tests.kit.doctor_cases import key_facts, token_facts

BIG = RsaPublicKey((1 << 16384) - 1, 65537)
ODD = StoredCertificate(bytes(range(256)), "å b;/\n\0", b"", "it has no value on the device")
LOCKED = PinNotTried("the PIN is locked", hint="one\ntwo", code="pin-locked", retry_after=1.5)


@dataclass(frozen=True)
class Flags:
    """What no value of a device has, and one may have some day."""

    whole: int
    part: float
    answered: bool | None
    names: frozenset[str] = frozenset()


def crossed(kind: Any, value: Any) -> Any:
    return decode(kind, json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (KeyFacts, key_facts(public=BIG, firmware=(2, 0), warnings=("key-imported",))),
        (KeyFacts, key_facts(public=None, bits=None, sign=None, mechanisms=frozenset())),
        (tuple[StoredCertificate, ...], (ODD, StoredCertificate(b"", "", b"\xff\x00"))),
        (Stored, Stored((b"a", b"b"), (), (b"",), (b"\x80",))),
        (tuple[TokenUser, ...], (TokenUser("maker", "model", "1", "label"),)),
        (Flags, Flags(1 << 60, 1.0, None, frozenset({"a", "b"}))),
        (RsaPublicKey | None, None),
        (SigningInput, SigningInput(b"eyJ9.e30")),
        (dict[str, str | bool | None], {"kid": None, "timed": True, "policy": "/etc/p.toml"}),
        (Path, Path("/usr/lib/module.so")),
        (KeyUri, KeyUri(token="lab", id=b"\x00\xff", library_version=(2, 40))),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_value_is_the_same_on_the_other_side(kind: Any, value: Any) -> None:
    assert crossed(kind, value) == value


def test_so_is_one_with_an_error_in_it() -> None:
    facts = ModuleFacts(
        path="/m.so",
        manufacturer="Maker",
        description="Module",
        version=(1, 0),
        cryptoki=(3, 1),
        tokens=(token_facts(keys=(key_facts(),), certificates=((KeyUri(token="lab"), ODD),)),),
        login=LOCKED,
    )
    came: ModuleFacts = crossed(ModuleFacts, facts)
    assert came.tokens == facts.tokens
    error = came.login
    assert type(error) is PinNotTried
    for name in ("hint", "code", "retryable", "retry_after", "signed", "scope", "who"):
        assert getattr(error, name) == getattr(LOCKED, name)
    assert str(error) == str(LOCKED)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (int, True),
        (int, 1.5),
        (int, "0xg"),
        (bool, 1),
        (bool, None),
        (str, 1),
        (bytes, "\u0100"),
        (bytes, [1]),
        (tuple[int, int], [1]),
        (tuple[int, int], [1, 2, 3]),
        (tuple[int, ...], {"0": 1}),
        (frozenset[str], "ab"),
        (str | None, 0),
        (dict[str, str | bool | None], {"a": 1}),
        (RsaPublicKey, {"modulus": 3}),
        (RsaPublicKey, {"modulus": 3, "exponent": 3, "private": 3}),
        (RsaPublicKey, [3, 3]),
        (KeyFacts, {}),
        (HsmTollError, "words"),
        (Opening, None),
    ],
)
def test_what_is_no_value_of_the_type_is_an_error(kind: Any, data: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        decode(kind, data)


def test_an_error_of_no_class_of_ours_is_one_of_the_device() -> None:
    data = {"class": "SystemExit", "message": "gone", "code": "worker"}
    error = decode(HsmTollError, data)
    assert type(error) is DeviceError
    assert str(error) == "gone"


def test_every_question_and_answer_of_a_device_has_types_that_cross() -> None:
    """None of its methods returns or takes what only its own process could hold."""
    asked = {name for name, each in vars(Device).items() if callable(each) and name[0] != "_"}
    assert asked >= {"certificates", "key", "sign", "generate", "inspect", "token_users", "close"}
    for name in asked:
        for kind in hints(getattr(Device, name)).values():
            # One that is no value of the type either way: it is judged, and not let through.
            with pytest.raises((TypeError, ValueError)):
                decode(kind, {"no": object()})
    assert hints(Reply)["error"] == HsmTollError | None
