"""DBOS as its guide has it: a workflow calls steps, threads call it.

Its other form, coroutines, was tried and is slower: all of its statements run in threads anyhow.
"""

from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS

from benchmarks._peer_clock import STEPS, Clock, Order

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


def main(order: Order) -> None:
    """Run so many, so many at a time."""
    database = order.url.replace("postgresql://", "postgresql+psycopg://", 1)
    pool = {"sys_db_pool_size": order.connections}
    DBOS(config={"name": "bench", "system_database_url": database, "log_level": "ERROR", **pool})
    workflow = DBOS.workflow()(three)
    DBOS.launch()
    with ThreadPoolExecutor(order.concurrent) as threads:
        list(threads.map(workflow, [f"warm-up {number}" for number in range(2 * order.concurrent)]))
        clock.begin(order.go)
        list(threads.map(workflow, [str(number) for number in range(order.count)]))
        clock.end()
    DBOS.destroy()


if __name__ == "__main__":
    main(Order.read())
