"""Settings from `SAGABOX_*` environment variables; every field can also be given in code or by a command's flag."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from outbox import limits

Compression = Literal["none", "gzip", "snappy", "lz4", "zstd"]


class Settings(BaseSettings):
    """What an operator may change. Durations are seconds, sizes bytes."""

    model_config = SettingsConfigDict(env_prefix="SAGABOX_", extra="forbid", populate_by_name=True)

    database_url: SecretStr = Field(
        default=SecretStr("postgresql://localhost/postgres"), validation_alias="DATABASE_URL"
    )
    kafka: str = Field(default="localhost:9092", validation_alias="KAFKA_BOOTSTRAP_SERVERS")

    source: str | None = None
    """`ce_source` of published events; the database's name where it is not set."""
    window_max_events: Annotated[PositiveInt, Field(le=50_000)] = limits.WINDOW_MAX_EVENTS
    window_max_bytes: Annotated[PositiveInt, Field(ge=1_048_576)] = limits.WINDOW_MAX_BYTES
    """Payloads of one window; a window whose first event alone is larger holds that event."""
    windows_in_flight: Annotated[PositiveInt, Field(le=16)] = limits.WINDOWS_IN_FLIGHT
    batch_max_bytes: Annotated[PositiveInt, Field(ge=65_536)] = limits.BATCH_MAX_BYTES
    compression: Compression = "zstd"
    """zstd packs events best for its time; aiokafka uses lz4 at its slowest level, and no other can be chosen."""
    publish_timeout_seconds: PositiveFloat = limits.PUBLISH_TIMEOUT_SECONDS
    missing_topic_seconds: PositiveFloat = 30.0
    """How long a topic may be missing before the keys written to it are parked."""

    lease_seconds: Annotated[float, Field(ge=1.0)] = 4.0
    poll_min_seconds: PositiveFloat = 0.001
    """Between two reads while there is work: shorter is quicker, and costs a read and a logged window each time."""
    poll_max_seconds: PositiveFloat = 0.010
    idle_after_seconds: PositiveFloat = 0.1
    """Time without an event after which the relay stops polling and waits for a notification."""
    safety_poll_seconds: PositiveFloat = 5.0
    """An idle relay looks once in this time anyway: a dead connection delivers no notification."""
    wakeup: Literal["listen", "poll"] = "listen"
    """`poll` where the relay has no direct connection, as behind PgBouncer in transaction mode."""

    watermark_topic: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")] = "outbox.watermarks"
    """Where relays say how far they got, and consumers hear it: one name for all services that read each other."""
    watermark_seconds: PositiveFloat = 1.0
    """Between two watermarks of a shard; caches are known to be fresh at best to this."""
    max_clock_skew_seconds: Annotated[float, Field(ge=0.0)] = 0.5
    """By how much the clocks of an owner's database and of a cache's may differ; a cache counts as this much older."""

    session_timeout_seconds: Annotated[float, Field(ge=1.0, le=300.0)] = limits.SESSION_TIMEOUT_SECONDS
    """How long the brokers wait for a silent consumer before others get its partitions."""
    fetch_wait_seconds: Annotated[float, Field(ge=0.001, le=5.0)] = limits.FETCH_WAIT_SECONDS
    """How long the brokers hold a fetch while there is nothing new. Kafka answers it at the first record; a broker that
    does not, as the embedded one, makes a consumer late by up to this much."""

    drain_timeout_seconds: PositiveFloat = limits.DRAIN_TIMEOUT_SECONDS
