"""Spoils what a run left behind, so that everybody can see the verdict fail: a row, or a record, for each rule.

Each takes another victim: workflows that completed are in all four tables, so their order is the same in each.
"""

from collections.abc import Collection, Mapping
from typing import Final, LiteralString

from examples.agents.saga_verdict import Fault
from examples.agents.stage import Stage

RECORD: Final = "record"
"""A record of the topic is hidden from the judge."""

STATEMENTS: Final[Mapping[str, tuple[str, LiteralString]]] = {
    "cache": (
        "workflow_db",
        "delete from workflow_agent_cache where agent_id in (select agent_id from workflow_agent_cache limit 1)",
    ),
    Fault.SAGA_OPEN: (
        "workflow_db",
        """update saga.workflow_instances set state = 'waiting'
            where id in (select id from saga.workflow_instances where state = 'completed' order by key limit 1)""",
    ),
    Fault.EFFECT_LOST: (
        "notification_db",
        """delete from notifications where id in
           (select id from notifications where status = 'sent' order by workflow_id limit 1 offset 1)""",
    ),
    Fault.EFFECT_UNDONE: (
        "validation_db",
        """update validation_results set status = 'withdrawn' where id in
           (select id from validation_results where status = 'passed' order by workflow_id limit 1 offset 2)""",
    ),
    Fault.EFFECT_LEFT: (
        "llm_agent_db",
        """update executions set status = 'completed' where id in
           (select id from executions where status = 'cancelled' and workflow_id is not null limit 1)""",
    ),
    Fault.EFFECT_TWICE: (
        "workflow_db",
        """insert into workflow_results (workflow_id, agent_name, response)
           select workflow_id, agent_name, response from workflow_results where status = 'recorded'
            order by workflow_id limit 1 offset 3""",
    ),
    Fault.EFFECT_STRAY: (
        "llm_agent_db",
        "insert into executions (id, workflow_id, status) values (gen_random_uuid(), gen_random_uuid(), 'completed')",
    ),
}
"""In whose database, and what."""


async def spoil(stage: Stage, what: Collection[str]) -> None:
    """Spoil rows of the databases as chosen."""
    for name, (database, statement) in STATEMENTS.items():
        if name in what:
            await stage.databases[database].pool.execute(statement)
