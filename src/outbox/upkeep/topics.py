"""Settings of topics that would break a promise, said once when a relay or a consumer starts.

`lint` is pure: from what Kafka tells about a topic, and what we do with it, to findings. Settings that a broker does
not tell are its defaults, and are not judged. `report` asks and logs; it never stops anybody.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from outbox import kafka_admin, limits
from outbox.kafka_admin import TopicFacts

log = logging.getLogger(__name__)

_DAY_MILLISECONDS: Final = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What we do with a topic.

    Attributes:
        is_published: our relay writes to it.
        is_transactional: and does so in transactions.
        needs_every_record: a cache is fed from it by handlers that change some columns of a row, or an inbox.
        emit_max_bytes: the largest record that emit lets through.
    """

    is_published: bool = False
    is_transactional: bool = False
    needs_every_record: bool = False
    emit_max_bytes: int = limits.RECORD_MAX_BYTES


@dataclass(frozen=True, slots=True)
class Finding:
    """One setting that will not do: what it is, what comes of it, and what to do."""

    topic: str
    setting: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"topic {self.topic}: {self.setting}: {self.problem}; {self.remedy}"


def lint(facts: TopicFacts, use: Use) -> list[Finding]:
    """What is unsafe about a topic, for this use of it."""
    checks: tuple[Callable[[TopicFacts, Use], Iterator[tuple[str, str, str]]], ...] = (
        _compaction,
        _retention,
        _replication,
        _size,
    )
    return [Finding(facts.topic, *found) for check in checks for found in check(facts, use)]


def _compaction(facts: TopicFacts, use: Use) -> Iterator[tuple[str, str, str]]:
    policy = facts.config.get("cleanup.policy", "delete")
    if "compact" not in policy:
        return
    setting = f"cleanup.policy={policy}"
    if use.is_published and not use.is_transactional:
        yield (
            setting,
            "a record that a stalled relay delivers late may outlive newer ones of its key",
            "set cleanup.policy=delete, or let the relay write in transactions",
        )
    if use.needs_every_record:
        yield (
            setting,
            "compaction keeps a key's last record, and an inbox, or a handler that returns a Patch, needs all of them",
            "set cleanup.policy=delete, or publish whole rows",
        )


def _retention(facts: TopicFacts, _use: Use) -> Iterator[tuple[str, str, str]]:
    milliseconds = _number(facts.config, "retention.ms")
    if "delete" in facts.config.get("cleanup.policy", "delete") and 0 <= milliseconds < _DAY_MILLISECONDS:
        yield (
            f"retention.ms={milliseconds}",
            "a consumer that is down for longer misses records for ever, and its caches have to be rebuilt",
            f"keep records for a day at least: retention.ms={_DAY_MILLISECONDS}",
        )


def _replication(facts: TopicFacts, _use: Use) -> Iterator[tuple[str, str, str]]:
    if facts.replicas == 1 and facts.brokers > 1:
        yield (
            "replication factor 1",
            f"records are lost with one of the {facts.brokers} brokers",
            "raise it to 3 and set min.insync.replicas=2",
        )
    if facts.replicas > 1 and _number(facts.config, "min.insync.replicas") == 1:
        yield (
            "min.insync.replicas=1",
            "a record counts as published when one broker has it, and is lost with that one",
            "set min.insync.replicas=2",
        )
    if facts.config.get("unclean.leader.election.enable") == "true":
        yield (
            "unclean.leader.election.enable=true",
            "a broker that was left behind may become leader and take published records back",
            "set it to false",
        )


def _size(facts: TopicFacts, use: Use) -> Iterator[tuple[str, str, str]]:
    limit = _number(facts.config, "max.message.bytes")
    if use.is_published and 0 <= limit < use.emit_max_bytes:
        yield (
            f"max.message.bytes={limit}",
            f"emit lets events of up to {use.emit_max_bytes} bytes through, and what the topic does not take is parked",
            f"raise it, or let emit refuse earlier: put {limit} into max_message_bytes of the topic in outbox.topics",
        )


def _number(config: Mapping[str, str], setting: str) -> int:
    """A setting's number; -1, which is also how Kafka says that there is no bound, where it is not told."""
    value = config.get(setting, "")
    return int(value) if value.isdigit() else -1


async def report(servers: str, uses: Mapping[str, Use]) -> None:
    """Log what is unsafe about these topics, a line each."""
    try:
        described = await kafka_admin.describe(servers, uses)
    except kafka_admin.ERRORS as error:
        log.info("the settings of topics are not checked: %r", error)
        return
    for finding in findings(described, uses):
        log.warning("%s", finding)


def findings(described: Iterable[TopicFacts], uses: Mapping[str, Use]) -> list[Finding]:
    """What is unsafe about all of these topics."""
    return [finding for facts in described for finding in lint(facts, uses[facts.topic])]
