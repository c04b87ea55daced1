"""The fold of a cache: pure, without a database, and equal to applying events one by one."""

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from outbox import DELETE, Cache, CacheDeclarationError, Delete, Event, Patch
from outbox.cache.fold import ROW_MISSING, Fault, Step, fold, newest_log_only
from outbox.wire import Position
from tests.support.caching import (
    AgentDeleted,
    AgentIgnored,
    AgentNamePatched,
    AgentRenamed,
    AgentTagged,
    CachedAgent,
    make_cache,
)

AGENT = UUID(int=1)
POISON = Fault("Poison", "")


def test_the_rows_after_events() -> None:
    a, b = uuid4(), uuid4()
    events = [
        AgentRenamed(agent_id=a, agent_name="x"),
        AgentRenamed(agent_id=b, agent_name="y"),
        AgentTagged(agent_id=a, tags=["t"]),
        AgentIgnored(agent_id=b),
        AgentNamePatched(agent_id=a, agent_name="z"),
    ]
    expected = [CachedAgent(agent_id=a, agent_name="z", tags=["t"]), CachedAgent(agent_id=b, agent_name="y")]
    assert make_cache().fold(events) == expected


def test_deleted_and_missing_rows_are_absent() -> None:
    a, b = uuid4(), uuid4()
    events: list[Event] = [AgentRenamed(agent_id=a, agent_name="x"), AgentDeleted(agent_id=a)]
    events += [AgentTagged(agent_id=a, tags=["t"]), AgentTagged(agent_id=b, tags=["t"])]
    assert make_cache().fold(events) == []


def test_what_a_handler_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="a bug in the handler"):
        make_cache().fold([AgentRenamed(agent_id=uuid4(), agent_name="explode")])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (CachedAgent(agent_id=uuid4(), agent_name="another"), "KeyMismatch"),
        (Patch(uuid4(), agent_name="another"), "KeyMismatch"),
        (Patch(AGENT, agent_nam="misspelt"), "HandlerError"),
        (Patch(AGENT, agent_id=uuid4()), "HandlerError"),
        (Patch(AGENT), "HandlerError"),
        (None, "HandlerError"),
        (AgentDeleted(agent_id=AGENT), "HandlerError"),
    ],
)
def test_an_answer_that_does_not_fit(answer: object, reason: str) -> None:
    cache = Cache(CachedAgent, table="t", key="agent_id", topic="llm.agents")

    @cache.on
    def deleted(event: AgentDeleted) -> Delete:
        return answer  # type: ignore[return-value]

    with pytest.raises(CacheDeclarationError, match=reason):
        cache.fold([AgentDeleted(agent_id=AGENT)])


def test_a_patch_is_validated_like_a_row() -> None:
    class Counted(BaseModel):
        agent_id: UUID
        count: int

    cache = Cache(Counted, table="t", key="agent_id", topic="llm.agents")

    @cache.on
    def renamed(event: AgentRenamed) -> Counted:
        return Counted(agent_id=event.agent_id, count=0)

    @cache.on
    def patched(event: AgentNamePatched) -> Patch:
        return Patch(str(event.agent_id), count=event.agent_name)

    events = [AgentRenamed(agent_id=AGENT, agent_name="-"), AgentNamePatched(agent_id=AGENT, agent_name="7")]
    assert cache.fold(events) == [Counted(agent_id=AGENT, count=7)]
    with pytest.raises(ValueError, match="integer"):
        cache.fold([AgentNamePatched(agent_id=AGENT, agent_name="seven")])


def test_a_fault_and_what_follows_it_queue_until_a_full_row() -> None:
    row = CachedAgent(agent_id=AGENT, agent_name="row")
    patch = Patch(AGENT, agent_name="patch")
    steps = [Step(effect, None) for effect in (row, POISON, patch)]
    folded = fold(steps)
    assert (folded.base, folded.last, folded.queue, folded.fault) == (row, steps[0], steps[1:], POISON)
    healed = fold([*steps, Step(row, None)])
    assert (healed.base, list(healed.queue)) == (row, [])
    only = fold(steps[1:])
    assert (only.base, only.last, list(only.queue)) == (None, None, steps[1:])


def test_a_patch_after_a_deletion_queues() -> None:
    steps = [Step(DELETE, None), Step(Patch(AGENT, agent_name="x"), None)]
    folded = fold(steps)
    assert (folded.base, folded.fault, list(folded.queue)) == (DELETE, ROW_MISSING, steps[1:])


def test_only_the_newest_log_counts() -> None:
    def at(log_id: str) -> Position:
        return Position(log_id, 0, 1, 1, 1, 1)

    logs = ["1-aaaa", "3-cccc", "2-bbbb", None, "3-cccc"]
    steps = [Step(DELETE, at(log_id) if log_id else None) for log_id in logs]
    assert newest_log_only(steps) == [steps[0], steps[1], steps[3], steps[4]]


EFFECTS = st.one_of(
    st.builds(lambda name: CachedAgent(agent_id=AGENT, agent_name=name, tags=[name]), st.sampled_from("abc")),
    st.just(DELETE),
    st.builds(lambda name: Patch(AGENT, agent_name=name), st.sampled_from("abc")),
    st.builds(lambda name: Patch(AGENT, tags=[name]), st.sampled_from("abc")),
    st.just(POISON),
)


@given(st.lists(EFFECTS, min_size=1, max_size=8), st.integers(1, 8))
def test_the_fold_of_a_batch_equals_its_events_one_by_one(effects: list[object], split: int) -> None:
    """Whatever the batches, the row and the queue come out the same."""

    def run(batches: list[list[object]]) -> tuple[object, list[object]]:
        row: object = DELETE
        queue: list[object] = []
        for batch in batches:
            steps = [Step(effect, None) for effect in batch]  # type: ignore[arg-type]
            folded = fold(steps)
            if folded.base is None and (queue or row is DELETE):
                queue += [step.effect for step in steps]
                continue
            if folded.base is not None:
                row, queue = folded.base, []
            elif isinstance(row, CachedAgent):
                row = row.model_copy(update=dict(folded.columns))
            queue += [step.effect for step in folded.queue]
        return row, queue

    assert run([effects[i : i + split] for i in range(0, len(effects), split)]) == run([[e] for e in effects])
