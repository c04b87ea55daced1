"""What a step costs beside few and beside many sagas that have ended: it should cost the same.

Both databases are on one server and measured in turn, so that a slow minute of the machine hits both.
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Final

from benchmarks.report import Report, percentile
from benchmarks.saga_ground import Ground, Plan, fresh
from benchmarks.sagas import THREE, run

_STEPS: Final = 3
_CONCURRENT: Final = 200
_BATCH: Final = 50_000
_TIME_LIMIT_SECONDS: Final = 600.0

# As the engine leaves them: ids in order of time, keys in none, a request and three results.
_FILL: Final = """
with ended as (
    insert into saga.workflow_instances (id, workflow_id, workflow_name, workflow_version, key, state, deadline_at,
                                         lease_epoch, checkpoint_no, claimed_no, output, input_digest, started_at,
                                         completed_at)
    select outbox.uuid7(), $1, 'three', 1, md5(n::text), 'completed', now() + interval '1 hour',
           1, 3, 0, '"done 3"', decode(md5(n::text), 'hex'), now(), now()
      from generate_series($2::int, $3::int) n
    returning id, key)
insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, digest, input, output, epoch, started_at)
select gen_random_uuid(), e.id, s, case s when 0 then '' else 'work#' || s end,
       case s when 0 then 'request' else 'work' end, case s when 0 then 'request' else 'step' end,
       case when s > 0 then decode(md5(e.key), 'hex') end,
       case when s > 0 then json_build_object('order', json_build_object('order', e.key), 'number', s) end,
       case s when 0 then json_build_object('order', e.key) else to_json('done ' || s) end,
       case when s > 0 then 1 else 0 end, case when s > 0 then now() end
  from ended e cross join generate_series(0, 3) s
"""


async def size(ground: Ground, plan: Plan, report: Report) -> None:
    """200 at a time, `plan.repeat` times beside each number of ended sagas."""
    report.section("200 at a time beside sagas that have ended")
    async with AsyncExitStack() as stack:
        grounds = {}
        for name, ended in (("10k", plan.ended_few), ("1m", plan.ended_many)):
            grounds[name] = await stack.enter_async_context(fresh(ground.databases))
            await _fill(grounds[name], ended)
        for _ in range(plan.repeat):
            for name, filled in grounds.items():
                await filled.pool.execute("checkpoint", timeout=_TIME_LIMIT_SECONDS)
                await _measure(filled, name, plan.sagas, report)
    growth = report["step_cost_1m_ms"] / report["step_cost_10k_ms"]
    report.add("step_cost_growth", growth, "ratio", plan.sagas * _STEPS)


async def _fill(ground: Ground, ended: int) -> None:
    batches = iter(range(1, ended + 1, _BATCH))

    async def fill() -> None:
        for first in batches:
            last = min(ended, first + _BATCH - 1)
            await ground.pool.execute(_FILL, THREE.workflow_id, first, last, timeout=_TIME_LIMIT_SECONDS)

    await asyncio.gather(fill(), fill())
    await ground.pool.execute("vacuum analyze", timeout=_TIME_LIMIT_SECONDS)


async def _measure(ground: Ground, name: str, count: int, report: Report) -> None:
    found = await run(ground, THREE, count, _CONCURRENT)
    report.add(f"step_cost_{name}_ms", 1_000 / found.per_second / _STEPS, "ms", count * _STEPS)
    report.add(f"saga_per_second_{name}", found.per_second, "sagas/s", count)
    report.add(f"step_p50_{name}_ms", percentile(found.gaps, 0.5) * 1_000, "ms", len(found.gaps))
    report.add(f"step_p99_{name}_ms", percentile(found.gaps, 0.99) * 1_000, "ms", len(found.gaps))
    report.add(f"wal_bytes_per_saga_{name}", found.wal_bytes / count, "bytes", count)
    report.add(f"cpu_ms_per_saga_{name}", found.cpu_seconds / count * 1_000, "ms", count)
    if found.server_cpu_seconds is not None:
        report.add(f"server_cpu_ms_per_saga_{name}", found.server_cpu_seconds / count * 1_000, "ms", count)
