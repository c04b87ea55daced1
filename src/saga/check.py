"""What can be seen to be wrong with sagas without running them: `saga check MODULE`, and a test of yours.

    assert findings(shop.sagas) == []

Read are the body of each saga and the functions of the user's own that it calls, as source. Three kinds of things are
found: steps that cannot be undone although they may have to be, waits that have no use, and what is not the same when
the body is run again. What hides behind a variable, in a class or in another package is not seen, so nothing found is
no proof; `saga.testing` tries bodies out.
"""

import ast
import asyncio
import datetime as dt
import inspect
import os
import random
import secrets
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from saga.definition import Saga
from saga.remote import Remote
from saga.step import Target


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Finding:
    """One thing that is wrong."""

    file: str
    line: int
    saga: str
    rule: str
    """`no-compensation`, `useless-timeout`, `not-repeatable`, `foreign-await`, `unreadable`."""
    problem: str
    """With the remedy."""


def findings(module: ModuleType) -> list[Finding]:
    """What is wrong with the sagas of a module, in order of place."""
    sagas = {id(value): value for value in vars(module).values() if isinstance(value, Saga)}
    return sorted({finding for one in sagas.values() for finding in _Body(one).findings()})


_RUN_INSTEAD: Final = {
    "the time": "run.now()",
    "a random number": "run.random(), or run.uuid()",
    "a UUID": "run.uuid()",
}


def _functions(kind: str, module: ModuleType, *names: str) -> Iterator[tuple[int, str]]:
    for name in names:
        if hasattr(module, name):
            yield id(getattr(module, name)), kind


_NOT_REPEATABLE: Final = {
    **dict(_functions("the time", time, "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "localtime")),
    **dict(_functions("a random number", random, *random.__all__)),
    **dict(_functions("a random number", secrets, *secrets.__all__)),
    **dict(_functions("a random number", os, "urandom")),
    **dict(_functions("a UUID", uuid, "uuid1", "uuid4", "uuid6", "uuid7")),
}
_CLOCKS: Final = {dt.datetime: ("now", "utcnow", "today"), dt.date: ("today",)}
_CONCURRENT: Final = {
    id(function): f"asyncio.{name}"
    for name in ("sleep", "gather", "wait", "wait_for", "create_task", "to_thread", "timeout", "ensure_future")
    if (function := getattr(asyncio, name, None)) is not None
}


class _Body:
    """One saga, walked in the order of its source; functions that it calls are walked where they are called."""

    def __init__(self, saga: Saga[Any, Any]) -> None:
        self._saga = saga
        self._found: list[Finding] = []
        self._walked: set[Any] = set()
        self._is_past_pivot = False

    def findings(self) -> list[Finding]:
        """All of them."""
        self.walk(self._saga.function, run=next(iter(inspect.signature(self._saga.function).parameters)))
        return self._found

    def walk(self, function: Callable[..., Any], *, run: str | None) -> None:
        """One function, at the place where it is called; `run` is what it calls the run, if it gets it."""
        function = inspect.unwrap(function)
        if function in self._walked:
            return
        self._walked.add(function)
        try:
            lines, first = inspect.getsourcelines(function)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError) as error:
            self.add(function, 1, "unreadable", f"the source of {function.__qualname__} cannot be read: {error}")
            return
        _Walker(self, function, first - 1, run).walk(tree.body[0])

    def add(self, function: Callable[..., Any], line: int, rule: str, problem: str) -> None:
        """Something is wrong in a line of a function's file."""
        file = inspect.getsourcefile(function) or "?"
        self._found.append(Finding(file=file, line=line, saga=self._saga.name, rule=rule, problem=problem))

    def is_called(self, target: Target, function: Callable[..., Any], line: int) -> None:
        """The body runs a step here."""
        if isinstance(target, Remote):
            if target.timeout_seconds >= self._saga.deadline_seconds and not self._is_past_pivot:
                self.add(
                    function,
                    line,
                    "useless-timeout",
                    f"{target.name} is waited for {target.timeout_seconds:g} s, and the saga's deadline is after "
                    f"{self._saga.deadline_seconds:g} s: give the contract a shorter timeout",
                )
        elif target.undo is None and not target.irreversible and not self._is_past_pivot:
            self.add(
                function,
                line,
                "no-compensation",
                f"{target.name} is called before the pivot, and nothing undoes it: give it a compensation, declare it "
                "irreversible=True if that is meant, or call run.pivot() before it",
            )

    def passes_pivot(self) -> None:
        """From here on nothing is undone."""
        self._is_past_pivot = True


class _Walker(ast.NodeVisitor):
    """One function, in the order of its source."""

    def __init__(self, body: _Body, function: Callable[..., Any], offset: int, run: str | None) -> None:
        self._body = body
        self._function = function
        self._offset = offset
        self._run = run
        self._awaited: set[int] = set()
        closure = inspect.getclosurevars(function) if inspect.isfunction(function) else None
        self._names: dict[str, Any] = {**getattr(function, "__globals__", {}), **(closure.nonlocals if closure else {})}

    def walk(self, function: ast.stmt) -> None:
        """Its statements; not its decorators and defaults, which ran at import."""
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), ast.dump(function)
        for statement in function.body:
            self.visit(statement)

    def visit_Await(self, node: ast.Await) -> None:
        """Only operations of the run may be awaited, and functions that get it."""
        self._awaited.add(id(node.value))
        self.generic_visit(node)
        value = node.value
        if isinstance(value, ast.Call) and (self._is_of_run(value.func) or self._gets_run(value)):
            return
        self._add(
            node,
            "foreign-await",
            f"awaits {ast.unparse(value)[:80]}: a body may await nothing but run(...) and run.*; make it a step",
        )

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        """As an await."""
        self._add(node, "foreign-await", "uses async with: a body may await nothing but run(...) and run.*")
        self.generic_visit(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        """As an await."""
        self._add(node, "foreign-await", "uses async for: a body may await nothing but run(...) and run.*")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Steps, the pivot, what is not repeatable, and functions of the user's own."""
        self.generic_visit(node)
        if self._is_of_run(node.func):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "pivot":
                self._body.passes_pivot()
            return
        called = self._value(node.func)
        if isinstance(called, Target):
            self._body.is_called(called, self._function, self._offset + node.lineno)
            return
        kind = _NOT_REPEATABLE.get(id(called)) or self._clock(node.func)
        if kind is not None:
            problem = f"calls {ast.unparse(node.func)}, which is another one when the body is run again"
            self._add(node, "not-repeatable", f"{problem}: use {_RUN_INSTEAD[kind]}, or make it a step")
        elif id(called) in _CONCURRENT and id(node) not in self._awaited:
            problem = f"calls {_CONCURRENT[id(called)]}: a body has no event loop"
            self._add(node, "foreign-await", f"{problem}; use run.sleep, run.parallel, or make it a step")
        elif inspect.isfunction(called) and called.__module__ == self._function.__module__:
            self._body.walk(called, run=self._parameter(called, node))

    # -------------------------------------------------------------------------------------------- names

    def _is_of_run(self, node: ast.expr) -> bool:
        """Whether it is `run` or `run.something`."""
        root = node.value if isinstance(node, ast.Attribute) else node
        return self._run is not None and isinstance(root, ast.Name) and root.id == self._run

    def _gets_run(self, node: ast.Call) -> bool:
        return any(self._is_of_run(argument) for argument in (*node.args, *(word.value for word in node.keywords)))

    def _parameter(self, called: Callable[..., Any], node: ast.Call) -> str | None:
        """What a called function calls the run, if it gets it."""
        for word in node.keywords:
            if word.arg is not None and self._is_of_run(word.value):
                return word.arg
        names = list(inspect.signature(called).parameters)
        return next(
            (name for name, argument in zip(names, node.args, strict=False) if self._is_of_run(argument)),
            None,
        )

    def _clock(self, node: ast.expr) -> str | None:
        """`datetime.now` and its like: a new object each time it is looked at."""
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._value(node.value)
        is_clock = any(owner is kind and node.attr in names for kind, names in _CLOCKS.items())
        return "the time" if is_clock else None

    def _value(self, node: ast.expr) -> Any:
        """What a dotted name stands for; None where that is not known before it runs."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            is_plain = inspect.ismodule(owner) or inspect.isclass(owner)
            return getattr(owner, node.attr, None) if is_plain else None
        return None

    def _add(self, node: ast.expr | ast.stmt, rule: str, problem: str) -> None:
        self._body.add(self._function, self._offset + node.lineno, rule, problem)
