"""The device: `hsmtoll objects`, `chain`, `key …` and `pin clear`."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from hsmtoll import enrolment
from hsmtoll.cli.framework import command, group
from hsmtoll.cli.input import read_content
from hsmtoll.cli.log import say
from hsmtoll.cli.options import NEEDS_DEVICE, PATH, GlobalOptions, as_json_option, final_try_option
from hsmtoll.cli.streams import print_json, print_result, to_json
from hsmtoll.doctor.evidence import KEY_FLAGS, TIME_FORMAT, certificate_members
from hsmtoll.errors import (
    ConfigurationError,
    DeviceError,
    PinIncorrect,
    PinNotTried,
    UsageError,
    sanitized,
)
from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, StoredCertificate
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.settings import Settings

__all__ = ["chain", "key", "objects", "pin"]


@command(
    needs="a device (HSMTOLL_HSM__MODULE, HSMTOLL_HSM__KEY); no network",
    examples=("hsmtoll chain", "hsmtoll chain --pem > chain.pem"),
)
@click.option("--json", "as_json", is_flag=True, help="A list, leaf first.")
@click.option("--pem", is_flag=True, help="The certificates, leaf first.")
@final_try_option
@click.pass_obj
def chain(options: GlobalOptions, *, as_json: bool, pem: bool) -> None:
    """Show the verified certificate chain that is sent as x5c."""
    if as_json and pem:
        raise UsageError("--json and --pem: one form at a time")
    app = options.app()
    try:
        found = app.chain()
    finally:
        app.close()
    sent = found.sent(app.settings.x5c_mode)
    if pem:
        click.echo("".join(each.pem() for each in sent), nl=False)
    elif as_json:
        listed = [{"schema": 1, **certificate_members(each)} for each in sent]
        click.echo(to_json(listed))
    else:
        for line in found.explain():
            click.echo(line)
        if len(sent) < len(found.certificates):
            click.echo(f"sent: the first {len(sent)} (HSMTOLL_X5C is {app.settings.x5c})")


@command(
    needs="HSMTOLL_HSM__MODULE; with a PIN private keys show as well",
    examples=("hsmtoll objects", "hsmtoll objects --json"),
)
@click.option("--json", "as_json", is_flag=True, help="Everything, for a program.")
@click.pass_obj
def objects(options: GlobalOptions, *, as_json: bool) -> None:
    """
    List devices, keys and certificates of the PKCS#11 module.

    Each with its URI, as HSMTOLL_HSM__KEY takes it.
    """
    app = options.app()
    seen = app.hsm.inspect()
    inventory = _inventory(seen, app.clock.now().wall)
    if as_json:
        print_json(inventory)
        _raise_for_pin(seen)
        return
    click.echo(
        f"module {inventory['module']}: {inventory['description']} {inventory['version']}".rstrip()
    )
    for device in inventory["p11_tokens"]:
        _print_device(device)
    if not inventory["p11_tokens"]:
        click.echo("  no device: is it plugged in, and its service running?")
    _raise_for_pin(seen)


def _raise_for_pin(seen: ModuleFacts) -> None:
    """Raise, after printing, if private keys are missing because of the PIN."""
    if isinstance(seen.login, ConfigurationError | PinIncorrect | PinNotTried):
        raise seen.login


def _inventory(seen: ModuleFacts, now: float) -> dict[str, Any]:
    return {
        "module": seen.path,
        "manufacturer": sanitized(seen.manufacturer),
        "description": sanitized(seen.description),
        "version": ".".join(map(str, seen.version)),
        "p11_tokens": [
            {
                "uri": str(each.uri),
                "slot": each.slot_id,
                "initialized": each.initialized,
                "pin": each.pin_state,
                "refused_pins": each.refused,
                "logged_in": each.logged_in,
                "problem": each.problem,
                "keys": [_key_row(key) for key in each.keys],
                "certificates": [_certificate_row(u, c, now) for u, c in each.certificates],
            }
            for each in seen.tokens
        ],
    }


def _key_row(key: KeyFacts) -> dict[str, Any]:
    flags = {name: getattr(key, name) for name in KEY_FLAGS}
    return {"uri": str(key.uri), "type": key.key_type, "bits": key.bits, **flags}


def _certificate_row(uri: KeyUri, stored: StoredCertificate, now: float) -> dict[str, Any]:
    if stored.problem is not None:
        return {"uri": str(uri), "problem": f"cannot be read: {stored.problem}"}
    try:
        read = Certificate.load(stored.der)
    except ValueError as exc:
        return {"uri": str(uri), "problem": f"cannot be read: {exc}"}
    return {
        "uri": str(uri),
        "subject": read.subject,
        "issuer": read.issuer,
        "sha256": read.sha256,
        "not_after": read.not_after.strftime(TIME_FORMAT),
        "days_left": read.days_left(datetime.fromtimestamp(now, UTC)),
    }


#: The PIN state by the flags of the token; a login is needed to know whether a PIN is right.
_PIN_STATES: Final = {
    "ok": "not locked",
    "count-low": "not locked; a wrong one was given since the last login",
    "to-be-changed": "not locked; to be changed",
    "final-try": "the next wrong one locks it",
    "unset": "none was set on the device",
}


def _print_device(device: dict[str, Any]) -> None:
    click.echo(f"\n{device['uri']}")
    if not device["initialized"] and not device["keys"] and not device["certificates"]:
        click.echo("  not initialised")
        return
    refused = f", {device['refused_pins']} refused before" if device["refused_pins"] else ""
    click.echo(f"  PIN: {_PIN_STATES.get(device['pin'], device['pin'])}{refused}")
    if device["problem"]:
        click.echo(f"  private keys do not show: {device['problem']}")
    elif not device["logged_in"]:
        click.echo("  private keys do not show without a PIN, such as HSMTOLL_HSM__PIN_FILE")
    for key in device["keys"]:
        properties = [
            name if value else f"not {name}" if value is False else f"{name}?"
            for name, value in ((name, key[name]) for name in KEY_FLAGS)
        ]
        click.echo(f"  key  {key['uri']}")
        click.echo(
            f"       {key['type']} {key['bits'] or ''} {', '.join(properties)}".replace("_", " ")
        )
    for each in device["certificates"]:
        click.echo(f"  cert {each['uri']}")
        click.echo(
            f"       {each['problem']}"
            if "problem" in each
            else f"       {each['subject']}, {each['days_left']} days left"
        )


@group(
    examples=("hsmtoll key generate", "hsmtoll help key import"),
    needs=NEEDS_DEVICE,
)
def key() -> None:
    """Make a key on the device; request and store its certificate."""


@key.command(
    "generate",
    needs=NEEDS_DEVICE,
    examples=("hsmtoll key generate", "hsmtoll key generate --bits 4096"),
)
@click.option("--bits", type=click.Choice(["3072", "2048", "4096"]), default="3072")
@click.option("--label", metavar="L", help="Default: that of HSMTOLL_HSM__KEY.")
@click.option("--id", "key_id", metavar="HEX", help="Default: that of HSMTOLL_HSM__KEY, or random.")
@click.option(
    "--always-authenticate", is_flag=True, help="The device wants the PIN for every signature."
)
@final_try_option
@click.pass_obj
def key_generate(
    options: GlobalOptions,
    *,
    bits: str,
    label: str | None,
    key_id: str | None,
    always_authenticate: bool,
) -> None:
    """
    Make an RSA key on the device and print its URI.

    The key is for signing alone and cannot be exported.
    """
    try:
        given = bytes.fromhex(key_id) if key_id else None
    except ValueError:
        raise UsageError("--id: hexadecimal bytes are expected, such as 01") from None
    app = options.app()
    with app.devices[0] as device:
        uri = enrolment.generate(
            device,
            bits=int(bits),
            label=label,
            id=given,
            always_authenticate=always_authenticate,
        )
        to_set = enrolment.uri_to_set(device, uri)
    click.echo(str(uri))
    if to_set is not None:
        say(
            "the settings do not select this key; to go on with it:",
            hints=(_export_line(app.settings, to_set),),
        )


def _export_line(settings: Settings, uri: KeyUri) -> str:
    """The shell command that selects *uri* in the settings."""
    if settings.hsm.key:
        return f"export HSMTOLL_HSM__KEY={shlex.quote(str(uri))}"
    line = f"export HSMTOLL_HSM__KEY_LABEL={shlex.quote(uri.object or '')}"
    return f"{line} HSMTOLL_HSM__KEY_ID={uri.id.hex()}" if uri.id else line


@key.command(
    "csr",
    needs=NEEDS_DEVICE,
    examples=(
        "hsmtoll key csr --country SE --organization 'Acme AB' \\",
        "  --common-name 'Acme AB' --organization-identifier NTRSE-5566778899 > a.csr",
    ),
)
@click.option("--country", required=True, metavar="CC")
@click.option("--organization", required=True, metavar="NAME")
@click.option("--common-name", required=True, metavar="NAME")
@click.option("--organization-identifier", required=True, metavar="ID",
              help="NTRSE-5566778899, NTRNO-987654325, VATDE-123456789, …")  # fmt: skip
@click.option("--unit", metavar="NAME")
@click.option("--serial-number", metavar="N")
@final_try_option
@click.pass_obj
def key_csr(options: GlobalOptions, /, **subject: Any) -> None:
    """Print a certificate request (PKCS#10, PEM), signed on the device."""
    app = options.app()
    with app.devices[0] as device:
        click.echo(enrolment.csr(device, **subject).rstrip())


@key.command(
    "import",
    needs=NEEDS_DEVICE,
    examples=("hsmtoll key import chain.pem", "hsmtoll key import - < delivered.p7b"),
)
@click.argument("chain", metavar="FILE", type=PATH)
@final_try_option
@click.pass_obj
def key_import(options: GlobalOptions, *, chain: Path) -> None:
    """
    Store a certificate and its chain on the device, beside its key.

    FILE is PEM, DER or PKCS#7 (.p7b), - is stdin. What is there already is not stored again.
    """
    app = options.app()
    data = read_content(str(chain), "key import:")
    with app.devices[0] as device:
        now = datetime.fromtimestamp(app.clock.now().wall, UTC)
        # Without an identity use the rules of eSeals, which are the stricter ones.
        family = app.settings.identity or "eseal"
        done = enrolment.import_chain(
            device,
            data,
            name=f"key import {sanitized(chain)}",
            file=None if str(chain) == "-" else chain,
            now=now,
            identity=family,
            mode=app.settings.x5c_mode,
            root_sha256=app.settings.hsm.root_sha256,
        )
    for what, certificates in (
        ("written", done.written),
        ("there already", done.present),
        ("no room for it: name it in a file, HSMTOLL_HSM__CERTIFICATES", done.left),
    ):
        for each in certificates:
            click.echo(f"{each.subject}: {what}")


@key.command("jwk", needs=NEEDS_DEVICE, examples=("hsmtoll key jwk > key.jwk",))
@final_try_option
@click.pass_obj
def key_jwk(options: GlobalOptions) -> None:
    """
    Print the public key as a JWK (RFC 7517).

    With its RFC 7638 thumbprint as kid, ready to be registered at Samarbeidsportalen.
    """
    app = options.app()
    with app.devices[0] as device:
        click.echo(json.dumps(enrolment.jwk(device, alg=app.settings.alg), indent=2))


@group(needs="HSMTOLL_HSM__MODULE", examples=("hsmtoll pin clear",))
def pin() -> None:
    """Manage the record of refused PINs."""


@pin.command(
    "clear",
    needs="HSMTOLL_HSM__MODULE; HSMTOLL_HSM__KEY for one device; no PIN",
    examples=("hsmtoll pin clear",),
)
@as_json_option
@click.pass_obj
def pin_clear(options: GlobalOptions, *, as_json: bool) -> None:
    """
    Forget the refused PINs of the devices in the settings.

    For after the device was unblocked to the same PIN, which would not be tried again otherwise.
    """
    app = options.app()
    found = app.hsm.token_users()
    if not found:
        raise DeviceError("pin clear: no device fits", hint="`hsmtoll objects` shows what is there")
    forgotten = app.hsm.pin_log.clear(*found)
    # A device has two records: of the user PIN and of the keys' own (context-specific) PINs.
    devices = len({replace(each, user="user") for each in found})
    print_result(
        {"forgotten": forgotten, "devices": devices},
        f"forgot {forgotten} record(s) of {devices} device(s)",
        as_json=as_json,
    )
