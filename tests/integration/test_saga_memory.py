"""The journal in memory answers as the one on PostgreSQL does, whatever is done in whatever order.

`saga.testing` and the tests of the decider rest on it: what `explore` finds nothing wrong with runs on this journal.
"""

import random
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID, uuid4

import pytest

from outbox import Pool
from saga.journal import claim, record_late, start, write
from saga.state import Checkpoint, Claimed, Late, PlanRow, intents_from_json
from saga.testing.memory import MemoryJournal
from tests.support.saga_journal import NOW, checkpoint, intent, living, shop, starts, task

STEPS: Final = 120
INSTANCES: Final = 4


class Both:
    """The same instances in both journals, and what workers believe about them."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.chance = random.Random(seed)
        self.memory = MemoryJournal()
        self.owner = uuid4()
        self.held: dict[UUID, Claimed] = {}
        self.no: dict[UUID, int] = {}
        self.seen: dict[UUID, int] = {}
        self.last: dict[UUID, Checkpoint] = {}
        self.log: list[str] = []

    @property
    def ids(self) -> Sequence[UUID]:
        return list(self.memory.rows)

    async def begin(self) -> None:
        await living(self.pool, self.owner, seconds=600)
        made = starts(*(f"k{n}" for n in range(INSTANCES)))
        await start(self.pool, made)
        for one in made:
            self.memory.start(shop, one.id, one.request, NOW)

    async def step(self) -> None:
        acts = [
            self.claim,
            self.write,
            self.write,
            self.write,
            self.again,
            self.signal,
            self.cancel,
            self.late,
            self.take_over,
        ]
        acts += [self.lock, self.release, self.resume]
        await self.chance.choice(acts)()

    # ---------------------------------------------------------------------------------------- what may be done

    async def claim(self) -> None:
        leases = {
            lease.claimed.id: lease.claimed for lease in await claim(self.pool, self.owner, 10, [shop.workflow_id])
        }
        for one in self.ids:
            expected = self.memory.claim(one, "w")
            found = leases.get(one)
            assert (found is None) == (expected is None), (self.log, one)
            if found is not None and expected is not None:
                assert _facts(found) == _facts(expected), self.log
                self.held[one], self.no[one], self.seen[one] = found, found.checkpoint_no, found.mailbox.wakeups
        self.log.append(f"claim {len(leases)}")

    async def write(self) -> None:
        if not self.held:
            return
        one = self.chance.choice(list(self.held))
        await self.send(self.compose(one))

    async def again(self) -> None:
        if self.last:
            await self.send(self.last[self.chance.choice(list(self.last))])

    def compose(self, one: UUID) -> Checkpoint:
        claimed, no = self.held[one], self.no[one]
        kinds: list[dict[str, Any]] = [
            {"state": "running", "next": (intent("ship"),)},
            {"state": "running", "open": (intent("charge"),), "next": (intent("ship"),)},
            {"state": "waiting", "held": False, "wake_at": NOW},
            {"state": "waiting", "held": False, "strict": True},
            {"state": "running", "pivoted": True},
            {"state": "paused", "held": False, "paused_reason": "a bug"},
            {"state": "completed", "held": False, "output": "1"},
            {"state": "compensating", "ending": "failed", "error": "no", "plan_next": (_plan("executing"),)},
            {"state": "compensating", "ending": "failed", "held": False, "plan": (_plan("completed"),)},
            {"state": "failed", "ending": "failed", "held": False, "plan_next": (_plan("completed"),)},
        ]
        rows = (task(no * 2 + 1), task(no * 2 + 2, is_next=True)) if self.chance.random() < 0.7 else ()
        columns = self.chance.choices(kinds, [6, 3, 6, 3, 1, 1, 1, 2, 2, 1])[0]
        return checkpoint(claimed, no=no, seen=self.seen[one], rows=rows, **columns)

    async def send(self, given: Checkpoint) -> None:
        (written,) = await write(self.pool, [given])
        answer = written.answer
        expected = self.memory.write(given)
        assert answer is not None
        assert answer.kind == expected.kind, (self.log, given, answer, expected)
        self.log.append(f"{given.state}{' strict' if given.strict else ''}: {answer.kind}")
        if answer.kind == "fenced":
            self.held.pop(given.id, None)
            self.last.pop(given.id, None)
            return
        assert answer == expected
        if answer.kind in ("applied", "news"):
            self.last[given.id] = given
            if given.id in self.held and self.no[given.id] == given.no:
                self.no[given.id] += 1
                if answer.kind == "applied" and not given.held:
                    del self.held[given.id]
        self.seen[given.id] = answer.wakeups

    async def signal(self) -> None:
        one = self.chance.choice(self.ids)
        if self.memory.rows[one].state in ("completed", "failed", "cancelled"):
            return
        assert await self.pool.fetchval("select saga.tell($1, 'signal', 'S', null, '{}')", one) == "accepted"
        self.memory.tell(one, "signal", "S", "{}", NOW)
        self.log.append("signal")

    async def cancel(self) -> None:
        n = self.chance.randrange(INSTANCES)
        await self.pool.fetchval("select saga.cancel('shop', $1, 'why')", f"k{n}")
        self.memory.cancel(self.ids[n], "why")
        self.log.append("cancel")

    async def late(self) -> None:
        one, epoch = self.chance.choice(self.ids), self.chance.randrange(1, 6)
        path = self.chance.choice(["charge#1", "ship#1"])
        await record_late(self.pool, one, epoch, Late(path=path, output="1"))
        self.memory.record_late(one, epoch, Late(path=path, output="1"))
        self.log.append(f"late {path}")

    async def take_over(self) -> None:
        if self.chance.random() < 0.7:
            return
        await self.pool.execute("delete from saga.workers")
        await self.pool.execute("select saga.take_over(100)")
        await living(self.pool, self.owner, seconds=600)
        for one in self.ids:
            self.memory.take_over(one)
        self.log.append("take over")

    async def lock(self) -> None:
        if self.held:
            one = self.chance.choice(list(self.held))
            epoch = await self.pool.fetchval("select lease_epoch from saga.workflow_instances where id = $1", one)
            found = await self.pool.fetchval("select saga.acquire($1, $2, 'x', 'lock#1')", one, epoch)
            assert (found == "granted") == self.memory.acquire(one, "x", "lock#1"), self.log
            self.log.append(f"lock {found}")

    async def release(self) -> None:
        one = self.chance.choice(self.ids)
        await self.pool.execute("select saga.release_locks($1)", one)
        self.memory.release_locks(one, NOW)
        self.log.append("release")

    async def resume(self) -> None:
        paused = [one for one, row in self.memory.rows.items() if row.state == "paused"]
        for one in paused:
            await self.pool.execute(
                "update saga.workflow_instances"
                " set state = 'waiting', paused_reason = null, ready_at = now() where id = $1",
                one,
            )
            self.memory.resume(one)

    # ---------------------------------------------------------------------------------------- the same?

    async def compare(self) -> None:
        for one, row in self.memory.rows.items():
            found = await self.pool.fetchrow(
                """select i.state, i.ready_at is not null as is_ready, i.lease_owner is not null as is_held,
                          i.lease_epoch, i.checkpoint_no, i.wakeups, i.crash_count, i.cancel_reason, i.pivoted,
                          i.ending, i.wake_at is not null as has_timer, i.paused_reason,
                          i.intents::text as intents, i.output::text as output,
                          array(select t.path from saga.tasks t where t.instance_id = i.id and t.seq > 0 order by t.seq)
                              as paths,
                          (select count(*) from saga.signals s where s.instance_id = i.id) as mail,
                          (select count(*) from saga.late_results r where r.instance_id = i.id) as late,
                          array(select c.status::text from saga.saga_compensations c where c.instance_id = i.id)
                              as plan,
                          (select count(*) from saga.locks l where l.instance_id = i.id and l.granted_at is not null)
                              as locks
                     from saga.workflow_instances i where i.id = $1""",
                one,
            )
            assert found is not None
            assert dict(found) | {"intents": _paths(found["intents"])} == {
                "state": row.state,
                "is_ready": row.is_ready,
                "is_held": row.owner is not None,
                "lease_epoch": row.epoch,
                "checkpoint_no": row.no,
                "wakeups": row.wakeups,
                "crash_count": row.crash_count,
                "cancel_reason": row.cancel_reason,
                "pivoted": row.pivoted,
                "ending": row.ending,
                "has_timer": row.wake_at is not None,
                "paused_reason": row.paused_reason,
                "intents": _paths(row.intents),
                "output": row.output,
                "paths": [one.path for one in row.tasks],
                "mail": len(row.mail),
                "late": len(row.late),
                "plan": [planned.status for planned in row.plan.values()],
                "locks": len(row.locks),
            }, self.log


def _plan(status: Any) -> PlanRow:
    return PlanRow(position=1, task_seq=1, path="charge#1", name="charge", kind="step", action="refund", status=status)


def _paths(intents: str | None) -> list[str]:
    return [one.path for one in intents_from_json(intents)]


def _facts(claimed: Claimed) -> tuple[Any, ...]:
    return (
        claimed.epoch,
        claimed.checkpoint_no,
        claimed.fresh,
        claimed.state,
        claimed.ending,
        claimed.pivoted,
        claimed.mailbox.wakeups,
        claimed.mailbox.cancel_reason,
        [one.path for one in claimed.tasks],
        [one.path for one in claimed.intents],
        [one.kind for one in claimed.mailbox.mail],
        len(claimed.mailbox.late),
        claimed.has_locks,
    )


@pytest.mark.parametrize("seed", range(4))
async def test_both_journals_answer_alike(saga_pool: Pool, seed: int) -> None:
    both = Both(saga_pool, seed)
    await both.begin()
    for _ in range(STEPS):
        await both.step()
        await both.compare()
