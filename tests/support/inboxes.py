"""An inbox over the vocabulary of `caching`, whose handler writes each effect down and emits what it did."""

from uuid import UUID

from outbox import Event, Inbox, Key, Pool, Transaction
from tests.support.caching import TOPIC, AgentDeleted, AgentNamePatched, AgentRenamed

NAME = "notification"


class Notified(Event, topic="notifications", type="agent.notified"):
    agent_id: Key[UUID]
    note: str


class ExplodedError(Exception):
    """Raised by the handler on demand."""


def make_inbox(name: str = NAME, *, replays: bool = False) -> Inbox:
    """An inbox; the name `explode` makes its handler raise, and the table refuses the name `forbidden`."""
    inbox = Inbox(name, topic=TOPIC, replays=replays)

    @inbox.on
    async def note(tx: Transaction, event: AgentRenamed | AgentNamePatched) -> None:
        tx.emit(Notified(agent_id=event.agent_id, note=event.agent_name))
        await tx.execute("insert into notes (agent_id, note) values ($1, $2)", event.agent_id, event.agent_name)
        if event.agent_name == "explode":
            raise ExplodedError("a bug in the handler")

    @inbox.on
    async def gone(tx: Transaction, event: AgentDeleted) -> None:
        await tx.execute("insert into notes (agent_id, note) values ($1, 'gone')", event.agent_id)

    return inbox


async def create_notes(pool: Pool) -> None:
    """The table of `make_inbox`; ids tell in which order effects came."""
    await pool.execute(
        "create table notes (id bigint generated always as identity, agent_id uuid not null, "
        "note text not null check (note <> 'forbidden'))"
    )


async def notes(pool: Pool) -> list[tuple[UUID, str]]:
    """The effects, in order."""
    return [(row["agent_id"], row["note"]) for row in await pool.fetch("select agent_id, note from notes order by id")]


async def notes_of(pool: Pool, agent: UUID) -> list[str]:
    """The effects for one agent, in order."""
    return [note for of, note in await notes(pool) if of == agent]


async def emitted(pool: Pool) -> list[tuple[str, str]]:
    """Key and note of what the inbox emitted, in the order of the log."""
    rows = await pool.fetch(
        "select key, convert_from(payload, 'utf8')::jsonb ->> 'note' as note from outbox.events order by position"
    )
    return [(row["key"], row["note"]) for row in rows]
