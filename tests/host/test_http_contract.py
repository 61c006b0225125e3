"""
docs/openapi.yaml is what a host answers: a validator of others reads it, and live replies of every
status are held against it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import resource
import socket
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from openapi_spec_validator.validation.exceptions import OpenAPIValidationError

from hsmtoll.host.connections import Listener
from hsmtoll.host.messages import RequestRejected, parse_body
from hsmtoll.host.places import Limits
from hsmtoll.signing.replies import REPLIES
from tests.kit.signing_host import APP, ME, ROAD, Reply, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from aiohttp import web

    from hsmtoll.sandbox.server import Sandbox
    from tests.kit.signing_host import RunningHost

DOCS: Final = resources.files("hsmtoll") / "docs"
DOCUMENT: Final[dict[str, Any]] = yaml.safe_load((DOCS / "openapi.yaml").read_text("utf-8"))
PAGE: Final = (DOCS / "http-api.md").read_text("utf-8").partition("\n## The sandbox")[0]

#: What is expected of each operation: path, method, status.
DOCUMENTED: Final = {
    (path, method, int(status))
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
    for status in operation["responses"]
}


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """*node*, or what it refers to."""
    while "$ref" in node:
        found: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def wrong_with(value: object, schema: dict[str, Any]) -> list[str]:
    """What the validator says of *value*; references of *schema* are into the document."""
    validator = OAS31Validator({**DOCUMENT, **schema})
    return [each.message for each in validator.iter_errors(value)]


def members(schema: dict[str, Any]) -> set[str]:
    schema = resolved(schema)
    parts = [*schema.get("allOf", ()), *schema.get("anyOf", ())]
    return {*schema.get("properties", ()), *(name for each in parts for name in members(each))}


def differences(path: str, method: str, reply: Reply) -> list[str]:
    """In what *reply* differs from what the document promises."""
    responses = DOCUMENT["paths"][path][method]["responses"]
    if str(reply.status) not in responses:
        return [f"status {reply.status}"]
    response = resolved(responses[str(reply.status)])
    found = []
    for name, header in response["headers"].items():
        schema = resolved(header)["schema"]
        value = reply.headers.get(name.lower())
        if value is None:
            found.append(f"no header {name}")
        else:
            found += wrong_with(int(value) if schema["type"] == "integer" else value, schema)
    if "content" not in response:
        return found + ([] if reply.body == {"text": ""} else ["a body"])
    kind = reply.headers["content-type"].partition(";")[0]
    content = response["content"].get(kind)
    if content is None:
        return [*found, f"content type {kind}"]
    if content["schema"].get("type") == "string":
        return found
    found += wrong_with(reply.body, content["schema"])
    return found + [f"member {name}" for name in reply.body.keys() - members(content["schema"])]


def test_the_document_is_valid_for_a_validator_of_others() -> None:
    validate(DOCUMENT)
    broken = copy.deepcopy(DOCUMENT)
    del broken["components"]["schemas"]["Grant"]
    with pytest.raises(Exception, match="Grant"):
        validate(broken)
    broken = copy.deepcopy(DOCUMENT)
    broken["paths"]["/v1/grant"]["post"]["responses"]["200"].pop("description")
    with pytest.raises(OpenAPIValidationError):
        validate(broken)


class Seen:
    """Replies of a host, each checked as it comes."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str, int], Reply] = {}

    def check(self, path: str, method: str, reply: Reply) -> Reply:
        assert differences(path, method, reply) == [], (path, method, reply)
        self.of[path, method, reply.status] = reply
        return reply


def test_replies_of_every_status_are_as_documented(
    make_host: Callable[..., RunningHost], toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    scopes = ["road", "air", "rail"]
    host = make_host(entry(ME, scopes=scopes, per_minute=20), entry(f"san:dns:{APP}", per_day=0))
    host.start()
    seen = Seen()
    app = host.authority.issue(APP)
    for path in ("/v1/grant", "/v1/token"):
        for status, reply in (
            (200, host.ask(path)),
            (400, host.ask(path, iat=1)),
            (403, host.ask(path, scope="toll:no")),
            (404, host.ask(path.replace("v1", "v2"))),
            (405, host.send("GET", path)),
            (413, host.ask(path, resource=["x" * 256] * 99)),
            (415, host.send("POST", path, data=ROAD)),
            (429, host.ask_tls(app, path)),
            (500, internal_error(tmp_path / path[4:])),
        ):
            assert seen.check(path, "post", reply).status == status
    for endpoint, scope in (("token", "air"), ("exchange", "rail")):
        toll_sandbox.fault("echo", endpoint)
        assert seen.check("/v1/token", "post", host.ask("/v1/token", scope=scope)).status == 502
        toll_sandbox.clear_faults()

    host.stop_file.touch()
    eventually(lambda: host.health("/ready").status == 503)
    for path in ("/v1/grant", "/v1/token"):
        assert seen.check(path, "post", host.ask(path)).word == "stopped"
    probe(host, seen)
    host.stop_file.unlink()
    eventually(lambda: host.health("/ready").status == 200)
    probe(host, seen)

    assert host.process is not None
    size = max(part.stat().st_size for part in host.audit.glob("audit-*.jsonl"))
    resource.prlimit(host.process.pid, resource.RLIMIT_FSIZE, (size + 10, size + 10))
    for path in ("/v1/grant", "/v1/token"):
        assert seen.check(path, "post", host.ask(path)).word == "audit_broken"

    assert seen.of.keys() == DOCUMENTED
    # The control: whatever is changed in a reply is noticed.
    for (path, method, _), reply in seen.of.items():
        for changed in changes(reply):
            assert differences(path, method, changed), (path, method, changed)


def probe(host: RunningHost, seen: Seen) -> None:
    for page in ("/", "/live", "/ready", "/metrics"):
        seen.check(page, "get", host.health(page))
        seen.check(page, "head", host.health(page, "HEAD"))
        seen.check(page, "get", host.health(page, "DELETE"))
        seen.check(page, "get", host.health(f"{page.rstrip('/')}/none"))
        seen.check(page, "get", host.health(page, headers={"Host": "rebound.example"}))
    openmetrics = host.health("/metrics", headers={"Accept": "application/openmetrics-text"})
    seen.check("/metrics", "get", openmetrics)


def internal_error(path: Path) -> Reply:
    """What a caller gets where the host itself is at fault."""

    async def fails(request: web.BaseRequest, peer: object) -> web.Response:
        raise ValueError(request, peer)

    async def asked() -> Reply:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            listener = Listener(listening, fails, Limits(8, 8, 60.0))
            listener.open()
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
            writer.close()
            await listener.close(grace=0)
        status, *lines = head.lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return Reply(int(status.split()[1]), json.loads(body), headers)

    return asyncio.run(asked())


def changes(reply: Reply) -> list[Reply]:
    """*reply* with one thing changed in each."""
    status, body, headers = reply.status, reply.body, reply.headers
    made = [Reply(418, body, headers)]
    promised = headers.keys() & {"hsmtoll-version", "retry-after", "allow"}
    made += [Reply(status, body, without(headers, name)) for name in promised]
    if body.keys() != {"text"}:
        made += [Reply(status, {**body, "more": 1}, headers)]
        for name in body:
            made.append(Reply(status, without(body, name), headers))
            made.append(Reply(status, {**body, name: {}}, headers))
    if "error" in body:
        made.append(Reply(status, {**body, "error": "else"}, headers))
    return made


def without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {each: value for each, value in table.items() if each != name}


VALUE: Final = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("road")
JSON: Final = (
    VALUE | st.lists(VALUE, max_size=3) | st.dictionaries(st.text(max_size=4), VALUE, max_size=3)
)
TEXT: Final = st.from_regex(r"[ -~]{0,4}", fullmatch=True) | st.sampled_from(["x" * 256, "x" * 257])
DETAILS: Final = st.lists(st.dictionaries(st.sampled_from(["type", "a"]), TEXT | JSON), max_size=2)
BODIES: Final = st.fixed_dictionaries(
    {},
    optional={
        "profile": TEXT | JSON,
        "scope": TEXT | JSON,
        "consumer_org": st.from_regex(r"[0-9]{8,10}", fullmatch=True) | JSON,
        "resource": st.lists(TEXT, max_size=17) | JSON,
        "authorization_details": DETAILS | JSON,
        "iat": JSON,
    },
)
REQUEST: Final = {"$ref": "#/components/schemas/Request"}


@given(JSON | BODIES | BODIES.map(lambda body: {**ROAD, **body}))
@example({**ROAD, "consumer_org": "987654325", "resource": ["a"] * 16})
@example({**ROAD, "resource": ["a"] * 17})
@example({**ROAD, "authorization_details": [{"type": "a"}]})
def test_what_the_document_calls_a_request_is_what_the_host_takes(body: Any) -> None:
    # Python's `$` also matches before a line feed at the end; that of ECMA-262 does not.
    if "\\n" in json.dumps(body):
        return
    try:
        parse_body(json.dumps(body).encode())
    except RequestRejected:
        taken = False
    else:
        taken = True
    assert taken == (wrong_with(body, REQUEST) == [])


def words() -> set[tuple[str, str]]:
    """Status and word of each error in the document."""
    found = set()
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                content = resolved(response).get("content", {}).get("application/json")
                for part in content["schema"].get("allOf", ()) if content else ():
                    error = part.get("properties", {}).get("error", {})
                    named = error.get("enum", [error["const"]] if "const" in error else [])
                    found |= {(status, word) for word in named}
    return found


def test_document_page_and_host_have_the_same_errors() -> None:
    of_the_host = {(str(each.status), each.word) for each in REPLIES}
    of_the_host |= {("405", "method_not_allowed"), ("500", "internal"), ("403", "host_refused")}
    assert words() == of_the_host
    assert set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, re.MULTILINE)) == of_the_host


def test_the_examples_of_the_page_are_as_documented() -> None:
    shown = [json.loads(each) for each in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
    names = ("Request", "Grant", "Token", "Error")
    assert len(shown) == len(names)
    for name, value in zip(names, shown, strict=True):
        assert value.keys() <= members(DOCUMENT["components"]["schemas"][name])
        wrong = wrong_with(value, {"$ref": f"#/components/schemas/{name}"})
        # They are cut.
        assert all("…" in each for each in wrong)
    named = re.findall(r"^\| `([a-z_]+)` \| (?!`)", PAGE, re.MULTILINE)
    assert named == list(DOCUMENT["components"]["schemas"]["Request"]["properties"])
