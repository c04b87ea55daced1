"""A consumer in a process of its own, keeping the account cache: `python -m tests.support.follower`.

Told by the environment what `Follower` was told. Ends at SIGTERM.
"""

import asyncio
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

import asyncpg

from outbox import Consumer
from outbox.embedded.process import ServerProcess
from outbox.settings import Settings
from tests.support.load import account_cache

_ROOT: Final = Path(__file__).parents[2]
_TOPIC: Final = "FOLLOWED_TOPIC"
_CONNECTIONS: Final = 6
SESSION_SECONDS: Final = 2.0
READY: Final = "follower started"


class Follower:
    """One process that is started, killed and started again; its log goes on."""

    def __init__(self, url: str, servers: str, topic: str) -> None:
        """Nothing runs yet."""
        self._process = ServerProcess("follower", Path(tempfile.mkdtemp(prefix="sagabox-follower-")))
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SAGABOX_")},
            "DATABASE_URL": url,
            "KAFKA_BOOTSTRAP_SERVERS": servers,
            _TOPIC: topic,
            "SAGABOX_SESSION_TIMEOUT_SECONDS": str(SESSION_SECONDS),
            "PYTHONPATH": str(_ROOT),
        }

    def start(self) -> None:
        """Start it; it works when it works."""
        self._process.spawn([sys.executable, "-m", "tests.support.follower"], environment=self._environment)

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self._process.running

    @property
    def log(self) -> str:
        """What it logged, over all its lives."""
        return self._process.log.read_text(errors="replace")

    def kill(self) -> int | None:
        """SIGKILL; how it ended."""
        self._process.kill()
        return self._process.exit_status

    def dispose(self) -> None:
        """End it and remove its log."""
        self._process.kill()
        self._process.dispose()


async def _main() -> None:
    settings = Settings()
    url = settings.database_url.get_secret_value()
    async with (
        asyncpg.create_pool(url, min_size=0, max_size=_CONNECTIONS) as pool,  # the database may be down
        Consumer(pool, settings.kafka, account_cache(os.environ[_TOPIC]), settings=settings) as consumer,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        logging.getLogger(__name__).info(READY)
        await consumer.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    asyncio.run(_main())
