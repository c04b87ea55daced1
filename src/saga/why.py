"""Why an instance stands where it stands, in one sentence, and what a person can do about it.

Read from the journal alone. The state says what kind of sentence it is; the rest comes from what is open: calls without
a result, the compensation that is next, locks, the receive or sleep that the last checkpoint named.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from saga.inspection import Instance, Undo
from saga.operate import BY_PERSON
from saga.state import Intent


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """The sentence, and what to do; nothing where nothing has to be done."""

    text: str
    remedy: str | None = None
    needs_person: bool = False


def why(found: Instance) -> Why:
    """What it waits for, or why it is paused, or how it ended."""
    if found.state == "paused":
        return _paused(found)
    if found.lease_owner is not None:
        return _held(found)
    if found.ready_at is not None:
        return _ready(found)
    if found.state not in ("compensating", "waiting"):
        return _ended(found)
    because = _compensating(found) if found.state == "compensating" else _waiting(found)
    if found.servers == 0 and found.wake_at is not None and found.wake_at <= found.now:
        return Why(
            text=f"{because.text} That has come, and {_nobody(found)}", remedy=_start_one(found), needs_person=True
        )
    return because


# ------------------------------------------------------------------------------------------------ ended


def _ended(found: Instance) -> Why:
    moment = f" at {clock_time(found.completed_at)}" if found.completed_at else ""
    if found.state == "completed":
        return Why(text=f"It completed{moment}, and waits for nothing.")
    left = [row.path for row in found.plan if row.status == "failed"]
    text = f"It {'was cancelled' if found.state == 'cancelled' else 'failed'}{moment}: {_end(found.error)}"
    if left:
        return Why(text=f"{text} What it had done was undone, except {', '.join(left)}, which need not be.")
    return Why(text=f"{text} {'What it had done was undone.' if found.plan else 'There was nothing to undo.'}")


# ------------------------------------------------------------------------------------------------ running, ready


def _held(found: Instance) -> Why:
    worker = found.worker or str(found.lease_owner)
    if found.worker_alive_until is None or found.worker_alive_until <= found.now:
        lost = f" at {clock_time(found.worker_alive_until)}" if found.worker_alive_until else ""
        remedy = None if found.servers else _start_one(found)
        return Why(
            text=f"Its worker {worker} was lost{lost}; another one takes it over.",
            remedy=remedy,
            needs_person=remedy is not None,
        )
    pausing = f" It pauses when that has ended ({found.pause_asked})." if found.pause_asked else ""
    undo = found.undoing
    if undo is not None:
        return Why(text=f"Worker {worker} undoes {undo.path} with {undo.action}{_tried(undo.attempts)}.{pausing}")
    if found.open:
        calls = ", ".join(f"{one.path}{_tried(one.attempts)}" for one in found.open)
        return Why(text=f"Worker {worker} runs {calls}.{pausing}")
    done = found.tasks[-1].path or "the request" if found.tasks else "nothing"
    return Why(text=f"Worker {worker} runs it; the last thing that is written is {done}.{pausing}")


def _ready(found: Instance) -> Why:
    assert found.ready_at is not None
    if found.servers == 0:
        return Why(
            text=f"It wants a worker since {clock_time(found.ready_at)}, and {_nobody(found)}",
            remedy=_start_one(found),
            needs_person=True,
        )
    workers = "1 worker serves" if found.servers == 1 else f"{found.servers} workers serve"
    crashes = f" It was lost {found.crash_count} times without progress, so it runs alone." if found.crash_count else ""
    return Why(
        text=f"It is ready since {clock_time(found.ready_at)}; {workers} it, and the next free one takes it.{crashes}"
    )


def _nobody(found: Instance) -> str:
    return f"no living worker serves {found.name} version {found.version}."


def _start_one(found: Instance) -> str:
    return f"start a worker whose code has {found.name} version {found.version}: saga worker --app MODULE"


# ------------------------------------------------------------------------------------------------ waiting


def _waiting(found: Instance) -> Why:
    queued = [lock for lock in found.locks if lock.granted_at is None]
    if queued:
        lock = queued[0]
        holder = f"{lock.holder_name} {lock.holder_key!r} ({lock.holder_id})" if lock.holder_id else "nobody now"
        return Why(text=f"It waits for the lock {lock.key!r}, which {holder} has until it ends.{_or_deadline(found)}")
    if found.open:
        return Why(text=f"It waits for {' and '.join(_call(found, one) for one in found.open)}.{_or_deadline(found)}")
    kind, _, path = (found.waits_for or "").partition(" ")
    name = path.rpartition("/")[2].partition("#")[0]
    if kind == "sleep":
        return Why(text=f"It sleeps{_until(found.wake_at)}.{_or_deadline(found)}")
    if kind == "receive":
        return Why(
            text=f"It waits for the signal {name}{_until(found.wake_at)}.{_or_deadline(found)}",
            remedy=f"send it, if it does not come by itself: saga signal {found.id} {name} JSON",
        )
    return Why(text=f"It waits for mail or a timer{_until(found.wake_at)}.{_or_deadline(found)}")


def _call(found: Instance, call: Intent) -> str:
    if call.kind == "remote":
        participant, _, command = call.name.partition(".")
        return f"the reply of {participant} to {command} ({call.path}){_until(call.until)}"
    if call.kind == "child":
        child = next((one for one in found.children if one.key == f"{found.id}/{call.path}"), None)
        if child is None:
            return f"its child saga {call.path}"
        state = f"paused: {child.paused_reason}" if child.state == "paused" else child.state
        return f"its child saga {child.name} ({child.id}), which is {state}"
    what = "asking what became of" if call.phase == "probe" else "another attempt of"
    after = f" after {call.attempts} failed" if call.attempts and call.phase != "probe" else ""
    return f"{what} {call.path}{_at(call.not_before)}{after}{_because(call.error)}"


def _compensating(found: Instance) -> Why:
    undo = found.undoing
    if undo is None:
        return Why(text="Everything is undone, and its end is about to be written.")
    if undo.status == "executing" and undo.kind == "remote":
        participant, _, command = undo.name.partition(".")
        return Why(text=f"It waits for {participant} to undo {command} ({undo.path}){_until(undo.not_before)}.")
    if undo.status == "executing" and undo.kind == "child":
        return Why(text=f"It waits for its child saga {undo.path} to undo itself.")
    if undo.attempts == 0:
        return Why(
            text=f"It waits{_until(undo.not_before)}, until then the call {undo.path} may still have its effect; "
            f"{undo.action} undoes it then."
        )
    return Why(
        text=f"It waits for another attempt to undo {undo.path} with {undo.action}{_at(undo.not_before)} after "
        f"{undo.attempts} failed{_because(undo.error)}."
    )


# ------------------------------------------------------------------------------------------------ paused


def _paused(found: Instance) -> Why:
    reason = found.paused_reason or "nobody said why"
    return Why(text=f"It is paused: {_end(reason)}", remedy=_remedy(found, reason), needs_person=True)


_REMEDIES: Final = (
    (BY_PERSON, "let it go on"),
    ("crash loop", "find out what kills the worker (memory, a native crash in a step), mend it, then"),
    (
        "diverged at",
        "deploy the code that wrote this journal, or keep it as this version and make the changed body a new one; then",
    ),
    ("nothing is called", "bring the step back and deploy it, then"),
    ("rejected after the pivot", "nothing is undone after the pivot; change the body so that it goes on, then"),
)


def _remedy(found: Instance, reason: str) -> str:
    go_on = f"saga resume {found.id}"
    undo = found.undoing
    for beginning, remedy in _REMEDIES:
        if reason.startswith(beginning):
            return f"{remedy}: {go_on}"
    if undo is not None:
        return _remedy_of_undo(undo, go_on)
    if found.open:
        call = found.open[0]
        return (
            f"mend the cause and try again: {go_on}; or find out what became of it, and say so: {go_on} "
            f"--step {call.path} --result JSON --reason TEXT"
        )
    return f"mend the code, deploy it, then: {go_on}"


def _remedy_of_undo(undo: Undo, go_on: str) -> str:
    return (
        f"mend the cause and try {undo.action} again: {go_on}; or undo {undo.path} by hand, and then: {go_on} "
        f"--skip {undo.path} --reason TEXT"
    )


# ------------------------------------------------------------------------------------------------ words

_SHOWN_MAX_CHARACTERS: Final = 400


def clock_time(moment: datetime) -> str:
    """A moment for people."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _until(moment: datetime | None) -> str:
    return f" until {clock_time(moment)}" if moment is not None else ""


def _at(moment: datetime | None) -> str:
    return f" at {clock_time(moment)}" if moment is not None else ""


def _because(error: str | None) -> str:
    return f" ({error[:_SHOWN_MAX_CHARACTERS]})" if error else ""


def _tried(attempts: int) -> str:
    return f" (attempt {attempts + 1})" if attempts else ""


def _end(text: str | None) -> str:
    text = (text or "nobody said why").strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _or_deadline(found: Instance) -> str:
    """When its deadline ends the waiting, if that is soon enough to matter."""
    if found.pivoted or found.deadline_at > found.now + timedelta(days=365):
        return ""
    return f" Its deadline is {clock_time(found.deadline_at)}."
