"""
Takes what applies here from two suites whose files no package of Python holds, into ``data/``.

    python tests/vectors/take.py limbo.json json_web_signature_test.json

``limbo.json`` is what `python -m limbo compile` makes in a clone of C2SP/x509-limbo; the other is
a file of C2SP/wycheproof. ``README.md`` beside this names the commits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

DATA: Final = Path(__file__).parent / "data"
#: Families of x509-limbo that ask what path building answers; `decisions.toml` names the others.
FAMILIES: Final = ("cve", "invalid", "pathlen", "pathological", "rfc5280", "rfc5280::validity")


def applies(case: dict[str, Any]) -> bool:
    """Whether a case of x509-limbo is about paths, time, or constraints of directory names."""
    if "nc-dos" in case["id"]:
        return False
    family = case["id"].rpartition("::")[0]
    return family in FAMILIES or (
        family == "rfc5280::nc" and "name-constraint-dn" in case["features"]
    )


def limbo(suite: dict[str, Any]) -> dict[str, Any]:
    """The cases, each certificate once: base64 of DER, named by its place in the list."""
    places: dict[str, int] = {}

    def place(pem: str) -> int:
        return places.setdefault("".join(pem.strip().splitlines()[1:-1]), len(places))

    cases = [
        {
            "id": case["id"],
            "valid": case["expected_result"] == "SUCCESS",
            "time": case["validation_time"],
            "leaf": place(case["peer_certificate"]),
            "trusted": [place(pem) for pem in case["trusted_certs"]],
            "others": [place(pem) for pem in case["untrusted_intermediates"]],
        }
        for case in suite["testcases"]
        if applies(case)
    ]
    return {"cases": cases, "certificates": list(places)}


def jws(suite: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of RSA keys: the public key as a JWK, and the tests."""
    groups = ((group.get("public") or group["private"], group) for group in suite["testGroups"])
    return [
        {
            "key": {name: key[name] for name in key.keys() - {"d", "p", "q", "dp", "dq", "qi"}},
            "tests": [
                {name: test[name] for name in ("tcId", "comment", "jws", "result")}
                for test in group["tests"]
            ],
        }
        for key, group in groups
        if key["kty"] == "RSA"
    ]


def main(limbo_json: Path, jws_json: Path) -> None:
    """Write both files."""
    for name, taken in (
        ("x509-limbo.json", limbo(json.loads(limbo_json.read_text(encoding="utf-8")))),
        ("wycheproof-jws.json", jws(json.loads(jws_json.read_text(encoding="utf-8")))),
    ):
        text = json.dumps(taken, indent=1, sort_keys=True)
        (DATA / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
