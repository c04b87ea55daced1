"""Traffic for the LLM agent service: many writers at once, in every kind of transaction, some of them rolled back.

Run as a process: `python -m examples.agents.traffic --events 5000 --writers 8 --name w1 --report FILE`.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4, uuid5

import asyncpg

import outbox
from examples.agents import agent_service

POPULAR: Final = [uuid5(UUID(int=0), f"popular agent {number}") for number in range(20)]
"""Agents that exist from the start and that all writers of all processes change at once."""

EXERCISES: Final = (
    "created",
    "renamed",
    "archived in SQL",
    "deleted",
    "transactions rolled back",
    "savepoints rolled back",
    "asyncpg savepoints rolled back",
)
"""What must have happened for a run to say anything."""


class ChangedMindError(Exception):
    """Raised on purpose, to have a transaction or a savepoint rolled back."""


class Traffic:
    """What one process does, and what it remembers of it."""

    def __init__(self, pool: outbox.Pool, name: str, seed: int) -> None:
        self.done = Counter(dict.fromkeys(EXERCISES, 0))
        self.rolled_back: list[tuple[str, str, str]] = []
        """Agent, name and transaction id of every rename that was emitted and then rolled back."""
        self.events = 0
        self._pool = pool
        self._name = name
        self._random = random.Random(seed)
        self._names = 0
        self._mine: list[UUID] = []
        self._actions: dict[Callable[[], Awaitable[int]], int] = {
            self.create: 30,
            self.rename: 34,
            self.rename_two: 8,
            self.rename_twice: 5,
            self.archive: 5,
            self.delete: 8,
            self.roll_back: 4,
            self.roll_back_inner: 3,
            self.roll_back_savepoint: 3,
        }

    async def write(self, events: int, until: float) -> None:
        """One writer; stops when all writers together have committed that many events, or at that time."""
        while self.events < events and time.perf_counter() < until:
            await self.act(self._random.choices([*self._actions], [*self._actions.values()])[0])

    async def each_once(self) -> None:
        """Every action, so that none is left to chance."""
        for action in self._actions:
            await self.act(action)

    async def act(self, action: Callable[[], Awaitable[int]]) -> None:
        try:
            committed = await action()
        except (agent_service.AgentNotFoundError, asyncpg.DeadlockDetectedError):
            self.done["gave way to another writer"] += 1
        else:
            self.events += committed

    # ------------------------------------------------------------------------------------------ what commits

    async def create(self) -> int:
        agent_id = uuid4()
        await agent_service.create(self._pool, agent_id, self._new_name())
        self._mine.append(agent_id)
        self.done["created"] += 1
        return 1

    async def rename(self) -> int:
        await agent_service.rename(self._pool, self._some_agent(), self._new_name())
        self.done["renamed"] += 1
        return 1

    async def rename_two(self) -> int:
        """Two services calls that commit together."""
        async with outbox.transaction(self._pool) as tx:
            for agent_id in self._two_agents():
                await agent_service.rename(tx, agent_id, self._new_name())
        self.done["renamed"] += 2
        return 2

    async def rename_twice(self) -> int:
        """Two events of one key in one transaction."""
        agent_id = self._some_agent()
        async with outbox.transaction(self._pool) as tx:
            await agent_service.rename(tx, agent_id, self._new_name())
            await agent_service.rename(tx, agent_id, self._new_name())
        self.done["renamed"] += 2
        return 2

    async def archive(self) -> int:
        """A writer that has never heard of events: the table's trigger emits."""
        archived = await self._pool.execute(
            "update agents set status = 'archived' where id = $1 and status = 'active' and deleted_at is null",
            self._my_agent(),
        )
        if archived == "UPDATE 0":
            raise agent_service.AgentNotFoundError
        self.done["archived in SQL"] += 1
        return 1

    async def delete(self) -> int:
        await agent_service.delete(self._pool, self._my_agent())
        self.done["deleted"] += 1
        return 1

    # ------------------------------------------------------------------------------------------ what does not

    async def roll_back(self) -> int:
        """A whole transaction."""
        try:
            async with outbox.transaction(self._pool) as tx:
                await self._doomed_rename(tx, self._some_agent())
        except ChangedMindError:
            self.done["transactions rolled back"] += 1
        return 0

    async def roll_back_inner(self) -> int:
        """Half of a transaction: the inner one is a savepoint."""
        kept, dropped = self._two_agents()
        async with outbox.transaction(self._pool) as tx:
            await agent_service.rename(tx, kept, self._new_name())
            try:
                async with outbox.transaction(tx) as inner:
                    await self._doomed_rename(inner, dropped)
            except ChangedMindError:
                self.done["savepoints rolled back"] += 1
        return 1

    async def roll_back_savepoint(self) -> int:
        """The same with a savepoint that Sagabox did not open, and more work after it."""
        first, second = self._two_agents()
        async with outbox.transaction(self._pool) as tx:
            await agent_service.rename(tx, first, self._new_name())
            try:
                async with tx.connection.transaction():
                    await self._doomed_rename(tx, second)
            except ChangedMindError:
                self.done["asyncpg savepoints rolled back"] += 1
            await agent_service.rename(tx, second, self._new_name())
        return 2

    async def _doomed_rename(self, tx: outbox.Transaction, agent_id: UUID) -> None:
        name = self._new_name()
        await agent_service.rename(tx, agent_id, name)
        transaction_id = await tx.fetchval("select pg_current_xact_id()::text")
        self.rolled_back.append((str(agent_id), name, transaction_id))
        raise ChangedMindError

    # ------------------------------------------------------------------------------------------ choices

    def _new_name(self) -> str:
        self._names += 1
        return f"agent {self._name}-{self._names}"

    def _some_agent(self) -> UUID:
        return self._random.choice(POPULAR if self._random.random() < 0.3 or not self._mine else self._mine)

    def _two_agents(self) -> list[UUID]:
        """Two different agents, always locked in the same order, so that writers never deadlock."""
        one, other = self._some_agent(), self._random.choice(POPULAR)
        while other == one:
            other = self._random.choice(POPULAR)
        return sorted([one, other])

    def _my_agent(self) -> UUID:
        """An agent that nobody will ask for again."""
        if not self._mine:
            raise agent_service.AgentNotFoundError
        return self._mine.pop(self._random.randrange(len(self._mine)))


async def main(options: argparse.Namespace) -> dict[str, object]:
    """Write until the writers together have committed their events."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=options.writers) as pool:
        traffic = Traffic(pool, options.name, options.seed)
        await traffic.create()
        await traffic.each_once()
        until = time.perf_counter() + options.seconds
        async with asyncio.TaskGroup() as writers:
            for _ in range(options.writers):
                writers.create_task(traffic.write(options.events, until))
    return {"done": traffic.done, "rolled_back": traffic.rolled_back}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=5000, help="how many events to commit")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long at most")
    parser.add_argument("--writers", type=int, default=8, help="how many writers at once")
    parser.add_argument("--name", default="w", help="part of every agent's name, to tell processes apart")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, required=True, help="file for what was done and rolled back")
    options = parser.parse_args()
    options.report.write_text(json.dumps(asyncio.run(main(options))))
