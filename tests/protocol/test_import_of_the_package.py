"""What importing the package loads, in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_no_device_no_http_and_no_settings() -> None:
    heavy = {"pkcs11", "httpx", "pydantic", "cryptography", "asn1crypto", "click", "aiohttp"}
    run = subprocess.run(
        [sys.executable, "-c", "import sys, hsmtoll; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not heavy & set(run.stdout.split())
    # The control: asked for, a name of ours brings what it needs.
    run = subprocess.run(
        [sys.executable, "-c", "import sys, hsmtoll; hsmtoll.Settings; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "pydantic" in run.stdout.split()
