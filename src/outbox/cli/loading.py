"""Finding a service's declarations: `--app module:attribute`."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from outbox.cache import Cache
from outbox.cli.exits import UsageProblem

_HELP = "write --app package.module, or --app package.module:attribute"


async def cache_of(app: str, table: str) -> Cache[Any]:
    """The cache of a table: what `app` names, or the one of that table among a module's names.

    A function is called, and awaited where it is async: an owner in SQL needs a pool, which a module cannot open.

    Raises:
        UsageProblem: it cannot be imported, or there is no such cache.
    """
    module_name, _, attribute = app.partition(":")
    module = imported(module_name)
    if not attribute:
        caches = [value for value in vars(module).values() if isinstance(value, Cache) and value.table == table]
        if not caches:
            raise UsageProblem(f"module {module_name} has no cache for table {table}; {_HELP}")
        return caches[0]
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UsageProblem(f"module {module_name} has no {attribute}; {_HELP}")
        found = getattr(found, name)
    if callable(found) and not isinstance(found, Cache):
        found = found()
        if inspect.isawaitable(found):
            found = await found
    if not isinstance(found, Cache):
        raise UsageProblem(f"{app} is a {type(found).__name__}, not a Cache, nor a function that returns one")
    if found.table != table:
        raise UsageProblem(f"{app} is the cache of table {found.table}, not of {table}; name that one")
    return found


def imported(name: str) -> Any:
    """A module of the service, found as `python -m` finds it.

    Raises:
        UsageProblem: it cannot be imported; says why.
    """
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise UsageProblem(f"{name!r} is no module; {_HELP}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageProblem(
                f"there is no module {error.name}; start the command where it is, or install it; {_HELP}"
            ) from error
        raise UsageProblem(f"importing {name} fails: it needs {error.name}, which is not installed") from error
    except Exception as error:
        raise UsageProblem(f"importing {name} fails: {type(error).__name__}: {error}") from error
