"""Records and their headers: ours come back as they were, anybody else's raise nothing; partitions are Kafka's."""

from aiokafka.partitioner import DefaultPartitioner
from hypothesis import example, given
from hypothesis import strategies as st

from outbox import kafka, wire
from outbox.wire import Envelope, Position

bigints = st.integers(0, 2**63 - 1)
positions = st.builds(
    Position,
    st.builds("{:x}-{:04x}".format, st.integers(1, 2**60 - 1), st.integers(0, 2**16 - 1)),
    st.integers(0, 63),
    bigints,
    bigints,
    bigints,
    bigints,
)
plain_text = st.text(st.characters(exclude_categories=["Cs"]))
raw_headers = st.lists(
    st.tuples(
        st.sampled_from(["ce_id", "ce_type", "ce_source", "ob-pos", "ob-schema-version", "other", ""]) | plain_text,
        st.none() | st.binary(max_size=40) | st.sampled_from([b"1/2/3/4/5/6", b"a-b/0/1/1/1/1", b"9" * 5_000]),
    ),
    max_size=6,
)


@given(positions)
def test_a_position_comes_back(at: Position) -> None:
    prefix = wire.position_prefix(at.log_id, at.shard, at.window)
    header = prefix + b"%d/%d/%d" % (at.ordinal, at.position, at.transaction_id)
    assert wire.parse_position(header) == at
    assert at.mark == (at.window, at.ordinal)
    assert at.log_ordinal == int(at.log_id.split("-")[0], 16)


@given(positions, plain_text, plain_text.filter(bool), st.integers(1, 32_767))
def test_an_envelope_comes_back(at: Position, source: str, event_type: str, schema_version: int) -> None:
    headers: list[tuple[str, bytes | None]] = [
        *wire.type_headers(source, event_type, schema_version),
        ("ce_id", b"id"),
        ("ob-pos", "/".join(map(str, at)).encode()),
    ]
    assert wire.envelope_of(headers) == Envelope("id", event_type, schema_version, source, at)


def test_version_one_needs_no_header() -> None:
    assert [name for name, _ in wire.type_headers("db", "a", 1)] == [
        "ce_specversion",
        "ce_type",
        "ce_source",
        "content-type",
    ]
    assert wire.type_headers("db", "a", 2)[-1] == ("ob-schema-version", b"2")


@given(raw_headers)
@example([("ob-schema-version", b"9" * 5_000)])
@example([("ob-schema-version", b"-1")])
@example([("ob-pos", b"\xff/\xff/1/1/1/1")])
@example([("ob-pos", b"zz-0000/0/1/1/1/1"), ("ce_type", b"\xff")])
def test_foreign_headers_raise_nothing(headers: list[tuple[str, bytes | None]]) -> None:
    envelope = wire.envelope_of(headers)
    assert envelope.schema_version >= 0
    for text in (envelope.event_id, envelope.event_type, envelope.source):
        assert text is None or text.encode() is not None


@given(st.binary(max_size=60))
def test_any_bytes_are_a_position_or_none(header: bytes) -> None:
    at = wire.parse_position(header)
    assert at is None or header.count(b"/") == 5


def test_logs_are_ordered_by_their_ordinals() -> None:
    assert wire.log_ordinal("") == 0
    assert wire.log_ordinal("9-ffff") < wire.log_ordinal("10-0000")


@given(plain_text, st.integers(1, 500))
def test_the_partition_is_that_of_every_kafka_client(key: str, count: int) -> None:
    partitions = list(range(count))
    chosen = DefaultPartitioner()(key.encode(), partitions, partitions)
    assert kafka.partition_hash(key) % count == chosen


def test_known_hashes() -> None:
    """From Kafka's own tests of murmur2."""
    known = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536, "abc": 479470107}
    assert {key: kafka.partition_hash(key) for key in known} == {key: n & 0x7FFFFFFF for key, n in known.items()}
