"""The checker on hand-made histories: a good one, and for each anomaly a bad one that must get that name."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.wire import Position
from tests.support.checker import (
    EXAMPLES_MAX,
    Anomaly,
    BrokenTruthError,
    Change,
    History,
    Sample,
    TopicRecord,
    Verdict,
    judge,
)

LOG = "1f-beef"


def named(key: str, version: int, name: str) -> Change:
    return Change(key, version, f"{key}{version} {name}", {"name": name})


def deleted(key: str, version: int) -> Change:
    return Change(key, version, f"{key}{version} deleted", None)


def partition_of(key: str) -> int:
    return ord(key[0]) % 2


def published(changes: Sequence[Change], *, window: int = 1) -> list[TopicRecord]:
    """What a faultless relay makes of these changes, in their order, as one window."""
    offsets = {0: 0, 1: 0}
    records = []
    for ordinal, change in enumerate(changes, start=1):
        partition = partition_of(change.key)
        position = Position(LOG, 0, window, ordinal, position=100 + ordinal, transaction_id=700 + ordinal)
        event_id = f"event {change.identity}"
        records.append(TopicRecord(partition, offsets[partition], change.key, event_id, change.identity, position))
        offsets[partition] += 1
    return records


CHANGES = (
    named("a", 1, "Ada"),
    named("b", 1, "Bob"),
    named("a", 2, "Ann"),
    named("c", 1, "Cid"),
    named("a", 3, "Ada"),
    deleted("b", 2),
)
RECORDS = tuple(published(CHANGES))
GOOD = History(
    changes=CHANGES,
    records=RECORDS,
    partition_of=partition_of,
    rolled_back={"b2 Ben"},
    source={"a": {"name": "Ada"}, "c": {"name": "Cid"}},
    cache={"a": {"name": "Ada"}, "c": {"name": "Cid"}},
    samples=(
        Sample("a", None),
        Sample("b", {"name": "Bob"}),
        Sample("a", {"name": "Ada"}),
        Sample("b", None),
        Sample("a", {"name": "Ann"}),
        Sample("a", {"name": "Ada"}),
    ),
    happened={"rollbacks": 1},
)
A1, B1, A2, C1, A3, B2 = RECORDS


def with_records(*records: TopicRecord) -> History:
    return replace(GOOD, records=records)


def anomalies(history: History) -> dict[Anomaly, int]:
    verdict = judge(history)
    assert verdict.valid is not any(f.count for f in verdict.findings.values())
    return {anomaly: finding.count for anomaly, finding in verdict.findings.items() if finding.count}


def moved(
    record: TopicRecord, *, offset: int | None = None, partition: int | None = None, **position: int
) -> TopicRecord:
    """The record elsewhere in Kafka, or at another position of the log."""
    assert record.position is not None
    numbers = [position.get(name, getattr(record.position, name)) for name in Position._fields[1:]]
    return replace(
        record,
        offset=record.offset if offset is None else offset,
        partition=record.partition if partition is None else partition,
        position=Position(record.position.log_id, *numbers),
    )


def test_a_good_run_is_valid() -> None:
    verdict = judge(GOOD)
    assert anomalies(GOOD) == {}
    assert verdict.valid
    assert (verdict.committed, verdict.published, verdict.records, verdict.duplicates) == (6, 6, 6, 0)
    assert (verdict.keys, verdict.cached, verdict.rolled_back, verdict.samples) == (3, 2, 1, 6)
    assert verdict.explain() == "valid: 6 changes of 3 keys, 6 records, 0 duplicates"


def test_the_order_in_which_partitions_were_read_does_not_matter() -> None:
    assert anomalies(with_records(*reversed(RECORDS))) == {}


# ------------------------------------------------------------------------------------------------ the topic


def test_lost() -> None:
    assert anomalies(with_records(A1, B1, A2, C1, B2)) == {Anomaly.LOST: 1}
    assert "version 3 of key a" in judge(with_records(A1, B1, A2, C1, B2)).explain()


def test_skip_is_a_loss_that_a_later_change_went_past() -> None:
    assert anomalies(with_records(A1, B1, C1, A3, B2)) == {Anomaly.LOST: 1, Anomaly.SKIP: 1}


def test_a_parked_change_is_not_lost() -> None:
    history = replace(with_records(A1, B1, A2, C1, B2), parked={"a3 Ada"})
    assert anomalies(history) == {}


def test_phantom_of_a_rolled_back_change() -> None:
    phantom = replace(B2, offset=2, event_id="event x", identity="b2 Ben")
    phantom = moved(phantom, ordinal=7, position=107)
    assert anomalies(with_records(*RECORDS, phantom)) == {Anomaly.PHANTOM: 1}
    assert "rolled back: b2 Ben" in judge(with_records(*RECORDS, phantom)).explain()


def test_phantom_that_nobody_knows() -> None:
    phantom = moved(replace(C1, offset=9, event_id="event x", identity="c2 Cy"), ordinal=7, position=107)
    assert anomalies(with_records(*RECORDS, phantom)) == {Anomaly.PHANTOM: 1}


def test_phantom_under_another_key() -> None:
    wrong = replace(C1, key="e")
    assert anomalies(with_records(A1, B1, A2, wrong, A3, B2)) == {Anomaly.PHANTOM: 1}


def test_phantom_is_also_a_second_event_for_one_change() -> None:
    second = moved(replace(A3, offset=9, event_id="event x"), ordinal=7, position=107)
    assert anomalies(with_records(*RECORDS, second)) == {Anomaly.PHANTOM: 1}


@pytest.mark.parametrize("foreign", [replace(C1, event_id=None), replace(C1, position=None)])
def test_phantom_is_also_a_record_that_we_did_not_write(foreign: TopicRecord) -> None:
    assert anomalies(with_records(A1, B1, A2, foreign, A3, B2)) == {Anomaly.PHANTOM: 1}


def test_foreign_records_do_not_repeat_each_other() -> None:
    foreign = [replace(C1, offset=offset, event_id=None, position=None, identity="foreign") for offset in (8, 9)]
    assert anomalies(with_records(*RECORDS, *foreign)) == {Anomaly.PHANTOM: 2}


def test_nonmonotonic() -> None:
    early, late = (
        moved(A3, offset=A2.offset, ordinal=3, position=103),
        moved(A2, offset=A3.offset, ordinal=5, position=105),
    )
    assert anomalies(with_records(A1, B1, early, C1, late, B2)) == {Anomaly.NONMONOTONIC: 1}


def test_each_change_that_comes_late_is_nonmonotonic() -> None:
    changes = [named("a", version, f"n{version}") for version in (1, 4, 2, 3)]
    history = History(changes=changes, records=published(changes), partition_of=partition_of)
    assert anomalies(history) == {Anomaly.NONMONOTONIC: 2}


def test_a_repetition_of_an_older_change_is_not_nonmonotonic() -> None:
    history = replace(with_records(*RECORDS, replace(A1, offset=9), replace(A2, offset=10)), duplicates_max=2)
    assert anomalies(history) == {}


def test_overtaken() -> None:
    # In order for its key, but below a position that the partition has already passed.
    late = moved(C1, offset=9)
    assert anomalies(with_records(A1, B1, A2, A3, B2, late)) == {Anomaly.OVERTAKEN: 1}


def test_a_new_log_is_not_overtaken_by_the_old_one() -> None:
    assert A3.position is not None
    adopted = replace(A3, position=A3.position._replace(log_id="20-cafe", window=1, ordinal=1))
    assert anomalies(with_records(A1, B1, A2, C1, adopted, B2)) == {}
    newer_first = replace(A1, position=A3.position._replace(log_id="20-cafe", position=90))
    found = anomalies(with_records(newer_first, B1, A2, C1, A3, B2))
    assert found == {Anomaly.OVERTAKEN: 3}


def test_another_shard_has_its_own_positions() -> None:
    other = moved(C1, offset=9, shard=1, ordinal=1)
    assert anomalies(with_records(A1, B1, A2, A3, B2, other)) == {}


def test_duplicates_are_counted_and_bounded() -> None:
    history = with_records(*RECORDS, replace(A1, offset=9), replace(A1, offset=10), replace(B1, offset=9))
    assert anomalies(history) == {Anomaly.DUPLICATE: 3}
    assert anomalies(replace(history, duplicates_max=2)) == {Anomaly.DUPLICATE: 3}
    assert anomalies(replace(history, duplicates_max=3)) == {}
    assert judge(replace(history, duplicates_max=3)).duplicates == 3


def test_wrong_partition() -> None:
    strayed = moved(C1, partition=0, offset=1)
    assert anomalies(with_records(A1, B1, A2, strayed, A3, moved(B2, offset=2))) == {Anomaly.WRONG_PARTITION: 1}


def test_wrong_partition_says_nothing_about_order() -> None:
    strayed = moved(A2, partition=0, offset=1)
    assert anomalies(with_records(A1, B1, strayed, C1, A3, moved(B2, offset=2))) == {Anomaly.WRONG_PARTITION: 1}


def test_position_reused_by_another_event() -> None:
    # As after a crash that lost a window: its number, ordinals or positions are given out a second time.
    same_mark = moved(C1, ordinal=3, position=104)
    assert anomalies(with_records(A1, B1, A2, same_mark, B2, A3)) == {
        Anomaly.POSITION_REUSED: 1,
        Anomaly.OVERTAKEN: 1,
    }
    same_position = moved(A3, position=101)
    assert anomalies(with_records(A1, B1, A2, C1, same_position, B2)) == {Anomaly.POSITION_REUSED: 1}


@pytest.mark.parametrize("part", ["window", "ordinal", "position", "transaction_id"])
def test_position_reused_is_also_one_event_under_two_positions(part: str) -> None:
    again = moved(A3, offset=9, **{part: 900})
    history = replace(with_records(*RECORDS, again), duplicates_max=1)
    assert anomalies(history) == {Anomaly.POSITION_REUSED: 1}


def test_a_replayed_window_reuses_its_positions_legally() -> None:
    again = [replace(record, offset=record.offset + 4) for record in RECORDS]
    assert anomalies(replace(with_records(*RECORDS, *again), duplicates_max=6)) == {}


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize(
    "cache",
    [
        {"a": {"name": "Ada"}},
        {"a": {"name": "Ann"}, "c": {"name": "Cid"}},
        {"a": {"name": "Ada"}, "c": {"name": "Cid"}, "b": {"name": "Bob"}},
    ],
    ids=["missing", "older", "left over"],
)
def test_cache_divergence(cache: dict[str, dict[str, object]]) -> None:
    assert anomalies(replace(GOOD, cache=cache)) == {Anomaly.CACHE_DIVERGENCE: 1}


def test_a_run_without_a_cache_has_none_to_compare() -> None:
    assert anomalies(replace(GOOD, cache=None, samples=())) == {}


@pytest.mark.parametrize(
    "last",
    [
        Sample("a", {"name": "Ann"}),
        Sample("a", None),
        Sample("b", {"name": "Bob"}),
        Sample("c", {"name": "Cy"}),
    ],
    ids=["an older name", "gone", "back from the dead", "never was"],
)
def test_cache_regression(last: Sample) -> None:
    assert anomalies(replace(GOOD, samples=(*GOOD.samples, last))) == {Anomaly.CACHE_REGRESSION: 1}


def test_a_name_taken_back_is_no_regression() -> None:
    # Ada, Ann, Ada: the first sample may be of version 1 or 3, and only version 1 leaves room for the second.
    samples = [Sample("a", {"name": name}) for name in ("Ada", "Ann", "Ada", "Ada")]
    assert anomalies(replace(GOOD, samples=samples)) == {}


# ------------------------------------------------------------------------------------------------ the verdict


def test_nothing_committed_is_not_valid() -> None:
    verdict = judge(History(changes=(), records=(), partition_of=partition_of))
    assert not verdict.valid
    assert "nothing was committed" in verdict.explain()


def test_what_was_to_be_exercised_must_have_happened() -> None:
    verdict = judge(replace(GOOD, happened={"rollbacks": 12, "relay kills": 0}))
    assert verdict.did_not_happen == ("relay kills",)
    assert not verdict.valid
    assert "did not happen: relay kills" in verdict.explain()


def test_examples_are_few_but_the_count_is_exact() -> None:
    changes = [named("a", version, "Ada") for version in range(1, 101)]
    finding = judge(replace(GOOD, changes=changes, source=None, records=())).findings[Anomaly.LOST]
    assert (finding.count, len(finding.examples)) == (100, EXAMPLES_MAX)


@pytest.mark.parametrize(
    "changes",
    [
        [named("a", 1, "Ada"), named("a", 3, "Ann")],
        [named("a", 2, "Ada")],
        [named("a", 1, "Ada"), named("a", 1, "Ada")],
        [Change("a", 1, "same", None), Change("b", 1, "same", None)],
    ],
    ids=["gap", "late start", "twice", "one identity"],
)
def test_a_truth_that_contradicts_itself_judges_nothing(changes: list[Change]) -> None:
    with pytest.raises(BrokenTruthError):
        judge(replace(GOOD, changes=changes, source=None))


def test_a_source_that_contradicts_its_changes_judges_nothing() -> None:
    with pytest.raises(BrokenTruthError, match="key c"):
        judge(replace(GOOD, source={"a": {"name": "Ada"}, "c": {"name": "Cy"}}))


# ------------------------------------------------------------------------------------------------ any history


@st.composite
def good_histories(draw: st.DrawFn) -> History:
    """Any number of keys, chains interleaved at random, published as one window."""
    lengths = draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 6), min_size=1))
    chains = {key: [named(key, v, f"n{v % 3}") for v in range(1, n + 1)] for key, n in lengths.items()}
    order = draw(st.permutations([key for key, n in lengths.items() for _ in range(n)]))
    changes = [chains[key].pop(0) for key in order]
    cache = {change.key: change.row for change in changes if change.row is not None}
    return History(changes=changes, records=published(changes), partition_of=partition_of, cache=cache)


@given(good_histories())
def test_any_faultless_run_is_valid(history: History) -> None:
    assert judge(history).valid


@given(good_histories(), st.data())
def test_no_single_damage_goes_unseen(history: History, data: st.DataObject) -> None:
    """Whatever one record is dropped, repeated, swapped, renamed or moved, the run is no longer valid."""
    records = list(history.records)
    at = data.draw(st.integers(0, len(records) - 1))
    match data.draw(st.sampled_from(["drop", "repeat", "swap", "rename", "move", "row"])):
        case "drop":
            del records[at]
        case "repeat":
            records.append(replace(records[at], offset=len(records)))
        case "swap":
            same = [i for i, record in enumerate(records) if record.partition == records[at].partition and i != at]
            if not same:
                return
            other = data.draw(st.sampled_from(same))
            first, second = records[at], records[other]
            records[at], records[other] = (
                replace(first, offset=second.offset),
                replace(second, offset=first.offset),
            )
        case "rename":
            records[at] = replace(records[at], identity="nobody")
        case "move":
            records[at] = replace(records[at], partition=1 - records[at].partition, offset=99)
        case _:
            assert history.cache is not None
            history = replace(history, cache={**history.cache, records[at].key: {"name": "damaged"}})
    verdict: Verdict = judge(replace(history, records=records))
    assert not verdict.valid
