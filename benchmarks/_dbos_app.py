"""DBOS as its guide has it: a workflow calls steps, threads call it. URL, workflows at a time, connections, count.

Its other form, coroutines, was tried and is slower: all of its statements run in threads anyhow.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS

from benchmarks._peer_clock import STEPS, Clock

clock = Clock()


def work(order: str, number: int) -> str:
    """A step."""
    return clock.work(order, number)


step = DBOS.step()(work)


def three(order: str) -> str:
    """A workflow of three steps."""
    result = ""
    for number in range(1, STEPS + 1):
        result = step(order, number)
    return result


def main(url: str, concurrent: int, connections: int, count: int) -> None:
    """Run so many, so many at a time."""
    database = url.replace("postgresql://", "postgresql+psycopg://", 1)
    config = {"name": "bench", "system_database_url": database, "log_level": "ERROR", "sys_db_pool_size": connections}
    DBOS(config=config)
    workflow = DBOS.workflow()(three)
    DBOS.launch()
    with ThreadPoolExecutor(concurrent) as threads:
        list(threads.map(workflow, [f"warm-up {number}" for number in range(2 * concurrent)]))
        clock.begin()
        list(threads.map(workflow, [str(number) for number in range(count)]))
        clock.end()
    DBOS.destroy()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
