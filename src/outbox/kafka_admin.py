"""Facts about topics, and the one topic that we create: the side door to Kafka, through aiokafka's admin client."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from outbox import crash_sites
from outbox.kafka import KafkaError

log = logging.getLogger(__name__)

ERRORS: Final = (KafkaError, OSError, TimeoutError, IndexError, ValueError)
"""What a question about topics may raise; not every broker knows each."""

_SITES: Final = {name: crash_sites.register(f"kafka.{name}") for name in ("limit", "create")}
_TIMEOUT_SECONDS: Final = 20.0
_REPLICAS_MAX: Final = 3


async def create_compacted(servers: str, topic: str) -> None:
    """Create a topic of one partition that keeps the newest record of each key, unless it exists.

    Raises:
        KafkaError, OSError, TimeoutError: it could not be created.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    refused: list[tuple[type[Exception], str]] = []
    await crash_sites.visit(_SITES["create"], "before")
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await admin.start()
            if topic not in await admin.list_topics():
                replicas = min(len((await admin.describe_cluster())["brokers"]), _REPLICAS_MAX)
                wanted = NewTopic(topic, 1, replicas, topic_configs={"cleanup.policy": "compact"})
                answer = await admin.create_topics([wanted])
                refused = [(errors.for_code(code), name) for name, code, *_ in answer.topic_errors if code]
    finally:
        await admin.close()
    await crash_sites.visit(_SITES["create"], "after")
    for error, name in refused:
        if error is not errors.TopicAlreadyExistsError:
            raise error(f"creating topic {name}")


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """How a topic is set up.

    Attributes:
        config: settings by Kafka's name; some brokers tell only those that differ from their defaults.
        replicas: of the partition that has fewest.
        brokers: in the cluster.
    """

    topic: str
    config: Mapping[str, str]
    replicas: int
    brokers: int


async def describe(servers: str, topics: Iterable[str]) -> list[TopicFacts]:
    """How these topics are set up; those that do not exist are left out, and not created by being asked for.

    Raises:
        KafkaError, OSError, TimeoutError, IndexError, ValueError: the broker does not tell.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await crash_sites.visit(_SITES["limit"], "before")
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await admin.start()
            existing = sorted(set(topics) & set(await admin.list_topics()))
            asked = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in existing]
            answers: list[Any] = await admin.describe_configs(asked) if asked else []
            described = await admin.describe_topics(existing) if asked else []
            brokers = len((await admin.describe_cluster())["brokers"])
    finally:
        await admin.close()
    await crash_sites.visit(_SITES["limit"], "after")
    configs = {resource[3]: resource[4] for answer in answers for resource in answer.resources}
    return [
        TopicFacts(
            found["topic"],
            {name: str(value) for name, value, *_ in configs.get(found["topic"], ()) if value is not None},
            min((len(partition["replicas"]) for partition in found["partitions"]), default=0),
            brokers,
        )
        for found in described
    ]


async def max_message_bytes(servers: str, topic: str) -> int | None:
    """A topic's `max.message.bytes`; None where the broker does not tell."""
    try:
        found = await describe(servers, [topic])
    except ERRORS as error:
        log.info("the broker does not tell the record limit of topic %s: %r", topic, error)
        return None
    limit = found[0].config.get("max.message.bytes", "") if found else ""
    return int(limit) if limit.isdigit() else None
