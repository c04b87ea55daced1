"""Relays that break one rule, each of which some crash must bring to light: the proof that the sweep sees anything."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from outbox import Connection
from outbox.relay import shard, window
from outbox.relay.publish import Publisher


def done_before_acknowledged() -> None:
    """Report a window as done when it is handed to Kafka."""
    publisher: Any = Publisher
    publisher.done_through = property(lambda self: self._last)


def no_replay() -> None:
    """Take for done whatever was logged."""
    load = window.load

    async def load_as_done(connection: Connection, number: int) -> window.Resume:
        resume = await load(connection, number)
        return replace(resume, done_through=resume.last_window)

    module: Any = window
    module.load = load_as_done


def publish_before_logged() -> None:
    """Publish a window, then log it."""

    async def _log(self: Any, span: window.Span, rows: Any) -> None:
        await self._submit(window.Window(self._number + 1, self._log_id, list(enumerate(rows, 1))))
        await self._publisher.room(1)
        progress = self._publisher.take_progress()
        await window.log(self._connection, self._lease, self._number + 1, span, progress)
        self._number += 1
        self._persisted(progress)
        self._cursor = span.s2

    tenure: Any = shard._Tenure
    tenure._log = _log


MUTANTS: Final[Mapping[str, Callable[[], None]]] = {
    mutant.__name__: mutant for mutant in (done_before_acknowledged, no_replay, publish_before_logged)
}
