"""hsmtoll's commands and a program that lives on, on real stacks, in the process and isolated."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from hsmtoll.sandbox import pki
from tests.modules.conftest import CARDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.modules.conftest import Driver, Smartcard, Stack

pytestmark = pytest.mark.timeout(300)

COMMANDS = (
    ["objects"],
    ["chain"],
    ["sign", "road"],
    ["token", "road"],
    ["doctor", "--online"],
)

_HIDE = """
import sys, pkcs11
from pkcs11 import Attribute as A, ObjectClass
module, token, pin, become = sys.argv[1:]
kept = (A.CLASS, A.CERTIFICATE_TYPE, A.TOKEN, A.LABEL, A.ID, A.SUBJECT, A.ISSUER, A.SERIAL_NUMBER,
        A.VALUE)
with pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    for one in list(session.get_objects({A.CLASS: ObjectClass.CERTIFICATE})):
        copy = {name: one[name] for name in kept}
        one.destroy()
        if become == "private":
            session.create_object({**copy, A.PRIVATE: True})
"""


@pytest.fixture(params=["none", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def code(program: Driver, *argv: str) -> int:
    """The exit code of a command, which prints nothing that only its authors understand."""
    done = program.does("command", argv=argv)
    assert "Traceback" not in done["err"], done["err"]
    assert "Exception ignored" not in done["err"], done["err"]
    return int(done["exit"])


def test_every_command_and_a_program_work_with_it(
    stack: Stack, tmp_path: Path, isolation: str
) -> None:
    chain = {"HSMTOLL_HSM__CERTIFICATES": str(stack.certificates())}
    with stack.program(tmp_path, isolation, **chain) as program:
        assert {code(program, *argv) for argv in COMMANDS} == {0}
        assert program.does("token")
        assert program.does("chain") == 3


def test_neither_another_key_nor_a_certificate_for_another_key_is_taken(
    stack: Stack, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.pem"
    other = rsa.generate_private_key(65537, 2048).public_key()
    foreign.write_bytes(pki.pem(stack.authority.issue(other), *stack.authority.chain))
    chain = {"HSMTOLL_HSM__CERTIFICATES": str(foreign)}
    absent = {"HSMTOLL_HSM__KEY": stack.uri.replace("object=k", "object=x").replace("%01", "%07")}
    with stack.program(tmp_path, "none", **chain, **absent) as program:
        assert program.error("token")["code"] == "key-missing"
    if not stack.stores_leaf:
        with stack.program(tmp_path, "none", **chain) as program:
            assert program.error("token")["code"] == "certificate-missing"
            assert code(program, "chain") == 40


def test_a_wrong_pin_is_tried_once_by_isolated_commands(stack: Stack, tmp_path: Path) -> None:
    chain = {"HSMTOLL_HSM__CERTIFICATES": str(stack.certificates())}
    stack.unblock()
    with stack.program(tmp_path, "process", pin=stack.wrong_pin, **chain) as program:
        assert code(program, "sign", "road") == 20
        assert code(program, "token", "road") == 21
        assert program.error("token")["exit"] == 21
    with stack.program(tmp_path, "process", **chain) as program:
        assert program.does("token")
    stack.unblock()


def test_it_signs_on_after_other_code_in_the_process_logged_out(
    stack: Stack, tmp_path: Path
) -> None:
    chain = {"HSMTOLL_HSM__CERTIFICATES": str(stack.certificates())}
    with stack.program(tmp_path, "none", **chain) as program:
        assert program.does("sign")
        assert program.does("logout") == 1
        assert program.does("sign")
        assert program.does("token")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_another_program_reset_signs_again(
    stacks: Callable[[str], Stack], tmp_path: Path, isolation: str, name: str
) -> None:
    card: Smartcard = stacks(name)  # type: ignore[assignment]  # as it is named
    configuration = tmp_path / "opensc.conf"
    configuration.write_text("app default { framework pkcs15 { use_pin_caching = false; } }\n")
    settings = {
        "HSMTOLL_HSM__CERTIFICATES": str(card.certificates()),
        "OPENSC_CONF": str(configuration),
    }
    with card.program(tmp_path, isolation, **settings) as program:
        assert program.does("sign")
        # Once: ykcs11 then keeps the card to itself until it is closed.
        card.restart()
        assert program.does("token")


@pytest.mark.parametrize("name", ["softhsm", "p11-kit", "p11-kit-proxy", "opencryptoki"])
def test_certificates_that_show_after_the_login_alone_are_found(
    stacks: Callable[[str], Stack], tmp_path: Path, isolation: str, name: str
) -> None:
    stack = stacks(name)
    with stack.program(tmp_path, isolation) as program:
        assert code(program, "chain") == 40
        assert code(program, "key", "import", str(stack.certificates())) == 0
        assert certificates(stack) == 3
        token = stack.uri.partition("token=")[2].partition(";")[0]
        arguments = (str(stack.module), token, stack.pin)
        try:
            stack.run(sys.executable, "-c", _HIDE, *arguments, "private")
            assert certificates(stack) == 0
            assert {code(program, *argv) for argv in COMMANDS} == {0}
            assert program.does("token")
        finally:
            stack.run(sys.executable, "-c", _HIDE, *arguments, "gone")


def certificates(stack: Stack) -> int:
    """How many another tool sees without a login."""
    listed = stack.run("pkcs11-tool", "--module", str(stack.module), "-O", "--type", "cert")
    return listed.count("Certificate Object")


@pytest.mark.parametrize("name", ["piv", "ykcs11"])
def test_a_key_that_wants_the_pin_for_each_signature_is_given_it(
    stacks: Callable[[str], Stack], tmp_path: Path, isolation: str, name: str
) -> None:
    stack = stacks(name)
    chain = {"HSMTOLL_HSM__CERTIFICATES": str(stack.certificates())}
    signing = {**chain, "HSMTOLL_HSM__KEY": "pkcs11:id=%02"}
    with stack.program(tmp_path, isolation, **signing) as program:
        assert [program.does("sign") for _ in range(3)] == [True] * 3
        assert code(program, "token", "road") == 0
    wrong = tmp_path / "wrong"
    wrong.write_text(stack.wrong_pin)
    wrong.chmod(0o600)
    # The control: without it there is no signature.
    given = {**signing, "HSMTOLL_HSM__SIGNING_PIN_FILE": str(wrong)}
    with stack.program(tmp_path, isolation, **given) as program:
        assert [program.error("sign")["exit"] for _ in range(2)] == [20, 21]
    stack.unblock()
