# ruff: noqa: INP001 -- a program of an image, not part of the package
"""
A CycloneDX 1.6 bill of materials from dpkg's status file and, if given, that of Python packages.

    sbom.py NAME DPKG_STATUS [PYTHON.json] > NAME.cdx.json

cyclonedx-py covers only Python environments; this adds the Debian packages, and validates the
result against the CycloneDX schema, so that an invalid bill fails the build.
"""

from __future__ import annotations

import json
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def main(name: str, status: Path, python: Path | None) -> int:
    """Print the bill; exit code 1 and the reason on stderr if it is not valid."""
    bill: dict[str, Any] = json.loads(python.read_text("utf-8")) if python else {}
    bill = {
        **bill,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "container", "name": name, "bom-ref": f"image:{name}"},
        },
        "components": [*bill.get("components", ()), *debian(status)],
    }
    text = json.dumps(bill, indent=1, sort_keys=True)
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        sys.stderr.write(f"{name}: {wrong}\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


def debian(status: Path) -> list[dict[str, Any]]:
    """The installed packages of a dpkg status file (deb822 paragraphs), as components."""
    found = []
    for paragraph in status.read_text("utf-8").split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in paragraph.splitlines()
            if ": " in line and not line.startswith(" ")
        )
        if fields.get("Status") != "install ok installed":
            continue
        name, version, architecture = (
            fields[key] for key in ("Package", "Version", "Architecture")
        )
        purl = PackageURL("deb", "debian", name, version, {"arch": architecture}).to_string()
        found.append(
            {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        )
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3:] else None))
