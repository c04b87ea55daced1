"""The relay in a process of its own, for checkouts without the command `outbox relay`."""

import asyncio
import gc
import logging
import signal

import asyncpg

from outbox import Relay
from outbox.settings import Settings


async def main() -> None:
    """Relay until SIGTERM."""
    settings = Settings()
    async with asyncpg.create_pool(settings.database_url.get_secret_value(), min_size=1, max_size=8) as pool:
        relay = Relay(pool, settings.kafka, settings=settings)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, relay.stop)
        async with relay:
            gc.collect()
            gc.freeze()
            await relay.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
