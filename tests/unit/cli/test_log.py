"""Lines on stderr: text or JSON, with journald's priorities, and none that a caller can forge."""

from __future__ import annotations

import json
import logging
import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.cli import log
from hsmtoll.cli.log import StderrHandler, say, use_format

if TYPE_CHECKING:
    from collections.abc import Iterator

_JWT = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJhIn0.c2lnbmF0dXJl"
_FORGED = "road\nhsmtoll: error: forged\r\x1b[2J\u2028<0>forged\x85\u202e\x00"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    one = logging.getLogger("hsmtoll.host.of-a-test")
    handler = StderrHandler()
    one.addHandler(handler)
    one.setLevel(logging.DEBUG)
    one.propagate = False
    yield one
    one.removeHandler(handler)
    use_format(None)


def in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{seen.st_dev}:{seen.st_ino}")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.split("\n")[:-1]


def objects(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(capsys)]


def test_text_is_the_default_and_a_record_is_one_line(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    use_format(None)
    logger.warning("refused: %s", "uid:1", extra={"event": "refused", "caller": "uid:1"})
    say("signing host: ready", event="ready")
    say("not there", level=logging.ERROR, code="key-missing", hints=("look", "twice"))
    assert lines(capsys) == [
        "hsmtoll: warning: refused: uid:1",
        "hsmtoll: signing host: ready",
        "hsmtoll: key-missing: not there",
        "hint: look",
        "hint: twice",
    ]


def test_json_has_the_members_that_are_known_and_no_other(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    use_format("json")
    extra = {"event": "refused", "profile": "acme", "caller": "uid:1", "jti": "j", "trace": None}
    logger.warning("refused: %s", "uid:1", extra=extra)
    logger.info("plain")
    say("not there", level=logging.ERROR, code="key-missing", hints=("look", "twice"), trace="t")
    refused, plain, error = objects(capsys)
    when = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
    assert all(when.fullmatch(each.pop("time")) for each in (refused, plain, error))
    assert refused == {
        "level": "warning", "event": "refused", "message": "refused: uid:1", "profile": "acme",
        "caller": "uid:1", "jti": "j",
    }  # fmt: skip
    assert plain == {"level": "info", "event": "host.of-a-test", "message": "plain"}
    assert error == {
        "level": "error", "event": "key-missing", "message": "not there", "hint": "look\ntwice",
        "trace": "t",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["text", "json"])
@pytest.mark.parametrize("journal", [False, True])
def test_no_text_of_others_begins_a_line_or_reaches_the_terminal(
    logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    journal: bool,
) -> None:
    if journal:
        in_the_journal(monkeypatch)
    use_format(name)
    logger.warning("scope %s", _FORGED, extra={"event": "refused", "caller": _FORGED})
    (line,) = lines(capsys)
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    assert line.startswith("<4>" * journal + ("{" if name == "json" else "hsmtoll: warning: "))
    assert line.count("<4>") == journal


@pytest.mark.parametrize("name", ["text", "json"])
def test_a_jwt_is_left_out_of_message_and_members_and_no_traceback_is_written(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    use_format(name)
    members = dict.fromkeys(("profile", "caller", "jti", "trace"), _JWT)
    try:
        int(_JWT)
    except ValueError:
        logger.exception("answer: %s", _JWT, extra={"event": "token-request", **members})
    (line,) = lines(capsys)
    assert "eyJ" not in line
    assert "ValueError" not in line
    assert "answer: " in line


def test_each_level_has_its_priority_if_stderr_is_the_journals(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_journal(monkeypatch)
    use_format(None)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logger.log(level, "x")
    say("not there", level=logging.ERROR, code="key-missing", hints=("look",))
    assert [line[:3] for line in lines(capsys)] == ["<7>", "<6>", "<4>", "<3>", "<3>", "<3>", "<3>"]
    # The control: inherited by a child whose stderr is elsewhere.
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    use_format(None)
    say("x")
    assert lines(capsys) == ["hsmtoll: x"]


def test_a_daemon_logs_what_it_does_without_v_and_more_with_it() -> None:
    one = logging.getLogger("hsmtoll.host.quiet")
    one.setLevel(logging.WARNING)
    log.at_least_info(one.name)
    assert one.level == logging.INFO
    one.setLevel(logging.DEBUG)
    log.at_least_info(one.name)
    assert one.level == logging.DEBUG
