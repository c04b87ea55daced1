"""The timeline of one instance on the terminal: one line for each thing that happened, in order of time."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from outbox.cli.status import age
from outbox.cli.visible import visible
from saga.inspection import Instance, Task, Undo
from saga.why import Why, clock_time

STYLES: Final = {
    "completed": "green",
    "rejected": "yellow",
    "unknown": "bold magenta",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "bold red",
    "compensating": "yellow",
    "executing": "cyan",
    "running": "cyan",
    "pending": "dim",
}
_TEXT_MAX_CHARACTERS: Final = 300
_BAR_COLUMNS: Final = 20
_BAR_NARROW_COLUMNS: Final = 8
_NARROW_COLUMNS: Final = 100
"""Below this the line of time is shorter, so that there is room for what happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line."""

    at: datetime | None
    """None: not yet."""
    since: datetime | None = None
    mark: str
    what: str
    state: str = ""
    detail: str = ""


def screen(found: Instance, columns: int) -> Group:
    """The instance and its timeline, for a terminal of so many columns."""
    parts: list[RenderableType] = [_headline(found), *_facts(found), Text(""), _timeline(found, columns), Text("")]
    return Group(*parts)


def sentence(because: Why) -> Iterator[Text]:
    """Why it stands where it stands; to be printed without breaking lines, or its commands could not be pasted."""
    yield Text(visible(because.text), style="bold red" if because.needs_person else "bold")
    if because.remedy is not None:
        yield Text.assemble(("what to do: ", "bold"), visible(because.remedy))


def _headline(found: Instance) -> Text:
    return Text.assemble(
        (visible(found.name), "bold"),
        f"/{found.version}  ",
        (visible(found.key), "bold"),
        "  ",
        (found.state, STYLES.get(found.state, "")),
        (f"  {found.id}", "dim"),
    )


def _facts(found: Instance) -> Iterator[Text]:
    end = found.completed_at or found.now
    took = age((end - found.created_at).total_seconds())
    ended = f"ended after {took}" if found.completed_at else f"{took} ago; deadline {clock_time(found.deadline_at)}"
    yield Text(f"started {clock_time(found.created_at)}, {ended}", style="dim")
    checkpoints = "1 checkpoint" if found.checkpoints == 1 else f"{found.checkpoints:,} checkpoints"
    facts = [checkpoints, f"claim {found.epoch:,}"]
    if found.worker is not None or found.lease_owner is not None:
        facts.append(f"worker {found.worker or found.lease_owner}")
    if found.crash_count:
        facts.append(f"lost {found.crash_count} times without progress")
    if found.pivoted:
        facts.append("past its pivot: nothing is undone any more")
    if found.cancel_reason is not None:
        facts.append(f"cancel asked for: {found.cancel_reason}")
    if found.parent_id is not None:
        facts.append(f"child of {found.parent_id} at {found.parent_path}")
    yield Text(visible("; ".join(facts)), style="dim")
    for lock in found.locks:
        if lock.granted_at is not None:
            yield Text(visible(f"has the lock {lock.key} since {clock_time(lock.granted_at)}"), style="dim")


def _timeline(found: Instance, columns: int) -> Table:
    events = sorted(_events(found), key=lambda event: (event.at is None, event.at or found.now))
    ends = [event.at for event in events if event.at is not None]
    first, last = found.created_at, max([*ends, found.created_at])
    bar = _BAR_COLUMNS if columns >= _NARROW_COLUMNS else _BAR_NARROW_COLUMNS
    longest = max((len(visible(event.what)) for event in events), default=0)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, width=bar)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", width=min(longest, columns * 2 // 5))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for event in events:
        when = f"+{age((event.at - first).total_seconds())}" if event.at else ""
        style = STYLES.get(event.state, "")
        table.add_row(
            Text(when, style="dim"),
            Text(_bar(event, first, last, bar), style=style),
            Text(event.mark, style=style),
            Text(visible(event.what)),
            Text(event.state, style=style),
            Text(visible(_cut(event.detail)), style="dim"),
        )
    return table


def _bar(event: Event, first: datetime, last: datetime, width: int) -> str:
    """Where on the line of time it lies."""
    span = (last - first).total_seconds()
    if event.at is None or span <= 0:
        return ""

    def column(moment: datetime) -> int:
        return min(width - 1, max(0, int((moment - first).total_seconds() / span * (width - 1))))

    end = column(event.at)
    begin = min(end, column(event.since)) if event.since is not None else end
    return " " * begin + ("━" * (end - begin + 1) if event.since is not None else "•")


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_MAX_CHARACTERS else f"{text[:_TEXT_MAX_CHARACTERS]} ..."


# ------------------------------------------------------------------------------------------------ events


def _events(found: Instance) -> Iterator[Event]:
    for task in found.tasks:
        yield _task(task)
    for row in found.plan:
        yield _undo(row)
    for intent in found.open:
        how = "asked about" if intent.phase == "probe" else "open"
        detail = ", ".join(filter(None, (f"{intent.attempts} failed" if intent.attempts else "", intent.error)))
        yield Event(at=None, mark="…", what=intent.path, state=how, detail=detail)
    for letter in found.mail:
        detail = letter.payload if letter.payload != "null" else ""
        yield Event(at=letter.created_at, mark="✉", what=f"{letter.kind} {letter.name}", detail=detail)
    for late in found.late:
        yield Event(at=late.created_at, mark="⚠", what=f"late result of {late.path}", detail=late.output or "")
    for lock in found.locks:
        if lock.granted_at is None:
            yield Event(at=None, mark="…", what=f"lock {lock.key}", state="queued", detail=lock.holder_key or "")
    for one in found.interventions:
        what = f"{one.action} {one.path}" if one.path else one.action
        yield Event(at=one.created_at, mark="☞", what=what, detail=f"{one.reason} ({one.database_user})")
    if found.completed_at is not None:
        yield Event(
            at=found.completed_at, mark="■", what=found.state, state="", detail=found.error or found.output or ""
        )


def _task(task: Task) -> Event:
    if task.kind == "request":
        return Event(at=task.completed_at, mark="▶", what="request", detail=task.output or "")
    attempts = f"{task.attempts} attempts; " if task.attempts > 1 else ""
    return Event(
        at=task.completed_at,
        since=task.started_at,
        mark="✓" if task.outcome == "completed" else "?" if task.outcome == "unknown" else "✗",
        what=task.path if task.kind != "pivot" else "pivot",
        state=task.outcome,
        detail=f"{attempts}{task.error or task.output or ''}",
    )


def _undo(row: Undo) -> Event:
    attempts = f"{row.attempts} attempts; " if row.attempts > 1 else ""
    told = f"skipped: {row.resolution}" if row.resolution else row.error or ""
    if row.not_before is not None and row.status == "pending":
        told = f"not before {row.not_before:%H:%M:%S}; {told}".removesuffix("; ")
    needed = "" if row.required or row.status != "failed" else "need not be; "
    return Event(
        at=row.executed_at if row.status in ("completed", "failed") else None,
        mark="↩",
        what=f"{row.action} ({row.path})",
        state=row.status,
        detail=f"{needed}{attempts}{told}",
    )
