"""What the README and its pages state as a list or a table is what the code has."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

import hsmtoll
from hsmtoll import errors
from hsmtoll.cli import main
from hsmtoll.hsm.makers import MAKERS
from hsmtoll.settings import Settings, load, profiles, variable
from hsmtoll.testing.faults import NAMES
from hsmtoll.tokens.mp_codes import REFUSALS
from tests.benchmarks.stage import Row, table
from tests.kit.readers import DOCS, README, TOP, blocks, headings, manual, pages, section

if TYPE_CHECKING:
    from pathlib import Path

FIGURES: Final = TOP / "tests" / "benchmarks" / "figures"


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in *text*, without heads, rules and code marks."""
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\| (?!---).*\|$", text, re.MULTILINE)
    ]


def variables() -> set[str]:
    """Every variable that settings know."""
    found = {"HSMTOLL_CONFIG", "HSMTOLL_PROFILE"}
    for name, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found |= {variable(name, sub) for sub in inner} if inner else {variable(name)}
    return found


def test_the_list_of_commands_is_the_commands_own() -> None:
    shown = CliRunner().invoke(main, ["--help"], prog_name="hsmtoll", terminal_width=78).output
    listed = shown[shown.index("Set up:") : shown.index("Examples:")]
    assert f"…\n{listed}…\n```" in section("Commands")


def sample(name: str) -> str:
    """The TOML block that begins with the file's name."""
    (found,) = (
        each.text
        for each in blocks(manual(), "toml")
        if re.match(rf"# {re.escape(name)}[:\n]", each.text)
    )
    return found


def test_the_sample_of_a_configuration_file_works_with_and_without_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.upper().startswith("HSMTOLL_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "hsmtoll.toml"
    path.write_text(sample("hsmtoll.toml"))
    plain = load(config=path)
    assert (plain.environment, plain.identity) == ("test", "eseal")
    assert plain.hsm.key == ("pkcs11:token=customs;object=acme-2026",)
    monkeypatch.setenv("HSMTOLL_PROFILE", "prod")
    prod = load(config=path)
    assert (prod.environment, prod.hsm.module) == ("prod", plain.hsm.module)
    assert prod.hsm.key == ("pkcs11:token=customs;object=acme-2027",)
    assert profiles(path) == ("prod",)
    monkeypatch.delenv("HSMTOLL_PROFILE")
    with hsmtoll.connect(config=path, profile="prod") as toll:
        # Opens nothing: there is no such device here.
        assert toll.status().signatures == 0
    with pytest.raises(hsmtoll.ConfigurationError, match="profile other"):
        hsmtoll.connect(config=path, profile="other")


def test_the_sample_with_a_proxy_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "hsmtoll.toml"
    path.write_text(sample("proxy.toml"))
    proxy = load(config=path).proxy
    assert proxy is not None
    assert proxy.get_secret_value() == "http://proxy.acme.example:3128"


def test_no_variable_is_named_that_does_not_exist() -> None:
    named = set(re.findall(r"HSMTOLL_[A-Z0-9_]*[A-Z0-9]", manual()))
    # A misspelt one, and one that Kubernetes sets.
    assert named - {"HSMTOLL_ENVIROMENT", "HSMTOLL_PORT"} <= variables()


def test_the_exit_codes_are_those_of_the_classes() -> None:
    stated = {(int(code), name) for code, name, _ in rows(section("Exit codes"))[1:]}
    classes = {
        (getattr(errors, name).exit_code, name) for name in errors.__all__ if name != "HsmTollError"
    }
    assert stated == {(0, "-"), *classes}


def test_the_codes_of_maskinporten_are_the_table_of_refusals() -> None:
    stated = rows(section("Codes of Maskinporten"))[1:]
    assert stated == [[row.code, row.meaning, row.who, row.do] for row in REFUSALS.values()]


def test_every_code_of_ours_that_is_explained_exists() -> None:
    stated = [cells[0] for cells in rows(section("Frequent codes"))[1:]]
    source = "".join(path.read_text("utf-8") for path in (TOP / "hsmtoll").rglob("*.py"))
    assert len(stated) > 10
    assert [code for code in stated if f'"{code}"' not in source] == []


def test_the_readme_is_short_and_lists_every_page() -> None:
    assert len(pages()["README"].splitlines()) <= 250
    listed = re.findall(r"\(hsmtoll/docs/([\w-]+)\.md\)", section("Where to read on"))
    assert sorted(listed) == sorted(set(pages()) - {"README"})


def anchors(text: str) -> set[str]:
    """What a forge calls the headings of a page."""
    titles = (title.lower() for _, _, title in headings(text))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> list[str]:
    """
    The links of a page that lead nowhere. From a page in the wheel, they lead to pages beside it.
    """
    broken = []
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)]*)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        ours = target == path or target.parent == DOCS
        if not (ours and target.is_file()) or (
            anchor and anchor not in anchors(target.read_text("utf-8"))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", [README, *sorted(DOCS.glob("*.md"))], ids=lambda path: path.stem)
def test_every_link_of_a_page_leads_to_a_page_and_a_heading(path: Path) -> None:
    text = path.read_text("utf-8")
    assert broken_links(path, text) == []
    # The controls: a page, a heading and a place outside of the wheel that are not there.
    wrong = ["nothing.md", "#nothing", "../../tests/readers.py"]
    assert broken_links(path, "".join(f"[x]({each})" for each in wrong)) == wrong


def test_the_table_of_speed_is_that_of_the_run_whose_figures_are_kept() -> None:
    kept = json.loads((FIGURES / "bench.json").read_text(encoding="utf-8"))
    shown = section("Speed")
    named = {each.name for each in fields(Row)}
    runs = [Row(**{name: row[name] for name in named}) for row in kept["rows"]]
    assert "\n".join(table(runs)) in shown
    # The control: a figure that was touched up is not in it.
    better = [replace(runs[0], ours=runs[0].ours * 1.2), *runs[1:]]
    assert "\n".join(table(better)) not in shown


def test_each_plot_of_speed_is_there_and_runs_nothing() -> None:
    named = [
        (path.parent / name).resolve()
        for path in (README, *DOCS.glob("*.md"))
        for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", path.read_text("utf-8"))
    ]
    assert set(named) == set(FIGURES.glob("*.svg"))
    for path in named:
        tags = [each.tag for each in ET.parse(path).iter()]  # noqa: S314 - our own
        assert sum(tag.endswith("}circle") for tag in tags) > 4
        assert not any(tag.endswith("}script") for tag in tags)


def test_the_extras_are_those_of_the_project_and_hints_name_no_other() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    assert {cells[0] for cells in rows(section("Ways to install"))[1:]} == extras
    source = "".join(path.read_text("utf-8") for path in (TOP / "hsmtoll").rglob("*.py"))
    hinted = set(re.findall(r"install_extra\(['\"](\w+)['\"]\)", source))
    # Who passes an auth to a client of httpx2 has that library.
    assert hinted == extras - {"httpx2"}


def test_the_wheel_that_is_named_is_of_this_version() -> None:
    version = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    named = set(re.findall(r"hsmtoll-([\d.]+)-py3-none-any\.whl", manual()))
    assert named == {version}


def test_the_modules_that_the_readme_calls_tested_are_those_that_ran() -> None:
    devices = pages()["devices"]
    first, second = devices.split("## A key, and where")
    known = {cells[0]: cells[1] for cells in rows(first)[1:]}
    assert {word.split()[0] for word in known.values()} == {"ran", "imitated", "read"}
    ran = [name for name, word in known.items() if word.startswith("ran")]
    found = re.search(r"tested with (.*?)\.\n", pages()["README"], re.DOTALL)
    assert found
    assert re.split(r", (?:and )?", " ".join(found[1].split())) == ran
    # Who is called imitated is so by what the row names: faults are those that tests set.
    tests = "".join(path.read_text("utf-8") for path in (TOP / "tests" / "softhsm").rglob("*.py"))
    for word in (word for word in known.values() if word.startswith("imitated")):
        assert re.fullmatch(r"imitated \(.+\)", word)
        for fault in re.findall(r"`(.+?)`", word):
            assert fault in NAMES
            assert f'"{fault}"' in tests
    # Both tables have the same modules, and a maker whose variable is hinted at has a row.
    assert [cells[0] for cells in rows(second)[1:]] == list(known)
    assert {
        maker.name for maker in MAKERS if not any(maker.name in name for name in known)
    } == set()


def test_each_sample_with_a_pin_says_where_refused_pins_are_remembered() -> None:
    samples = {
        block.text for block in blocks(manual()) if re.search("pin_file|PIN_FILE=", block.text)
    }
    for path in (
        *TOP.glob("docker/compose*.yml"),
        *TOP.glob("docker/kubernetes/signing-host.yaml"),
        *TOP.glob("hsmtoll/host/systemd/*.service"),
    ):
        text = path.read_text("utf-8")
        # What is laid over another file has its settings from there.
        if path.name != "compose.test.yml" and re.search("pin_file|PIN_FILE", text):
            samples.add(text)
    assert len(samples) >= 6
    wanted = re.compile(
        r"^\s*(?:state = |HSMTOLL_STATE: |- {name: HSMTOLL_STATE, )|HSMTOLL_STATE=", re.MULTILINE
    )
    assert [sample for sample in samples if not wanted.search(sample)] == []
