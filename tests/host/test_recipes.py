"""
The programs of docs/recipes.md are run as they stand there, against a signing host that the page
starts, over its socket and over TLS: they print 200, and nothing else gets through.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Final

import pytest

from tests.kit.recipes import PAGE, PROGRAMS, RUNS, Reader, Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Debian's packages of the tools.
PACKAGES: Final = {
    "sh": "curl jq", "node": "nodejs", "java": "default-jdk-headless", "go": "golang-go",
}  # fmt: skip


def runs(chosen: Iterable[Run]) -> list[object]:
    return [
        pytest.param(
            each,
            id=f"{each.tool}-{'tls' if each.over_tls else 'socket'}-{number}",
            marks=pytest.mark.skipif(
                shutil.which({"sh": "jq"}.get(each.tool, each.tool)) is None,
                reason=f"apt-get install {PACKAGES[each.tool]}",
            ),
        )
        for number, each in enumerate(chosen)
    ]


over_tls = pytest.mark.parametrize("run", runs(each for each in RUNS if each.over_tls))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader.at_work(tmp_path_factory.mktemp("recipes")) as one:
        yield one


def refused(reader: Reader, run: Run, setting: str) -> str:
    """What is printed with another *setting*: the program ends with 1, and without 200."""
    # In a shell of its own, so that the next run has the page's settings.
    code, output = reader.terminal.run(f"({setting}; {run.command})")
    assert code == 1, output
    assert "200" not in output.splitlines()
    return output


@pytest.mark.parametrize("run", runs(RUNS))
def test_a_program_of_the_page_prints_200(reader: Reader, run: Run) -> None:
    assert reader.type(run.command).strip() == "200"


@pytest.mark.parametrize("run", runs(RUNS))
def test_a_denial_by_policy_is_shown_with_its_status(reader: Reader, run: Run) -> None:
    output = refused(reader, run, "export SCOPE=air")
    assert "403" in output
    assert '"error": "policy_denied"' in output


@pytest.mark.parametrize("run", runs(RUNS))
def test_a_refusal_by_customs_is_shown_with_its_status(reader: Reader, run: Run) -> None:
    # There is neither an API nor a token endpoint.
    output = refused(reader, run, "export CUSTOMS_URL=$CUSTOMS_URL/none")
    assert re.search(r"\b40[14]\b", output)


@over_tls
def test_a_caller_with_a_certificate_of_another_ca_is_not_answered(
    reader: Reader, run: Run
) -> None:
    other = reader.copy("other")
    moved = f"CLIENT_CERT={other}/app.pem CLIENT_KEY={other}/app.key CLIENT_P12={other}/app.p12"
    assert '"error"' not in refused(reader, run, f"export {moved}")
    # The host warns once in a while, not for each connection.
    assert "certificate was rejected" in reader.log()
    assert "closes the connection without a reply" in PAGE


@over_tls
def test_a_host_with_a_certificate_of_another_ca_is_not_asked(reader: Reader, run: Run) -> None:
    other = reader.copy("other")
    moved = f"SIGNER_CA={other}/ca.pem SIGNER_TRUST={other}/trust.p12"
    assert re.search("(?i)certificat", refused(reader, run, f"export {moved}"))


@pytest.mark.parametrize("run", runs(RUNS))
def test_customs_with_a_certificate_of_an_unknown_ca_gets_no_token(
    reader: Reader, run: Run
) -> None:
    variables = (
        "CURL_CA_BUNDLE",
        "SSL_CERT_FILE",
        "NODE_EXTRA_CA_CERTS",
        "-Djavax.net.ssl.trustStore",
    )
    command = re.sub(rf"(?:{'|'.join(variables)})=\S+ ", "", run.command)
    assert command != run.command
    output = refused(reader, Run(command, run.tool), "true")
    assert re.search("(?i)certificat", output)


def test_the_runs_are_those_of_every_program_but_the_one_for_dotnet() -> None:
    run = {re.sub(r"^.* ", "", each.command) for each in RUNS}
    assert run == PROGRAMS.keys() - {"Program.cs"}
    assert "**The one for .NET is not run**" in PAGE


#: What a caller sends, where, and what it reads.
WORDS: Final = (
    "/v1/token", "/api/movement/road/v2/test-auth", "profile", "scope", "access_token", "Bearer",
    "http://localhost",
)  # fmt: skip


def printed_by(program: str) -> set[str]:
    """The words of the interface in *program*, and the variables that it reads."""
    text = PROGRAMS[program]
    found = {word for word in WORDS if word in text}
    reads = (
        r'(?:\benv\.|\$\{?|Env\(|[Gg]etenv\(|GetEnvironmentVariable\()"?([A-Z][A-Z0-9_]+)\b(?!\.)'
    )
    return found | set(re.findall(reads, text))


def test_the_program_for_dotnet_says_what_the_others_say() -> None:
    tls = {"SIGNER_URL", "SIGNER_CA", "CLIENT_CERT", "CLIENT_KEY"}
    common = {*WORDS, "SIGNER_SOCKET", "PROFILE", "SCOPE", "CUSTOMS_URL"}
    for name in ("token.sh", "token.js", "token.go"):
        assert printed_by(name) - {"http://localhost"} == (common | tls) - {"http://localhost"}, (
            name
        )
    stores = {"CLIENT_P12", "STORE_PASSWORD"}
    assert printed_by("Program.cs") == (common | tls | stores) - {"CLIENT_CERT", "CLIENT_KEY"}
    # The control: a word that is missing is noticed.
    assert "SIGNER_SOCKET" not in printed_by("Token.java")


def test_a_host_takes_the_content_type_that_dotnet_sends(reader: Reader) -> None:
    """Its StringContent adds the charset."""
    curl = (
        "curl -sS --unix-socket host.sock http://localhost/v1/token -H 'Content-Type: {}' -d '{}'"
    )
    body = json.dumps({"profile": "acme", "scope": "road"})
    taken = reader.type(curl.format("application/json; charset=utf-8", body))
    assert json.loads(taken)["token_type"] == "Bearer"
    # The control: not every type is.
    other = reader.type(curl.format("text/plain; charset=utf-8", body))
    assert json.loads(other)["error"] == "unsupported_media_type"


def test_every_variable_that_a_program_reads_is_explained() -> None:
    explained = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", PAGE))
    read = {word for name in PROGRAMS for word in printed_by(name) if word.isupper()}
    assert read <= explained
    assert len(read) == 12
