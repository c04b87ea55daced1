"""Settings come from the environment, are bounded, and keep their secrets."""

import pytest
from pydantic import ValidationError

from outbox.settings import Settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"):
        monkeypatch.delenv(name, raising=False)


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATABASE_URL": "postgresql://u:secret@h/d",
        "KAFKA_BOOTSTRAP_SERVERS": "k:1,k:2",
        "SAGABOX_LEASE_SECONDS": "7.5",
        "SAGABOX_WAKEUP": "poll",
        "SAGABOX_UNKNOWN": "is somebody else's",
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.database_url.get_secret_value() == "postgresql://u:secret@h/d"
    assert settings.kafka == "k:1,k:2"
    assert settings.lease_seconds == 7.5
    assert settings.wakeup == "poll"
    assert "secret" not in repr(settings)
    assert "secret" not in settings.model_dump_json()


def test_in_code_by_name_and_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "from-the-environment:1")
    assert Settings(kafka="in-code:1").kafka == "in-code:1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_max_events", 0),
        ("window_max_events", 50_001),
        ("window_max_bytes", 1_000),
        ("windows_in_flight", 17),
        ("batch_max_bytes", 1),
        ("compression", "brotli"),
        ("publish_timeout_seconds", 0),
        ("lease_seconds", 0.5),
        ("poll_min_seconds", -1),
        ("wakeup", "guess"),
        ("session_timeout_seconds", 301),
        ("fetch_wait_seconds", 0),
        ("drain_timeout_seconds", 0),
        ("misspelt", 1),
    ],
)
def test_bounds(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: value})
