"""The benchmarks run, at a size that proves nothing about speed, and write every metric that they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import peer_environment, saga
from benchmarks.real_kafka import UnavailableError

ROOT = Path(__file__).parents[2]

PROMISED = {
    "relay_events_per_second": "events/s",
    "relay_cpu_us_per_event": "us",
    "window_query_rows_per_second": "rows/s",
    "send_batch_events_per_second": "events/s",
    "faststream_outbox_events_per_second": "events/s",
    "commit_to_kafka_p50_ms": "ms",
    "commit_to_kafka_p99_ms": "ms",
    "relay_rss_growth_mib": "MiB",
    "backlog_rate_ratio_1m_to_100k": "ratio",
    "wal_bytes_per_event": "bytes",
    "duplicates": "records",
    "dead_tuples_per_event": "row versions",
    "relay_recovery_seconds": "s",
    "duplicates_after_kill": "records",
    "relay_idle_cpu_percent": "%",
    "idle_first_event_ms": "ms",
}

PROMISED_OF_CONSUMERS = {
    "cache_events_per_second": "events/s",
    "cache_cpu_us_per_event": "us",
    "cache_many_keys_events_per_second": "events/s",
    "cache_many_keys_cpu_us_per_event": "us",
    "upsert_floor_rows_per_second": "rows/s",
    "plain_handler_events_per_second": "events/s",
    "inbox_events_per_second": "events/s",
    "inbox_cpu_us_per_event": "us",
    "bootstrap_rows_per_second": "rows/s",
    "rebuild_rows_per_second": "rows/s",
    "rebuild_offered_events_per_second": "events/s",
}

PROMISED_OF_SAGAS = {
    "saga_per_second_c1": "sagas/s",
    "saga_per_second_c20": "sagas/s",
    "saga_per_second_c200": "sagas/s",
    "saga_per_second_c1000": "sagas/s",
    "checkpoint_floor_per_second_c20": "sagas/s",
    "checkpoint_floor_per_second_c200": "sagas/s",
    "checkpoint_floor_per_second_c1000": "sagas/s",
    "checkpoint_alone_per_second_c200": "sagas/s",
    "share_of_floor_c20": "ratio",
    "share_of_floor_c200": "ratio",
    "share_of_floor_c1000": "ratio",
    "step_p50_ms": "ms",
    "step_p99_ms": "ms",
    "commits_per_step_c200": "commits",
    "commits_per_saga_c200": "commits",
    "wal_bytes_per_saga_c200": "bytes",
    "saga10_per_second_c1": "sagas/s",
    "saga10_per_second_c200": "sagas/s",
    "compensated_per_second_c200": "sagas/s",
    "compensated10_per_second_c1000": "sagas/s",
    "apart_per_second_c200": "sagas/s",
    "two_services_per_second_c200": "sagas/s",
    "takeover_10k_seconds": "s",
    "step_cost_10k_ms": "ms",
    "step_cost_1m_ms": "ms",
    "step_cost_growth": "ratio",
}


PROMISED_OF_PEERS = {
    "dbos_per_second": "sagas/s",
    "absurd_per_second": "sagas/s",
    "edda_per_second": "sagas/s",
    "dbos_two_processes_per_second": "sagas/s",
    "absurd_two_processes_per_second": "sagas/s",
    "edda_two_processes_per_second": "sagas/s",
}


def benchmark(*arguments: str, module: str = "relay") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        check=False, capture_output=True, text=True, cwd=ROOT, timeout=400,
    )  # fmt: skip


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return measured("relay", tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def of_consumers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return measured("cache", tmp_path_factory.mktemp("benchmark"))


def measured(module: str, directory: Path, *only: str) -> dict[str, dict[str, object]]:
    file = directory / "figures.json"
    parts = [argument for part in only for argument in ("--only", part)]
    done = benchmark("--quick", "--json", str(file), *parts, module=module)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())
    assert all(row.keys() == {"metric", "value", "unit", "n"} for row in rows)
    return {row["metric"]: row for row in rows}


def number(figures: dict[str, dict[str, object]], metric: str) -> float:
    value = figures[metric]["value"]
    assert isinstance(value, int | float)
    return float(value)


@pytest.mark.timeout(420)
def test_every_promised_metric_is_there_with_its_unit(figures: dict[str, dict[str, object]]) -> None:
    assert {metric: figures[metric]["unit"] for metric in PROMISED} == PROMISED
    assert all(isinstance(row["n"], int) and row["n"] > 0 for row in figures.values())


@pytest.mark.timeout(420)
def test_nothing_is_lost_repeated_or_out_of_order(figures: dict[str, dict[str, object]]) -> None:
    for metric in ("lost", "duplicates", "out_of_order", "duplicates_singly", "steady_lost", "steady_duplicates"):
        assert number(figures, metric) == 0, metric
    assert number(figures, "lost_after_kill") == 0
    assert number(figures, "duplicates_after_kill") <= number(figures, "duplicates_bound")
    assert number(figures, "dead_tuples_per_event") == 0


@pytest.mark.timeout(420)
def test_values_make_sense(figures: dict[str, dict[str, object]]) -> None:
    assert number(figures, "relay_cpu_us_per_event") > 1
    assert 0 < number(figures, "commit_to_kafka_p50_ms") <= number(figures, "commit_to_kafka_p99_ms")
    assert number(figures, "commit_to_kafka_p50_ms") <= number(figures, "emit_to_kafka_p50_ms")
    assert number(figures, "wal_bytes_per_event") > 200  # the payload alone
    assert number(figures, "relay_recovery_seconds") < 20
    assert number(figures, "window_query_rows_per_second") > number(figures, "relay_events_per_second")


@pytest.mark.timeout(420)
def test_consumers_every_promised_metric_is_there_with_its_unit(of_consumers: dict[str, dict[str, object]]) -> None:
    assert {metric: of_consumers[metric]["unit"] for metric in PROMISED_OF_CONSUMERS} == PROMISED_OF_CONSUMERS
    assert all(isinstance(row["n"], int) and row["n"] > 0 for row in of_consumers.values())


@pytest.mark.timeout(420)
def test_consumers_values_make_sense(of_consumers: dict[str, dict[str, object]]) -> None:
    assert number(of_consumers, "cache_cpu_us_per_event") > 1
    assert number(of_consumers, "plain_handler_cpu_us_per_event") > number(of_consumers, "cache_cpu_us_per_event")
    assert number(of_consumers, "plain_handler_events_per_second") < number(of_consumers, "cache_events_per_second")
    assert number(of_consumers, "upsert_floor_rows_per_second") > number(
        of_consumers, "cache_many_keys_events_per_second"
    )


@pytest.fixture(scope="module")
def of_sagas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    parts = ("happy", "floor", "long", "compensating", "processes", "takeover", "size")  # not those that need peers
    return measured("saga", tmp_path_factory.mktemp("benchmark"), *parts)


@pytest.mark.timeout(420)
def test_sagas_every_promised_metric_is_there_and_steps_share_commits(of_sagas: dict[str, dict[str, object]]) -> None:
    assert {metric: of_sagas[metric]["unit"] for metric in PROMISED_OF_SAGAS} == PROMISED_OF_SAGAS
    assert all(isinstance(row["n"], int) and row["n"] > 0 for row in of_sagas.values())
    assert number(of_sagas, "commits_per_step_c1") < 2  # a start and three checkpoints for three steps, and a few more
    assert number(of_sagas, "commits_per_step_c200") < 0.2
    for concurrent in (20, 200, 1_000):
        alone = number(of_sagas, f"checkpoint_alone_per_second_c{concurrent}")
        assert 0 < number(of_sagas, f"checkpoint_floor_per_second_c{concurrent}") < alone


@pytest.mark.timeout(420)
def test_peers_every_promised_metric_is_there(tmp_path: Path) -> None:
    if missing := [name for name in ("dbos", "absurd", "edda") if not peer_environment.is_ready(name)]:
        pytest.skip(f"not installed yet: {', '.join(missing)}; python -m benchmarks.saga does it")
    figures = measured("saga", tmp_path, "dbos", "absurd", "edda")
    assert {metric: figures[metric]["unit"] for metric in PROMISED_OF_PEERS} == PROMISED_OF_PEERS
    assert number(figures, "dbos_commits_per_saga") > 3  # each workflow and each step is durable


def test_a_peer_that_cannot_be_installed_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"absurd could not be installed from benchmarks/peers/absurd\.txt"):
        peer_environment.interpreter("absurd", directory=tmp_path, options=("--no-index",))
    assert not peer_environment.is_ready("absurd", directory=tmp_path)


async def test_without_a_peer_the_rest_is_measured_and_alone_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Path:
        raise UnavailableError(f"{name} could not be installed: [no such index]")

    monkeypatch.setattr(peer_environment, "interpreter", fail)
    console = Console(record=True, width=200)
    assert await saga._available([saga.Part.HAPPY, saga.Part.DBOS], console) == [saga.Part.HAPPY]
    assert "without dbos: dbos could not be installed: [no such index]" in console.export_text()
    with pytest.raises(UnavailableError):
        await saga._available([saga.Part.DBOS], console)


@pytest.mark.parametrize("module", ["relay", "cache", "saga"])
def test_help_has_examples(module: str) -> None:
    done = benchmark("--help", module=module)
    assert done.returncode == 0
    assert "--json figures.json" in done.stdout


@pytest.mark.parametrize("module", ["relay", "cache", "saga"])
def test_an_unknown_part_is_refused(module: str) -> None:
    done = benchmark("--only", "everything", module=module)
    assert done.returncode == 2
    assert "everything" in done.stderr
