"""What persons do to sagas: start, signal, cancel, pause, resume, skip a compensation, say what a step's result was.

Each is one transaction that locks the instance's row first and counts a wake-up, so it is ordered with the checkpoints
of whoever has the instance. A crash before COMMIT leaves nothing of it. After a lost reply it may be said again:
another cancel changes nothing; pausing what is paused, and resuming what runs, are refused.

* *Pause*: an instance that no worker has is paused at once. A worker that has it lets the calls under way end and keeps
  their results, begins nothing new, and then pauses: so no outcome becomes unknown by it. If that worker dies, the next
  one pauses.
* *Resume*: the instance wants a worker. What made it pause is tried again: the body is run, the attempts of a required
  compensation that failed, or of a call that is stuck, begin anew. A cancel that was asked for meanwhile comes first.
* *Skip*: a compensation counts as done although it is not; the person has seen to it by other means. Where the plan is
  not made yet (the code of a step is gone, or a cancel is asked for and not acted upon) it is known when it is made.
* *Result*: a call whose outcome nobody knows has this result from now on; the journal cannot tell it from a real one.

Everything but start and signal leaves a row in `saga.interventions`, with the reason and the database user.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

from outbox import Connection, Pool, postgres
from outbox.postgres import Record
from saga import journal, limits
from saga.definition import Saga
from saga.errors import NotFound, NotPossible, NotWaiting
from saga.handle import Handle
from saga.state import ENDED, Intent, intents_from_json, intents_to_json, step_key, undo_key

SQL: Final = postgres.Statements("saga", "operate.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of an order."""

    id: UUID
    name: str
    key: str
    effect: Literal["requested", "recorded", "paused", "pausing", "resumed", "accepted", "duplicate"]


@asynccontextmanager
async def _locked(pool: Pool, instance_id: UUID) -> AsyncIterator[tuple[Connection, Record]]:
    """A transaction that has the instance's row.

    Raises:
        NotFound: there is no such instance.
    """
    async with postgres.acquire(pool) as connection, connection.transaction():
        row = await SQL.lock.fetchrow(connection, instance_id)
        if row is None:
            raise NotFound(f"there is no instance {instance_id}; see: saga list")
        yield connection, row


def _done(row: Record, effect: Any) -> Done:
    return Done(id=row["id"], name=row["workflow_name"], key=row["key"], effect=effect)


def _must_run(row: Record, what: str) -> None:
    if row["state"] in ENDED:
        raise NotWaiting(
            f"{_called(row)} has ended ({row['state']}), so it cannot be {what}; see: saga show {row['id']}"
        )


def _called(row: Record) -> str:
    return f"{row['workflow_name']} {row['key']!r}"


def text_of(reason: str) -> str:
    """A reason as it is kept.

    Raises:
        NotPossible: there is none.
    """
    reason = reason.replace("\x00", "\\x00").strip()[: limits.REASON_MAX_CHARACTERS]
    if not reason:
        raise NotPossible("the reason is empty; say why, those who look at the instance later need to know")
    return reason


async def start(pool: Pool, saga: Saga[Any, Any], request: str, key: str | None) -> Handle[Any]:
    """Start a saga with a request in JSON.

    Raises:
        PayloadError: the text is no such request.
        Conflict: the key was used with another request.
        Rejected: the body rejects this request at once.
        BodyError: the body has a bug that shows at once.
    """
    return await saga.start(pool, saga.request.read(request), key=key)


async def signal(pool: Pool, instance_id: UUID, name: str, payload: str, dedupe_key: str | None) -> Done:
    """Send a signal: the name of its class, and its fields in JSON.

    Raises:
        NotFound: there is no such instance.
        NotWaiting: it has ended.
        NotPossible: the payload is no JSON.
    """
    async with _locked(pool, instance_id) as (connection, row):
        _must_run(row, "sent a signal")
        answer = await journal.SQL.tell.fetchval(
            connection, instance_id, "signal", name, dedupe_key, json_text(payload, "signal")
        )
        return _done(row, answer)


async def cancel(pool: Pool, instance_id: UUID, reason: str) -> Done:
    """Ask for a cancel: `requested`; `recorded` where nothing follows from it, after the pivot or once it is undone.

    Raises:
        NotFound: there is no such instance.
        NotWaiting: it has ended.
    """
    reason = text_of(reason)
    async with _locked(pool, instance_id) as (connection, row):
        _must_run(row, "cancelled")
        answer = await journal.SQL.cancel.fetchval(connection, row["workflow_name"], row["key"], reason)
        await SQL.record.execute(connection, instance_id, "cancel", None, reason)
        return _done(row, answer)


async def pause(pool: Pool, instance_id: UUID, reason: str) -> Done:
    """Pause an instance: `paused`, or `pausing` where a worker has calls of it under way, which end first.

    Raises:
        NotFound: there is no such instance.
        NotWaiting: it has ended.
        NotPossible: it is paused already, for another reason that stays.
    """
    reason = text_of(reason)
    async with _locked(pool, instance_id) as (connection, row):
        _must_run(row, "paused")
        if row["state"] == "paused":
            raise NotPossible(f"{_called(row)} is paused already: {row['paused_reason']}")
        statement = SQL.ask_to_pause if row["has_worker"] else SQL.pause
        await statement.execute(connection, instance_id, f"{BY_PERSON}{reason}")
        await SQL.record.execute(connection, instance_id, "pause", None, reason)
        return _done(row, "pausing" if row["has_worker"] else "paused")


BY_PERSON: Final = "paused by a person: "


async def resume(pool: Pool, instance_id: UUID, reason: str) -> Done:
    """Let a paused instance go on.

    Raises:
        NotFound: there is no such instance.
        NotPossible: it is not paused.
    """
    async with _locked(pool, instance_id) as (connection, row):
        if row["pause_asked"] is None:
            _must_be_paused(row)
        await SQL.resume.fetchval(connection, instance_id)
        await SQL.record.execute(connection, instance_id, "resume", None, text_of(reason))
        return _done(row, "resumed")


def _must_be_paused(row: Record) -> None:
    if row["state"] != "paused":
        raise NotPossible(
            f"{_called(row)} is not paused, it is {row['state']}; see what it waits for: saga why {row['id']}"
        )


async def skip(pool: Pool, instance_id: UUID, step: str, reason: str) -> Done:
    """Take the compensation of a step for done, and let the instance go on.

    Args:
        pool: of the sagas' database.
        instance_id: a paused instance that is being undone.
        step: a path of its plan (`charge#1`), or the name of a step that stands there once; where there is no plan yet,
            of its journal.
        reason: why it need not be done any more; kept as the row's resolution.

    Raises:
        NotFound: there is no such instance.
        NotPossible: it is not paused, or is not being undone, or has no such row.
    """
    reason = text_of(reason)
    async with _locked(pool, instance_id) as (connection, row):
        _must_be_paused(row)
        if not row["goes_back"]:
            raise NotPossible(
                f"{_called(row)} is not being undone, so no compensation can be skipped; cancel it first, "
                "or say what its open call has brought: saga resume ID --step STEP --result JSON"
            )
        plan = await SQL.plan.fetch(connection, instance_id)
        work = _skip(connection, row, plan, step, reason) if plan else _skip_ahead(connection, row, step, reason)
        found = await work
        await SQL.record.execute(connection, instance_id, "skip", found, reason)
        await SQL.resume.fetchval(connection, instance_id)
        return _done(row, "resumed")


async def _skip(connection: Connection, row: Record, plan: Sequence[Record], step: str, reason: str) -> str:
    """Set a row of the plan to done; its path."""
    left = [one for one in plan if one["status"] != "completed"]
    found = _named(step, {one["path"]: one["name"] for one in left}, f"the plan of {_called(row)}")
    newest = max(one["round"] for one in left if one["path"] == found)
    await SQL.skip.execute(connection, row["id"], found, newest, reason)
    return found


async def _skip_ahead(connection: Connection, row: Record, step: str, reason: str) -> str:
    """Say of a step that its compensation is done, before there is a plan; its path."""
    calls = {one["path"]: one for one in await SQL.calls.fetch(connection, row["id"])}
    found = _named(step, {path: one["name"] for path, one in calls.items()}, f"the journal of {_called(row)}")
    ids = undo_key(row["id"], found, 0), step_key(row["id"], found)
    await SQL.skip_ahead.execute(connection, row["id"], *ids, found, calls[found]["name"], calls[found]["kind"], reason)
    return found


async def settle(
    pool: Pool, instance_id: UUID, step: str, result: str, reason: str, *, saga: Saga[Any, Any] | None = None
) -> Done:
    """Say what the result of an open call is, and let the instance go on.

    Args:
        pool: of the sagas' database.
        instance_id: a paused instance.
        step: the path of an open call, or its name where it is the only one.
        result: in JSON.
        reason: how that is known.
        saga: the code, where it is at hand: then a result that the step could not return is refused.

    Raises:
        NotFound: there is no such instance.
        NotPossible: it is not paused, has no such open call, or the result is no JSON.
        PayloadError: the step does not return such a result.
    """
    reason, result = text_of(reason), json_text(result, "result")
    async with _locked(pool, instance_id) as (connection, row):
        _must_be_paused(row)
        intents = intents_from_json(row["intents"])
        path = _named(step, {one.path: one.name for one in intents}, f"the open calls of {_called(row)}")
        call = next(one for one in intents if one.path == path)
        if call.kind == "child":
            child = step_key(instance_id, path)
            raise NotPossible(f"{path} is a saga of its own, and its result is what it returns: saga why {child}")
        if saga is not None and (target := saga.find(call.name)) is not None:
            target.result.read(result)
        await _settle(connection, instance_id, call, result)
        await SQL.keep_intents.execute(connection, instance_id, intents_to_json(tuple(i for i in intents if i != call)))
        await SQL.record.execute(connection, instance_id, "result", path, reason)
        await SQL.resume.fetchval(connection, instance_id)
        return _done(row, "resumed")


async def _settle(connection: Connection, instance_id: UUID, call: Intent, result: str) -> None:
    await SQL.settle.execute(
        connection,
        instance_id,
        step_key(instance_id, call.path),
        call.path,
        call.name,
        call.kind,
        call.digest,
        call.input,
        result,
        max(1, call.attempts),
        call.started_at,
    )


def _named(step: str, paths: dict[str, str], what: str) -> str:
    """The path that a person means: as it is written there, or the only one of that name."""
    if step in paths:
        return step
    found = [path for path, name in paths.items() if name == step]
    if len(found) == 1:
        return found[0]
    known = ", ".join(found or paths) or "nothing"
    problem = f"{step} stands there {len(found)} times" if found else f"{step} is not there"
    raise NotPossible(f"{what}: {problem}; name one of: {known}")


def json_text(text: str, what: str) -> str:
    """JSON that the journal can hold.

    Raises:
        NotPossible: it is none, or too large.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
        plain = json.dumps(value, ensure_ascii=False, allow_nan=False)
        plain.encode()
    except (ValueError, RecursionError) as error:
        raise NotPossible(
            f"the {what} is no JSON: {error}; quote it for the shell: '{{\"approved\": true}}'"
        ) from error
    if "\\u0000" in plain or len(plain.encode()) > limits.PAYLOAD_MAX_BYTES:
        raise NotPossible(f"the {what} has U+0000 in it, or more than {limits.PAYLOAD_MAX_BYTES:,} bytes")
    return text


def _refuse(literal: str) -> None:
    raise ValueError(f"{literal} is no number of JSON")
