# ruff: noqa: INP001 -- a program of an image, not part of the package
"""Whether the sandbox's Maskinporten answers over TLS: exit code 0, or 1 with the reason."""

import ssl
import sys
from urllib.request import urlopen

try:
    trust = ssl.create_default_context(cafile="/run/sandbox/ca.pem")
    page = "https://localhost:8443/.well-known/oauth-authorization-server"
    urlopen(page, timeout=4, context=trust).close()
except OSError as exc:
    sys.exit(f"sandbox: {exc}")
