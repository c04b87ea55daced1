"""Sagas: what a service declares and starts.

@saga("place_order", deadline=timedelta(hours=48))
async def place_order(run: Run, order: PlaceOrder) -> Receipt: ...
"""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, Generic, cast
from uuid import UUID, uuid5

from typing_extensions import TypeVar

from outbox import Db, Duration
from saga.codec import Value, hints_of, name_of
from saga.context import positive
from saga.errors import BodyError, SagaDeclarationError
from saga.remote import reply_topic
from saga.run import Run
from saga.step import Target, check_async, check_name

if TYPE_CHECKING:
    from saga.handle import Handle

A = TypeVar("A")
R = TypeVar("R")

_WORKFLOWS: Final = UUID("6f8b1f3e-1d5c-5e0a-9c57-5a6a62a0b0c1")
"""Namespace of the ids of definitions: the same name and version have the same id in every process."""


class Saga(Generic[A, R]):
    """A saga; made by `saga`."""

    def __init__(
        self, function: Callable[[Run, A], Awaitable[R]], *, name: str, version: int, deadline_seconds: float
    ) -> None:
        """For `saga`."""
        self.function: Final = function
        self.name: Final = name
        self.version: Final = version
        self.deadline_seconds: Final = deadline_seconds
        self.workflow_id: Final = uuid5(_WORKFLOWS, f"{name}/{version}")
        self.reply_topic: Final = reply_topic(name)
        request, result = _annotations(function)
        self.request: Final[Value[A]] = Value(request, f"request of {name}")
        self.result: Final[Value[R]] = Value(result, f"result of {name}")
        self._targets: dict[str, Target] = {}

    async def start(self, db: Db, request: A, *, key: str | None = None) -> "Handle[R]":
        """Start an instance, or find the one that was started under this key with this request.

        The body is run to its first call here, so a saga that would fail at once fails in the caller's hands.

        Args:
            db: a pool; or a connection or `Transaction`, where the start commits with what is open there.
            request: what the body gets.
            key: unique among the instances of this name; a new one where it is not given.

        Raises:
            Conflict: the key was used with another request.
            Rejected: the body rejects this request at once.
            BodyError: the body has a bug that shows at once.
            PayloadError: the request cannot be journalled.
        """
        from saga.handle import start

        return await start(self, db, request, key)

    def handle(self, db: Db, key: str) -> "Handle[R]":
        """The instance that was started under a key; nothing is asked yet."""
        from saga.handle import Handle

        return Handle(self, db, key)

    def learn(self, target: Target) -> None:
        """Remember what a name stands for in this saga's journals.

        Raises:
            BodyError: the name stands for something else already.
        """
        known = self._targets.setdefault(target.name, target)
        if known is not target:
            raise BodyError(
                f"{target.name}: two steps of this name in one saga, and the journal could not tell them apart; "
                "rename one of the functions"
            )

    def find(self, name: str) -> Target | None:
        """The step or contract of a name: as the body used it, or else as the code says (see `reachable`)."""
        found = self._targets.get(name)
        if found is None:
            for target in self.reachable():
                if isinstance(target, Target):
                    self._targets.setdefault(target.name, target)
            found = self._targets.get(name)
        return found

    def reachable(self) -> "list[Target | Saga[Any, Any]]":
        """Steps, contracts and child sagas that the code names: in its module, its closure, functions that it calls."""
        return _reachable(self.function)

    @property
    def has_remotes(self) -> bool:
        """Whether it is known to send commands: by what its bodies did so far, or by what the code names."""
        known = [*self._targets.values(), *self.reachable()]
        return any(isinstance(target, Target) and target.kind == "remote" for target in known)

    def __repr__(self) -> str:
        return f"<saga {self.name} version {self.version}>"


def saga(
    name: str, *, version: int = 1, deadline: Duration
) -> Callable[[Callable[[Run, A], Awaitable[R]]], Saga[A, R]]:
    """Declare a saga: an async function of a `Run` and one request.

    Args:
        name: in the journal; instances belong to it, whatever the function is called.
        version: instances go on with the version that they were started with. Keep the old function registered until
            its instances have ended, or change it so that it comes by the same way.
        deadline: from the start; a saga that has not passed its pivot by then is undone.

    Raises:
        SagaDeclarationError: the name or the function cannot be a saga's.
    """
    check_name("saga", name)
    if not 1 <= version <= 2**31 - 1:
        raise SagaDeclarationError(f"saga {name!r}", f"has version {version}", "count versions from 1")
    deadline_seconds = positive(f"saga {name!r} deadline", deadline, 0.0)

    def declare(function: Callable[[Run, A], Awaitable[R]]) -> Saga[A, R]:
        return Saga(function, name=name, version=version, deadline_seconds=deadline_seconds)

    return declare


def _annotations(function: Callable[..., Any]) -> tuple[Any, Any]:
    check_async(function)
    name = name_of(function)
    hints = hints_of(function)
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != 2:
        raise SagaDeclarationError(
            name,
            f"takes {len(parameters)} parameters",
            "write it as: async def name(run: Run, request: ARequest) -> AResult",
        )
    if parameters[1].name not in hints or "return" not in hints:
        raise SagaDeclarationError(name, "lacks annotations", "annotate the request and the result, None included")
    return hints[parameters[1].name], hints["return"]


def _reachable(function: Callable[..., Any]) -> list[Target | Saga[Any, Any]]:
    found: list[Target | Saga[Any, Any]] = []
    seen: set[int] = set()
    queue: list[object] = [function]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Target | Saga):
            found.append(value)
        if inspect.isfunction(value):
            queue += _names(value)
        elif isinstance(value, Saga):
            queue.append(value.function)
        elif isinstance(value, list | tuple | set | frozenset):
            queue += value
        elif isinstance(value, dict):
            queue += value.values()
    return found


def _names(function: Callable[..., Any]) -> list[object]:
    """What a function's code names, comprehensions and inner functions included."""
    names = cast("Any", function).__globals__
    values: list[object] = [*(cast("Any", function).__defaults__ or ()), cast("Any", function).__kwdefaults__]
    for cell in cast("Any", function).__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    for code in _codes(cast("Any", function).__code__):
        for name in code.co_names:
            value = names.get(name)
            values.append(value)
            if inspect.ismodule(value) or inspect.isclass(value):
                values += [getattr(value, other, None) for other in code.co_names]
    return values


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
