"""Plays a plan, looks after each step, and tells its story."""

import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Final

from outbox.cache.fold import ROW_MISSING
from outbox.consumer.apply import Outcome
from outbox.event import kind_of
from outbox.testing.plan import Again, Batch, Fate, PageRead, Plan
from outbox.testing.scratch import DiedError, Page, Record, Scratch
from outbox.testing.stream import Shown, shown_text

_LOG: Final = "1-0000"
_FIRST_ID: Final = 1000

REMEDY: Final = (
    "\n  Let a key's first event bring a full row. If the owner has the rows already, declare the cache with owner=... "
    "and give some of them to converges as existing=[...]"
)


class Diverged(Exception):
    """A plan after which the table is wrong; the text says which row."""


async def play(scratch: Scratch, plan: Plan) -> str | None:
    """Play a plan, and tell its story if the table is wrong at any step; None if it never is."""
    await scratch.empty()
    run = Run(scratch, plan)
    try:
        await run.play()
    except Diverged as problem:
        return f"{run.story()}\n\n{problem}"
    return None


class Run:
    """One plan at work."""

    def __init__(self, scratch: Scratch, plan: Plan) -> None:
        self._scratch = scratch
        self._stream = scratch.stream
        self._plan = plan
        self._kafka: list[Record] = []
        self._numbers: list[int] = []
        """By offset: the event's place in the plan's order."""
        self._published = 0
        self._read = 0
        """How many events the owner's latest page has."""
        self._at = 0
        self._consumer = 0
        self._told: list[str] = []
        begins_empty = not self._stream.existing
        self._newest: dict[str, int | None] = dict.fromkeys(self._stream.lives, 0 if begins_empty else None)
        """How many of a key's events its row has to show; None while nothing but patches of an unknown row came."""
        seen: Counter[str] = Counter()
        self._counts: list[int] = []
        """By place: which one of its key's events it is."""
        for number in plan.order:
            seen[self._stream.keys[number]] += 1
            self._counts.append(seen[self._stream.keys[number]])

    async def play(self) -> None:
        """All of its steps, and then whatever is left.

        Raises:
            Diverged: a row is wrong.
        """
        self._partition = await self._scratch.claim(0)
        for step in self._plan.steps:
            if isinstance(step, Batch):
                await self._batch(step.size, step.fate)
            elif isinstance(step, Again):
                self._again(step.first)
            else:
                await self._page(step)
        left = len(self._plan.order) - self._published + len(self._kafka) - self._at
        if left:
            await self._batch(left, Fate.APPLIED)
        if self._stream.existing:
            await self._page(PageRead(len(self._plan.order), None))
            await self._check_parked()
            await self._check()

    def story(self) -> str:
        """What happened so far, to the events that had a part in it."""
        seen = max(self._published, self._read)
        events = [
            f"  {place}  {self._stream.named(number)}" for place, number in enumerate(self._plan.order[:seen], start=1)
        ]
        told = [f"  - {line}" for line in self._told]
        return "\n".join(["the events, in the order that they were published in:", *events, "what happened:", *told])

    # ------------------------------------------------------------------------------------------------- steps

    def _publish(self, place: int) -> None:
        number = self._plan.order[place]
        event = self._stream.events[number]
        kind = kind_of(type(event))
        where = f"{_LOG}/0/{place + 1}/1/{place + 1}/{_FIRST_ID + self._plan.ids[place]}"
        headers: list[tuple[str, bytes | None]] = [
            ("ce_id", str(uuid.UUID(int=place)).encode()),
            ("ce_type", kind.type.encode()),
            ("ob-pos", where.encode()),
        ]
        if kind.schema_version != 1:
            headers.append(("ob-schema-version", b"%d" % kind.schema_version))
        key = self._stream.keys[number].encode()
        self._kafka.append(Record(len(self._kafka), key, event.model_dump_json().encode(), headers))
        self._numbers.append(place)

    def _again(self, first: int) -> None:
        places = range(min(first, self._published), self._published)
        for place in places:
            self._publish(place)
        if places:
            self._told.append(f"{_events(places)} published once more")

    async def _batch(self, size: int, fate: Fate) -> None:
        while len(self._kafka) < self._at + size and self._published < len(self._plan.order):
            self._publish(self._published)
            self._published += 1
        records = self._kafka[self._at : self._at + size]
        if not records:
            return
        places = self._numbers[self._at : self._at + size]
        self._told.append(f"{_events(places)} in one batch" + (f": {fate.value}" if fate.value else ""))
        outcome = await self._applied(records, fate)
        self._at += len(records)
        if outcome.parked and not self._stream.existing:
            await self._check_parked()
        for place in places:
            number = self._plan.order[place]
            if not self._stream.existing or self._stream.is_whole[number]:
                self._learn(self._stream.keys[number], self._counts[place])
        await self._check()

    async def _applied(self, records: Sequence[Record], fate: Fate) -> Outcome:
        if fate is Fate.TAKEN_OVER:
            former, self._consumer = self._consumer, 1 - self._consumer
            taken = await self._scratch.claim(self._consumer)
            if not (await self._scratch.apply(former, self._partition, records, Fate.APPLIED)).fenced:
                raise Diverged("a batch of the former consumer was applied after another one had claimed the partition")
            self._partition = taken
        elif fate is not Fate.APPLIED:
            try:
                outcome = await self._scratch.apply(self._consumer, self._partition, records, fate)
            except DiedError:
                outcome = None
            self._consumer = 1 - self._consumer
            self._partition = await self._scratch.claim(self._consumer)
            if outcome is not None:
                await self._scratch.apply(self._consumer, self._partition, records, Fate.APPLIED)
                return outcome
        return await self._scratch.apply(self._consumer, self._partition, records, Fate.APPLIED)

    async def _page(self, step: PageRead) -> None:
        names = list(self._stream.lives)
        self._read = max(self._read, step.after)
        keys = None if step.keys is None else [names[number] for number in step.keys]
        had: Counter[str] = Counter(self._stream.keys[number] for number in self._plan.order[: step.after])
        rows = [self._stream.lives[key].rows[had[key]] for key in keys or names]
        page = Page(_LOG, self._snapshot(step.after), [row.model_dump() for row in rows if row is not None])
        when = f"after event {step.after}" if step.after else "before event 1"
        self._told.append(f"the owner's rows of {'all keys' if keys is None else ', '.join(keys)}, read {when}, merged")
        await self._scratch.merge_page(page, keys)
        for key in keys or names:
            self._learn(key, had[key])
        await self._check()

    def _snapshot(self, committed: int) -> str:
        seen = {_FIRST_ID + number for number in self._plan.ids[:committed]}
        xmax = max(seen, default=_FIRST_ID - 1) + 1
        in_progress = sorted(set(range(_FIRST_ID, xmax)) - seen)
        return f"{in_progress[0] if in_progress else xmax}:{xmax}:{','.join(map(str, in_progress))}"

    # ------------------------------------------------------------------------------------------------ looking

    def _learn(self, key: str, count: int) -> None:
        self._newest[key] = max(self._newest[key] or 0, count)

    async def _check(self) -> None:
        rows = await self._scratch.rows()
        for key, life in self._stream.lives.items():
            newest, found = self._newest[key], rows.get(key)
            if found == (None if newest is None else life.shown[newest]):
                continue
            if self._stream.existing and found in life.shown[newest or 0 :]:
                self._newest[key] = life.shown.index(found, newest or 0)
                continue
            expected = None if newest is None else life.shown[newest]
            raise Diverged(f"row {key}\n  expected: {_row(expected)}\n  found:    {_row(found)}")
        for key in rows.keys() - self._stream.lives.keys():
            raise Diverged(f"row {key}\n  expected: {_row(None)}\n  found:    {_row(rows[key])}")

    async def _check_parked(self) -> None:
        for key, why in (await self._scratch.parked()).items():
            remedy = REMEDY if why.startswith(ROW_MISSING.reason) else ""
            raise Diverged(f"key {key} was parked\n  {why}{remedy}")


def _events(places: Sequence[int]) -> str:
    numbers = [place + 1 for place in places]
    if len(numbers) == 1:
        return f"event {numbers[0]}"
    if list(range(numbers[0], numbers[-1] + 1)) == numbers:
        return f"events {numbers[0]} to {numbers[-1]}"
    return f"events {', '.join(map(str, numbers))}"


def _row(shown: Shown) -> str:
    return "no row" if shown is None else ", ".join(f"{name}={shown_text(value)}" for name, value in shown.items())
