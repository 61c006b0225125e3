"""The status page of a signing host, as a real browser shows it."""

from __future__ import annotations

import html.parser
import http.client
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.errors import DeviceError
from tests.kit.browser import Browser, browser
from tests.kit.own_device import free_port
from tests.kit.signing_host import ME, PATIENCE, RunningHost, RunningService, entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: The text of the card with a heading.
CARD = """[...document.querySelectorAll('.card')].find(
    each => each.querySelector('h3').textContent.startsWith({!r})).innerText"""
#: The rows of the table below a heading, as lists of texts.
ROWS = """[...[...document.querySelectorAll('h2')].find(each => each.textContent === {!r})
    .nextElementSibling.querySelectorAll('tbody tr')].map(
        row => [...row.cells].map(cell => cell.textContent))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.fixture
def shown(make_host: Callable[..., RunningHost]) -> tuple[RunningHost, str]:
    """A host that was used, and the address of its page."""
    host, port = make_host(entry(ME, per_minute=30, per_day=4)), free_port()
    host.start(HSMTOLL_HOST__METRICS=f"127.0.0.1:{port}")
    assert host.ask().status == 200
    assert host.ask("/v1/token").status == 200
    assert host.ask(scope="air").status == 403
    return host, f"http://127.0.0.1:{port}/"


def page_of(url: str, method: str = "GET") -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=PATIENCE)
    try:
        connection.request(method, "/")
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


def test_a_browser_shows_the_state_of_the_host(
    shown: tuple[RunningHost, str], tab: Browser
) -> None:
    host, url = shown
    tab.open(url, width=1200)
    assert tab.value("document.querySelector('.state').textContent") == "Ready"
    acme = tab.value(CARD.format("acme"))
    for words in ("signs", "accepted", "days", "ends in", "sandbox, eseal"):
        assert words in acme
    days = int(acme.partition(" days")[0].split()[-1])
    assert 300 < days < 800
    assert "can be written" in tab.value(CARD.format("Audit"))
    assert "in force" in tab.value(CARD.format("Policy"))
    assert tab.value(ROWS.format("Quotas")) == [
        [ME, "acme", "2 of 30 a minute", ""],
        [ME, "acme", "2 of 4 a day", ""],
    ]
    assert tab.value("[...document.querySelectorAll('meter')].map(each => each.value)") == [
        0.067, 0.5,
    ]  # fmt: skip
    granted = tab.value(ROWS.format("Last grants and tokens"))
    assert [row[-1] for row in granted] == ["token", "signature for a token", "grant"]
    (refused,) = tab.value(ROWS.format("Last refusals"))
    assert refused[1:4] == [ME, "acme", "toll:eu/movement/air"]
    assert "is not allowed" in refused[4]
    host.faults.set("token-removed")
    assert host.ask().word == "device_down"
    host.say("nonsense = ")
    host.reload()
    tab.open(url, width=1200)
    assert tab.value("document.querySelector('.state').textContent") == "Not ready"
    assert "profile acme" in tab.value("document.querySelector('.why').innerText")
    assert "signs" not in tab.value(CARD.format("acme"))
    assert "the old policy is in force" in tab.value(CARD.format("Policy"))
    host.faults.clear()


def test_the_page_fits_every_screen_in_both_colour_schemes(
    shown: tuple[RunningHost, str], tab: Browser, tmp_path: Path
) -> None:
    host, url = shown
    for _ in range(3):
        host.ask()
    wider = "[...document.querySelectorAll('body *')].filter("
    wider += "each => each.getBoundingClientRect().right > innerWidth + 1).length"
    colour = "getComputedStyle(document.body).backgroundColor"
    colours = {}
    for dark in (False, True):
        for width in (360, 800, 1400):
            tab.open(url, width=width, dark=dark)
            assert tab.value("innerWidth") == width
            assert tab.value("document.documentElement.scrollWidth") == width
            assert tab.value(wider) == 0
            tab.screenshot(tmp_path / f"{width}-{'dark' if dark else 'light'}.png")
        colours[dark] = tab.value(colour)
    assert colours[False] != colours[True]
    # The control: without its style the page is wider than a telephone.
    tab.open(url, width=360)
    tab.value("document.querySelector('style').remove()")
    assert tab.value("document.documentElement.scrollWidth") > 360
    assert tab.value(wider) > 0


def test_the_page_asks_for_nothing_else_and_runs_nothing(
    shown: tuple[RunningHost, str], tab: Browser
) -> None:
    _, url = shown
    tab.open(url, width=800)
    assert tab.requested() == [url]
    assert tab.errors() == []
    # The controls: what its rules forbid is reported, be it a script, a style or an address.
    tab.value("document.body.append(Object.assign(document.createElement('script'),"
              "{textContent: 'window.ran = 1'}))")  # fmt: skip
    tab.value("document.body.setAttribute('style', 'margin: 9px')")
    tab.value("document.body.append(Object.assign(new Image(), {src: '/live'}))")
    assert tab.value("window.ran") is None
    assert tab.value("getComputedStyle(document.body).marginTop") != "9px"
    assert len(tab.errors()) >= 3
    response, text = page_of(url)
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert response.getheader("Cache-Control") == "no-store"
    assert "<script" not in text
    assert "style=" not in text
    assert "http" not in text.replace("http-equiv", "")
    head, nothing = page_of(url, "HEAD")
    assert (head.status, nothing) == (200, "")
    assert head.getheader("Content-Security-Policy") == response.getheader(
        "Content-Security-Policy"
    )
    assert page_of(url, "POST")[0].status == 405


class Tags(html.parser.HTMLParser):
    """The elements of a document, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_a_caller_or_a_device_writes_is_text_on_the_page(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<img src=x onerror=alert(1)>'\"&"
    profile = service.profile()
    monkeypatch.setattr(profile.health, "failure", str(DeviceError(evil)))
    monkeypatch.setattr(profile, "name", evil)
    record: dict[str, Any] = {"caller": evil, "profile": evil, "scope": evil}
    service.audit.append("refused", **record, outcome=evil)
    service.audit.append("release", **record, outcome="released")
    page = service.parts.status_page()
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;&#x27;&quot;&amp;") >= 8
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "img" not in tags.seen


def test_no_secret_is_on_the_page(shown: tuple[RunningHost, str], toll_eseal: Any) -> None:
    host, url = shown
    granted = host.ask()
    token = host.ask("/v1/token").body["access_token"]
    _, text = page_of(url)
    for secret in (granted.body["assertion"], token, token.rpartition(".")[2]):
        assert secret not in text
    assert f">{toll_eseal.device.pin}<" not in text
    assert "eyJ" not in text
    assert ME in text


def test_the_last_records_of_the_day_are_there_after_a_restart(
    shown: tuple[RunningHost, str],
) -> None:
    host, _ = shown
    assert host.end() == 0
    host.start()
    page = host.health("/").body["text"]
    assert page.count("is not allowed") == 1
    assert "signature for a token" in page
    # Only so many: a caller cannot make the page long.
    for _ in range(12):
        assert host.ask(scope="air").status == 403
    assert host.health("/").body["text"].count("is not allowed") == 8
