"""The room of values and of this process alone: no test starts a process or touches a network."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What Python tells its audit hooks before it starts a process.
_PROCESSES: Final = frozenset(
    {
        "subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
        "os.system",
    }
)  # fmt: skip

#: The same of a name that is looked up, and, with an address, of a socket.
_LOOKED_UP: Final = frozenset(
    {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
)
_SOCKETS: Final = frozenset({"socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg"})

#: What a test tried; ``None`` while none of this room runs. A hook stays for good.
_tried: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    # The address of a Unix socket is a path.
    if _tried is not None and (
        event in _PROCESSES
        or event in _LOOKED_UP
        or (event in _SOCKETS and isinstance(arguments[1], tuple))
    ):
        _tried.append(f"{event} {arguments[:2]}")
        raise PermissionError(f"a test of the room unit: {event}")


sys.addaudithook(_note)


@pytest.fixture(autouse=True)
def no_process_and_no_network() -> Iterator[list[str]]:
    """Refuse both, and fail the test that tried, whatever became of the refusal."""
    global _tried  # noqa: PLW0603 - a hook has no other way to know
    tried: list[str] = []
    _tried = tried
    yield tried
    _tried = None
    assert not tried
