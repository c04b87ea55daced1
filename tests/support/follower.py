"""A consumer in a process of its own, keeping the account cache: `python -m tests.support.follower`.

Told by the environment what `follower` was told. Ends at SIGTERM.
"""

import asyncio
import logging
import os
import signal
import sys
from typing import Final

import asyncpg

from outbox import Consumer
from outbox.settings import Settings
from tests.support.load import account_cache
from tests.support.program import Program

_TOPIC: Final = "FOLLOWED_TOPIC"
_CONNECTIONS: Final = 6
SESSION_SECONDS: Final = 2.0


def follower(url: str, servers: str, topic: str) -> Program:
    """A consumer that keeps the account cache in the database `url`."""
    environment = {
        "DATABASE_URL": url,
        "KAFKA_BOOTSTRAP_SERVERS": servers,
        _TOPIC: topic,
        "SAGABOX_SESSION_TIMEOUT_SECONDS": str(SESSION_SECONDS),
    }
    return Program("follower", [sys.executable, "-m", "tests.support.follower"], environment)


async def _main() -> None:
    settings = Settings()
    url = settings.database_url.get_secret_value()
    async with (
        asyncpg.create_pool(url, min_size=0, max_size=_CONNECTIONS) as pool,  # the database may be down
        Consumer(pool, settings.kafka, account_cache(os.environ[_TOPIC]), settings=settings) as consumer,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        logging.getLogger(__name__).info("follower started")
        await consumer.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    asyncio.run(_main())
