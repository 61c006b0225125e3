"""PIN sources: what they read, what they refuse, and that a PIN does not show itself."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import pty
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.pin import Pin, PinCommand, PinFile, PinPad, PinTerminal, PinValue
from tests.kit.own_device import ended
from tests.kit.signing_host import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CANARY = "4711-canary"


def pin_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "pin"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_pin_shows_where_it_came_from_and_never_itself() -> None:
    pin = PinValue.of(CANARY).read(device="lab")
    assert pin.reveal() == CANARY
    shown = f"{pin} {pin!r} {PinValue.of(CANARY)!r} {PinCommand('echo ' + CANARY)!r} {pin.origin}"
    assert CANARY not in shown
    assert "HSMTOLL_HSM__PIN" in shown
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(pin)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_pin_file_is_one_line(tmp_path: Path, ending: bytes) -> None:
    path = pin_file(tmp_path, b"12 34" + ending)
    assert PinFile(path).read(device="lab").reveal() == "12 34"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b"1234\n\n", b"1234\n5678\n", b"1" * 1025),
        *(b"\xff\xfe", b"12\xe634\n", b"\xef\xbb\xbf1234\n", "1234".encode("utf-16")),
    ],
)
def test_a_file_that_is_not_one_pin_is_refused_without_its_words(
    tmp_path: Path, content: bytes
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PinFile(pin_file(tmp_path, content)).read(device="lab")
    assert "1234" not in "".join(traceback.format_exception(caught.value))
    assert "HSMTOLL_HSM__PIN_FILE" in str(caught.value)


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_a_pin_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = pin_file(tmp_path, b"1234", mode)
    with pytest.raises(ConfigurationError) as caught:
        PinFile(path).read(device="lab")
    assert caught.value.code == "pin-file-writable"
    path.chmod(0o600)
    assert PinFile(path).read(device="lab").reveal() == "1234"


def test_a_pin_file_that_others_may_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        PinFile(pin_file(tmp_path, b"1234", 0o600)).read(device="lab")
        assert not caplog.records
        PinFile(pin_file(tmp_path, b"1234", 0o644)).read(device="lab")
    assert "can be read by everybody" in caplog.text
    assert "1234" not in caplog.text


def test_links_are_followed_as_kubernetes_lays_secrets_out(tmp_path: Path) -> None:
    day = tmp_path / "..2026_01_01"
    day.mkdir()
    pin_file(day, b"1234\n", 0o400)
    (tmp_path / "..data").symlink_to(day.name)
    (tmp_path / "pin").symlink_to("..data/pin")
    assert PinFile(tmp_path / "pin").read(device="lab").reveal() == "1234"


def test_a_corrected_file_is_another_origin(tmp_path: Path) -> None:
    path = pin_file(tmp_path, b"1234")
    before = PinFile(path).read(device="lab").origin
    assert PinFile(path).read(device="lab").origin == before
    os.utime(path, ns=(1, 1))
    assert PinFile(path).read(device="lab").origin != before


@contextlib.contextmanager
def written_to(path: Path, data: bytes, *, closes: bool = True) -> Iterator[None]:
    """A process that writes *data* into *path*, and closes it or not."""
    program = f"cat >&3; {'exec 3>&-;' if closes else ''} echo written; exec sleep 60"
    process = subprocess.Popen(
        ["sh", "-c", f'exec 3>"$0"; {program}', str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(data)
        yield
    finally:
        process.kill()
        process.wait()


def test_a_named_pipe_brings_a_pin_as_a_file_does(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pin", 0o600)
    with written_to(tmp_path / "pin", b"1234\n"):
        assert PinFile(tmp_path / "pin").read(device="lab").reveal() == "1234"
    with written_to(tmp_path / "pin", b"1234\n5678\n"), pytest.raises(ConfigurationError):
        PinFile(tmp_path / "pin").read(device="lab")


def test_a_pipe_that_nobody_writes_to_or_closes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pin", 0o600)
    with pytest.raises(ConfigurationError, match=r"within 0\.2 s") as caught:
        PinFile(tmp_path / "pin", timeout=0.2).read(device="lab")
    assert caught.value.code == "pin-source"
    with (
        written_to(tmp_path / "pin", b"1234\n", closes=False),
        pytest.raises(ConfigurationError, match="not all of it came"),
    ):
        PinFile(tmp_path / "pin", timeout=0.2).read(device="lab")


def test_a_pipe_that_others_may_write_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pin")
    (tmp_path / "pin").chmod(0o620)
    with written_to(tmp_path / "pin", b"9999\n"), pytest.raises(ConfigurationError) as caught:
        PinFile(tmp_path / "pin").read(device="lab")
    assert caught.value.code == "pin-file-writable"


def test_a_missing_file_and_a_directory_are_said_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigurationError) as caught:
            PinFile(path).read(device="lab")
        assert str(path) in str(caught.value)
        assert caught.value.code == "pin-source"


def test_a_command_is_an_argv_without_a_shell() -> None:
    assert PinCommand("printf '%s' '12 34;$HOME'").read(device="lab").reveal() == "12 34;$HOME"


def test_a_command_gets_no_variable_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__PIN", CANARY)
    monkeypatch.setenv("hsmtoll_proxy", CANARY)
    monkeypatch.setenv("OTHER", "kept")
    program = (
        "import os; print(sum('HSMTOLL' in k.upper() for k in os.environ), os.environ['OTHER'])"
    )
    assert PinCommand(f'{sys.executable} -c "{program}"').read(device="lab").reveal() == "0 kept"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "is not a command line"),
        ("'", "is not a command line"),
        ("/nowhere/at/all 4711-canary", "cannot be started"),
        (f"{sys.executable} -c 'import sys; sys.exit(3)' 4711-canary", "exit code 3"),
        (f"{sys.executable} -c 'print()'", "is empty"),
        # Without an end: nothing of it is kept, and it is not waited for.
        ("yes 4711-canary", "prints more than 1024 bytes"),
    ],
)
def test_a_command_that_fails_is_said_without_its_argv(command: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PinCommand(command).read(device="lab")
    assert message in str(caught.value)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "command",
    ["/nowhere 4711-canary", "sleep 60 4711-canary", "'4711-canary", "yes 4711-canary"],
)
def test_no_exception_behind_the_one_raised_carries_the_command(command: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PinCommand(command, timeout=0.2).read(device="lab")
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_no_exception_behind_the_one_raised_carries_the_files_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not UTF-8") as caught:
        PinFile(pin_file(tmp_path, b"4711-canary\xff")).read(device="lab")
    assert caught.value.__context__ is None


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = tmp_path / "hang.sh"
    script.write_text(f"sleep 60 & echo $! > {pids}; wait\n")
    with pytest.raises(ConfigurationError, match=r"within 0\.5 s"):
        PinCommand(f"sh {script}", timeout=0.5).read(device="lab")
    # The kernel ends a killed process in its own time.
    eventually(lambda: ended(int(pids.read_text())))


@pytest.mark.parametrize("value", ["12\udce634", "\ufeff1234"])
def test_a_setting_that_cannot_be_the_pin_is_refused_before_anything_is_tried(value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PinValue.of(value)
    assert caught.value.code == "pin-source"
    assert "34" not in str(caught.value)
    # Letters beyond ASCII are no mistake, and a mark inside is somebody's passphrase.
    assert PinValue.of("12æ\ufeff34").read(device="lab").reveal() == "12æ\ufeff34"


def test_the_terminal_is_asked_even_when_stdin_is_data() -> None:
    program = (
        "from hsmtoll.hsm.pin import PinTerminal\n"
        "pin = PinTerminal().read(device='lab')\n"
        "print('got', len(pin.reveal()), repr(pin), file=open(3, 'w'))"
    )
    read, write = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(write, 3)
        os.execv(sys.executable, [sys.executable, "-c", program])  # noqa: S606 - the child of a pty
    os.close(write)
    asked = b""
    while b"PIN of lab:" not in asked:
        asked += os.read(terminal, 100)
    os.write(terminal, b"123456\n")
    with os.fdopen(read) as answer:
        assert answer.read().startswith("got 6 Pin(from HSMTOLL_HSM__PIN_PROMPT=terminal)")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (b"12\xe6\n", "not UTF-8, no trace"),
        ("12æ\n".encode(), "12æ"),
        # What no file may hold is taken as it is typed.
        (b" 12 \n", " 12 "),
        (b'"12"\n', '"12"'),
        (b"PIN=12\n", "PIN=12"),
    ],
)
def test_what_is_typed_is_utf8_or_is_refused_without_its_bytes(typed: bytes, message: str) -> None:
    program = (
        "from hsmtoll.errors import ConfigurationError\n"
        "from hsmtoll.hsm.pin import PinTerminal\n"
        "out = open(3, 'w', encoding='utf-8')\n"
        "try: print(PinTerminal().read(device='lab').reveal(), file=out)\n"
        "except ConfigurationError as error:\n"
        "    trace = 'a trace' if error.__context__ or error.__cause__ else 'no trace'\n"
        "    print(str(error).rpartition(' is ')[2], trace, sep=', ', file=out)"
    )
    read, write = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(write, 3)
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-c", program])  # noqa: S606 - the child of a pty
    os.close(write)
    asked = b""
    while b"PIN of lab:" not in asked:
        asked += os.read(terminal, 100)
    os.write(terminal, typed)
    with os.fdopen(read, encoding="utf-8") as answer:
        assert answer.read() == f"{message}\n"
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_without_a_terminal_nobody_is_asked() -> None:
    program = (
        "from hsmtoll.hsm.pin import PinTerminal\n"
        "try: PinTerminal().read(device='lab')\n"
        "except Exception as error: print(type(error).__name__, error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="1234\n",
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    assert done.stdout == "ConfigurationError pin-source\n"
    assert isinstance(PinTerminal(), PinTerminal)


def test_a_pinpad_has_no_value_to_lose() -> None:
    pin = PinPad().read(device="lab")
    assert pin.on_pinpad
    assert pin.reveal() is None
    assert not Pin("1234", source="x").on_pinpad


UNLIKELY = [
    *("482913 ", " 482913", "482913\t", "482913\u00a0", "482913\u200b"),
    *('"482913"', "'482913'", "\u201c482913\u201d"),
    *("PIN=482913", "pin = 482913", "export HSMTOLL_HSM__PIN=482913", "PIN: 482913"),
    *("user_pin=482913", "482913 # of the lab"),
]
#: Passphrases and access keys that look a little like it.
LIKELY = [
    *("two words", "a=b", "operator:482913", "pin:482913", "c2VjcmV0cGlu=", "c2VjcmV0PIN=="),
    *('"', "it's", "'a", "p\u00e5ssord", "room #12"),
]


@pytest.mark.parametrize("pin", UNLIKELY)
def test_a_pin_that_was_probably_not_meant_so_is_refused_before_it_costs_a_try(
    tmp_path: Path, pin: str
) -> None:
    written = pin_file(tmp_path, f"{pin}\n".encode())
    # `cat` of the file, so that no shell takes quotes away.
    for source in (PinFile(written), PinCommand(f"cat {written}")):
        with pytest.raises(ConfigurationError, match="it was not tried") as caught:
            source.read(device="lab")
        assert caught.value.code == "pin-form"
        assert "HSMTOLL_HSM__PIN_PROMPT=terminal" in str(caught.value.hint)
        assert "482913" not in f"{caught.value} {caught.value.hint}"
    with pytest.raises(ConfigurationError, match="it was not tried"):
        PinValue.of(pin)


@pytest.mark.parametrize("pin", LIKELY)
def test_a_passphrase_is_taken_as_it_is(tmp_path: Path, pin: str) -> None:
    assert PinFile(pin_file(tmp_path, pin.encode())).read(device="lab").reveal() == pin
    assert PinValue.of(pin).read(device="lab").reveal() == pin


def test_a_command_that_needs_a_shell_is_told_that_there_is_none(tmp_path: Path) -> None:
    written = pin_file(tmp_path, b"482913x\n")
    with pytest.raises(ConfigurationError, match="run without a shell") as caught:
        PinCommand(f"echo `cat {written}` | tr -d x").read(device="lab")
    assert "sh -c" in str(caught.value.hint)
    with pytest.raises(ConfigurationError, match="exit code 1") as caught:
        PinCommand("cat $HOME/pin").read(device="lab")
    assert "run without a shell" in str(caught.value.hint)
    # The control: the shell that the hint names.
    shell = PinCommand(f"sh -c 'cat {written} | tr -d x'")
    assert shell.read(device="lab").reveal() == "482913"


def test_a_command_below_a_home_is_told_that_a_tilde_is_not_expanded() -> None:
    for command, says in (("~/bin/pin", "cannot be started"), ("cat ~/pin", "exit code 1")):
        with pytest.raises(ConfigurationError, match=says) as caught:
            PinCommand(command).read(device="lab")
        assert caught.value.hint == "~ is not expanded here; write the whole path"
    with pytest.raises(ConfigurationError) as caught:
        PinCommand("false").read(device="lab")
    assert caught.value.hint is None
