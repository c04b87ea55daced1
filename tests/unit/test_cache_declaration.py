"""Misuse of a cache is told at import, with what to do."""

from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from outbox import Cache, CacheDeclarationError, Consumer, Delete, Event, Key, Patch
from tests.support.caching import AgentDeleted, AgentEvent, AgentRenamed, CachedAgent, make_cache


class Elsewhere(Event, topic="other", type="elsewhere"):
    id: Key[UUID]


def new_cache() -> Cache[CachedAgent]:
    return Cache(CachedAgent, table="t", key="agent_id", topic="llm.agents")


def unannotated(event):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return Delete.DELETE


def no_return(event: AgentRenamed):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return Delete.DELETE


def wrong_return(event: AgentRenamed) -> dict[str, object]:
    return {}


def no_event(event: str) -> Delete:
    return Delete.DELETE


def abstract(event: AgentEvent) -> Delete:
    return Delete.DELETE


def other_topic(event: Elsewhere) -> Delete:
    return Delete.DELETE


def two_parameters(event: AgentRenamed, more: int) -> Delete:
    return Delete.DELETE


async def awaits(event: AgentRenamed) -> Delete:
    return Delete.DELETE


def unknown_name(event: "Nowhere") -> Delete:  # type: ignore[name-defined]  # noqa: F821
    return Delete.DELETE


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        (unannotated, "needs one annotated parameter"),
        (no_return, "return annotation"),
        (wrong_return, "returns CachedAgent, Patch or Delete"),
        (no_event, "no Event"),
        (abstract, "abstract"),
        (other_topic, "the cache reads llm.agents"),
        (two_parameters, "one annotated parameter"),
        (awaits, "pure"),
        (unknown_name, "Nowhere"),
    ],
)
def test_a_handler_that_cannot_work(handler: Any, says: str) -> None:
    with pytest.raises(CacheDeclarationError, match=says):
        new_cache().on(handler)


def test_a_second_handler_for_a_type() -> None:
    cache = new_cache()

    @cache.on
    def both(event: AgentRenamed | AgentDeleted) -> CachedAgent | Patch | Delete:
        return Delete.DELETE

    with pytest.raises(CacheDeclarationError, match=r"agent\.deleted is handled by .*both already"):

        @cache.on
        def deleted(event: AgentDeleted) -> Delete:
            return Delete.DELETE

    assert set(cache.handlers) == {"agent.renamed", "agent.deleted"}


class Aliased(BaseModel):
    agent_id: UUID = Field(alias="agentId")


class Reserved(BaseModel):
    agent_id: UUID
    outbox_position: int


@pytest.mark.parametrize(
    ("row", "table", "key", "says"),
    [
        (dict, "t", "agent_id", "no pydantic model"),
        (CachedAgent, "t", "id", "has no field 'id'"),
        (CachedAgent, "relay", "agent_id", "another table"),
        (CachedAgent, "", "agent_id", "another table"),
        (Aliased, "t", "agent_id", "populate_by_name"),
        (Reserved, "t", "agent_id", "outbox_position"),
    ],
)
def test_a_row_that_cannot_work(row: Any, table: str, key: str, says: str) -> None:
    with pytest.raises(CacheDeclarationError, match=says):
        Cache(row, table=table, key=key, topic="t")


@pytest.mark.parametrize(
    ("targets", "says"),
    [((), "at least one"), ((new_cache(),), "no handlers"), ((make_cache(), make_cache()), "same table")],
)
def test_a_consumer_that_cannot_work(targets: tuple[Cache[Any], ...], says: str) -> None:
    pool: Any = None
    with pytest.raises(CacheDeclarationError, match=says):
        Consumer(pool, "kafka:9092", *targets)


def test_its_name_is_the_first_table_unless_given() -> None:
    pool: Any = None
    assert Consumer(pool, "k", make_cache("a"), make_cache("b")).name == "a"
    assert Consumer(pool, "k", make_cache("a"), group="workflow").name == "workflow"
