# ruff: noqa: INP001 -- a program of an image, not part of the package
"""
Whether this container is well: exit code 0 or 1. Asked for by the images' HEALTHCHECK.

`sandbox`: Maskinporten and Customs answer over TLS. `hsmtoll`: a signing host with a metrics
listener says that it lives; any other command only has to be able to start.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request


def main(what: str) -> int:
    """One check of *what*."""
    try:
        if what == "sandbox":
            context = ssl.create_default_context(cafile="/run/sandbox/ca.pem")
            _get("https://localhost:8443/.well-known/oauth-authorization-server", context)
            return 0
        if metrics := os.environ.get("HSMTOLL_HOST__METRICS"):
            _get(f"http://{metrics}/live")
            return 0
    except (OSError, urllib.error.URLError) as exc:
        sys.stderr.write(f"{what}: {exc}\n")
        return 1
    return subprocess.run(["hsmtoll", "--version"], check=False).returncode


def _get(url: str, context: ssl.SSLContext | None = None) -> None:
    # Only the two addresses above come here, no scheme that a user could choose.
    with urllib.request.urlopen(url, timeout=4, context=context) as answer:  # noqa: S310 -- see above
        answer.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
