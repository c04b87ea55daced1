"""Where a test may kill, stop or fail this process.

Every SQL statement and every Kafka call is a site, numbered in the order of registration, with two sides: *before* it
is sent and *after* its effect, when the reply may be lost. Production never sets `hook`; a visit then costs one
comparison. Tests set it in the process they start (see tests/support) and raise, stop or `kill -9` at the site they
name.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Literal

Side = Literal["before", "after"]
Hook = Callable[[str, Side], Awaitable[None]]

hook: Hook | None = None

_sites: Final[list[str]] = []


def register(name: str) -> str:
    """Add a site; a second registration of the same name is a programming error."""
    if name in _sites:
        raise ValueError(f"crash site {name!r} is registered twice: give each statement and call its own name")
    _sites.append(name)
    return name


def sites() -> tuple[str, ...]:
    """All sites, in the order of their numbers (from 0)."""
    return tuple(_sites)


async def visit(name: str, side: Side) -> None:
    """Give the test's hook its chance."""
    if hook is not None:
        await hook(name, side)
