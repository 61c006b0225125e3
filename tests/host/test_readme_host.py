"""
The page about the signing host, followed to the letter: by root, on a machine of its
own without systemd, from its accounts to the verified audit.

The machine is a set of namespaces with directories of their own. What the page leaves to others
is done by the test: it is the certificate's issuer, and the name server.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from hsmtoll.host.system import clock_is_synchronised
from tests.kit.machine import Machine, certify, verified
from tests.kit.readers import blocks, commands, section
from tests.kit.signing_host import ROAD_SCOPE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs_root


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine.made(tmp_path_factory) as made:
        yield made


def test_the_signing_host_of_the_readme_signs_for_its_callers(machine: Machine) -> None:
    serve = ""
    for block in blocks(section("Set up the host")):
        if block.kind == "toml":
            machine.file(block)
            if block.text.rstrip().endswith('audit.key"') and not clock_is_synchronised():
                # As the page says for a machine whose kernel does not know who keeps the clock.
                machine.do("echo 'clock = \"unchecked\"' >> /etc/hsmtoll/hsmtoll.toml")
        elif "key import" in block.text:
            leaf = certify(machine)
            machine.follow(block)
        elif " serve" in block.text:
            *before, (serve, _) = commands(block)
            for command, _ in before:
                machine.do(command)
            machine.serve(serve)
        else:
            machine.follow(block)

    at_socket, make, settings, over_tls, caller, keys = blocks(section("Callers"))
    # On the machine itself, as an account that the policy knows.
    result = machine.as_account("app", at_socket.text, "/home/app")
    assert result[0] == 0, result[1]
    assert verified(machine.do("cat /home/app/grant"), leaf) == ROAD_SCOPE
    # The control: an account that is no member of the group does not reach the socket.
    machine.do("useradd --create-home mallory")
    code, output = machine.as_account("mallory", at_socket.text, "/home/mallory")
    assert code != 0
    assert "custodian" in output, output
    # Over TLS, which needs a restart.
    machine.follow(make)
    machine.file(settings)
    machine.end()
    machine.do(
        "install -d -o app /home/app/tls && install -m 0600 -o app app.pem app.key /home/app/tls"
    )
    machine.do("install -m 0644 ca.pem /home/app/tls")
    machine.serve(serve)
    result = machine.as_account("app", over_tls.text, "/home/app/tls")
    assert result[0] == 0, result[1]
    assert verified(machine.do("cat /home/app/tls/grant"), leaf) == ROAD_SCOPE
    # By ssh: what sshd runs for the key.
    machine.file(caller)
    (forced,) = re.findall(r'command="([^"]+)"', keys.text)
    code, grant = machine.as_account("app", forced)
    assert code == 0, grant
    assert verified(grant, leaf) == ROAD_SCOPE

    (custody,) = blocks(section("While it runs"))
    shown = {command: machine.do(command) for command, _ in commands(custody)}
    listed = next(output for command, output in shown.items() if "audit list" in command)
    assert " signed" in listed
    for name in ("uid:1001", "san:dns:app.acme.example"):
        assert name in listed
    # The stop is typed as the page has it, and holds until it is taken back.
    machine.do("hsmtoll stop")
    assert "stop" in machine.as_account("app", forced)[1]
    machine.do("hsmtoll resume")
    assert machine.as_account("app", forced)[0] == 0
    # The control: a record that was altered is found.
    machine.end()
    verify = next(command for command in shown if "audit verify" in command)
    machine.do("sed -i s/uid:1001/uid:1002/ /var/lib/hsmtoll/audit/*.jsonl")
    assert machine.run(verify)[0] == 91
