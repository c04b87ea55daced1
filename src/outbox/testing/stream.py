"""The events of a test: what each does, and the rows that are to be expected. No database."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias
from uuid import UUID

from pydantic import BaseModel

from outbox.cache import DELETE, Cache, Patch, handlers
from outbox.cache.fold import patched
from outbox.event import Event, key_text, kind_of

Shown: TypeAlias = dict[str, Any] | None
"""A row by column, as PostgreSQL returns it."""


class Life:
    """One key: the rows that it has after each of its events."""

    def __init__(self, row: BaseModel | None) -> None:
        """Before the first event."""
        self.rows: list[BaseModel | None] = [row]
        self.shown: list[Shown] = []
        """The same, as PostgreSQL returns them."""

    def add(self, effect: object) -> None:
        """What its next event does; a patch of no row does nothing."""
        row = self.rows[-1]
        if isinstance(effect, Patch):
            row = None if row is None else patched(row, effect.columns)
        else:
            row = effect if isinstance(effect, BaseModel) else None
        self.rows.append(row)


class Stream:
    """The events of a test, what each does, and what is to be expected."""

    def __init__(self, cache: Cache[Any], events: Sequence[Event], existing: Iterable[BaseModel]) -> None:
        """Calls the handlers.

        Raises:
            AssertionError: a handler answers differently the second time.
        """
        self.events = events
        self.existing = {key_text(getattr(row, cache.key)): row for row in existing}
        self.lives = {key: Life(row) for key, row in self.existing.items()}
        self.keys: list[str] = []
        self.is_whole: list[bool] = []
        """By event: whether it says all there is to say of its key."""
        for event in events:
            kind = kind_of(type(event))
            key = key_text(getattr(event, kind.key_field))
            life = self.lives.setdefault(key, Life(None))
            self.keys.append(key)
            handler = cache.handlers.get(kind.type)
            if handler is None:
                life.rows.append(life.rows[-1])
                self.is_whole.append(False)
                continue
            effects = [handlers.call(handler, cache.shape, event, key) for _ in range(2)]
            if effects[0] != effects[1]:
                raise AssertionError(
                    f"{cache.table}: the handler of {kind.type} is no function of its event. Called twice with "
                    f"{event!r}, it answered first {effects[0]!r}, then {effects[1]!r}. Consumers call handlers again "
                    "after every crash: let it look at the event and nothing else"
                )
            life.add(effects[0])
            self.is_whole.append(effects[0] is DELETE or isinstance(effects[0], BaseModel))

    def named(self, number: int) -> str:
        """An event, for people."""
        event = self.events[number]
        kind = kind_of(type(event))
        payload = ", ".join(f"{name}={shown_text(value)}" for name, value in event if name != kind.key_field)
        return f"{kind.type} of {self.keys[number]}" + (f": {payload}" if payload else "")


def shown_text(value: object) -> str:
    """A value, for people."""
    return str(value) if isinstance(value, UUID) else repr(value)
