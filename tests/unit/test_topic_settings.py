"""Which settings of a topic are unsafe, for which use."""

from collections.abc import Mapping

import pytest

from outbox.kafka_admin import TopicFacts
from outbox.upkeep.topics import Use, lint

SAFE: Mapping[str, str] = {
    "cleanup.policy": "delete",
    "retention.ms": "604800000",
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "max.message.bytes": "1048588",
}
RELAY = Use(is_published=True)
CONSUMER = Use()


def facts(replicas: int = 3, brokers: int = 3, **changed: str) -> TopicFacts:
    config = {**SAFE, **{name.replace("_", "."): value for name, value in changed.items()}}
    return TopicFacts("agents", config, replicas, brokers)


@pytest.mark.parametrize("use", [RELAY, CONSUMER, Use(needs_every_record=True)])
@pytest.mark.parametrize(
    "safe",
    [
        facts(),
        facts(retention_ms="-1"),
        facts(retention_ms="86400000"),
        facts(replicas=1, brokers=1, min_insync_replicas="1"),
        TopicFacts("agents", {}, 1, 1),  # a broker that tells nothing
    ],
)
def test_safe(safe: TopicFacts, use: Use) -> None:
    assert lint(safe, use) == []


@pytest.mark.parametrize(
    ("unsafe", "use", "setting"),
    [
        (facts(cleanup_policy="compact"), RELAY, "cleanup.policy=compact"),
        (facts(cleanup_policy="compact,delete"), Use(needs_every_record=True), "cleanup.policy=compact,delete"),
        (facts(retention_ms="86399999"), CONSUMER, "retention.ms=86399999"),
        (facts(replicas=1), RELAY, "replication factor 1"),
        (facts(min_insync_replicas="1"), RELAY, "min.insync.replicas=1"),
        (facts(unclean_leader_election_enable="true"), CONSUMER, "unclean.leader.election.enable=true"),
        (facts(max_message_bytes="999999"), RELAY, "max.message.bytes=999999"),
        (
            facts(max_message_bytes="1048588"),
            Use(is_published=True, emit_max_bytes=2_000_000),
            "max.message.bytes=1048588",
        ),
    ],
)
def test_unsafe(unsafe: TopicFacts, use: Use, setting: str) -> None:
    """One line: which topic, what it is, what comes of it, what to do."""
    (finding,) = lint(unsafe, use)
    assert finding.setting == setting
    assert str(finding).startswith(f"topic agents: {setting}: ")
    assert str(finding).count("\n") == 0
    assert finding.problem
    assert finding.remedy


@pytest.mark.parametrize(
    ("harmless", "use"),
    [
        (facts(cleanup_policy="compact", retention_ms="1"), CONSUMER),
        (facts(cleanup_policy="compact"), Use(is_published=True, is_transactional=True)),
        (facts(max_message_bytes="999999"), CONSUMER),
        (facts(max_message_bytes="600"), Use(is_published=True, emit_max_bytes=600)),
    ],
)
def test_unsafe_for_another_use_only(harmless: TopicFacts, use: Use) -> None:
    assert lint(harmless, use) == []
