"""Misuse of an inbox is told at import, with what to do; and under which id a message is kept."""

import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox import CacheDeclarationError, Consumer, Event, Inbox, InboxDeclarationError, Key, Transaction
from outbox.consumer.messages import message_id
from tests.support.caching import TABLE, AgentDeleted, AgentEvent, AgentRenamed, make_cache
from tests.support.inboxes import make_inbox


class Elsewhere(Event, topic="other", type="elsewhere"):
    id: Key[UUID]


class Gap(AgentEvent, type="agent.gap", schema_version=3):
    pass


@Gap.upcast(from_version=1)
def gap(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


async def unannotated(tx, event):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    pass


async def one_parameter(event: AgentRenamed) -> None:
    pass


async def three_parameters(tx: Transaction, event: AgentRenamed, more: int) -> None:
    pass


async def no_transaction(tx: object, event: AgentRenamed) -> None:
    pass


async def returning(tx: Transaction, event: AgentRenamed) -> str:
    return ""


async def no_event(tx: Transaction, event: str) -> None:
    pass


async def abstract(tx: Transaction, event: AgentEvent) -> None:
    pass


async def other_topic(tx: Transaction, event: Elsewhere) -> None:
    pass


async def with_gap(tx: Transaction, event: Gap) -> None:
    pass


def waiting_for_nothing(tx: Transaction, event: AgentRenamed) -> None:
    pass


async def unknown_name(tx: Transaction, event: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
    pass


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        (unannotated, "needs two annotated parameters; write it as: async def"),
        (one_parameter, "needs two annotated parameters"),
        (three_parameters, "needs two annotated parameters"),
        (no_transaction, "first parameter is the outbox.Transaction"),
        (returning, "returns <class 'str'>, which nobody would see"),
        (no_event, "takes <class 'str'>, which is no Event"),
        (abstract, "AgentEvent is abstract"),
        (other_topic, "Elsewhere is on topic other, the inbox reads llm.agents"),
        (with_gap, "Gap has an upcaster from version 1 but none from 2"),
        (waiting_for_nothing, "handlers of an inbox are coroutines"),
        (unknown_name, "Nowhere.*import the classes in its annotations"),
    ],
)
def test_a_handler_that_will_not_do(handler: Any, says: str) -> None:
    inbox = Inbox("n", topic="llm.agents")
    with pytest.raises(InboxDeclarationError, match=says) as caught:
        inbox.on(handler)
    assert handler.__name__ in str(caught.value)
    assert inbox.handlers == {}


@pytest.mark.parametrize("name", ["", "relay", "x" * 128, "nul\x00"])
def test_a_name_that_will_not_do(name: str) -> None:
    with pytest.raises(InboxDeclarationError, match="not usable as a name"):
        Inbox(name, topic="t")


def test_two_handlers_of_one_type() -> None:
    inbox = make_inbox()
    with pytest.raises(InboxDeclarationError, match=r"agent.deleted is handled by .*gone already; call both"):

        @inbox.on
        async def again(tx: Transaction, event: AgentDeleted) -> None:
            pass


def test_a_union_has_one_handler_for_each_type() -> None:
    inbox = Inbox("n", topic="llm.agents")

    @inbox.on
    async def either(tx: Transaction, event: AgentRenamed | AgentDeleted) -> None:
        pass

    assert {type_: handler.function for type_, handler in inbox.handlers.items()} == {
        "agent.renamed": either, "agent.deleted": either,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "error", "says"),
    [
        ((Inbox("n", topic="t"),), InboxDeclarationError, "inbox n has no handlers"),
        ((make_inbox(), make_inbox()), CacheDeclarationError, "an inbox is called like another one"),
        ((make_cache(), make_inbox(TABLE)), CacheDeclarationError, "an inbox is called like another one"),
    ],
)
def test_a_consumer_that_cannot_work(targets: tuple[Inbox, ...], error: type[Exception], says: str) -> None:
    pool: Any = None
    with pytest.raises(error, match=re.escape(says)):
        Consumer(pool, "kafka", *targets)


def test_an_inbox_alone_names_its_consumer() -> None:
    pool: Any = None
    assert Consumer(pool, "kafka", make_inbox("mine"), make_cache()).name == "mine"


OURS = str(uuid4()).encode()
FOREIGN: Mapping[str, bytes | None] = {"ce_id": b"1", "ce_source": b"shop"}


def test_ids_of_our_own_events_are_kept_as_they_are() -> None:
    """Whatever the source, which an adoption may change."""
    for source in (b"shop", b"restored"):
        assert message_id({"ce_id": OURS, "ce_source": source}, is_ours=True) == OURS.decode()


@pytest.mark.parametrize("is_ours", [False, True])
def test_foreign_messages_are_named_by_source_and_id(is_ours: bool) -> None:  # noqa: FBT001
    identity = message_id(FOREIGN, is_ours=is_ours)
    assert identity is not None
    assert UUID(identity)
    assert identity == message_id(dict(FOREIGN), is_ours=is_ours)
    for other in ({"ce_id": b"2"}, {"ce_source": b"depot"}, {"ce_source": None}, {"ob-replay": b"x"}):
        assert message_id({**FOREIGN, **other}, is_ours=is_ours) != identity
    assert message_id({"ce_id": b"23", "ce_source": b"1"}, is_ours=False) != message_id(
        {"ce_id": b"3", "ce_source": b"12"}, is_ours=False
    )


def test_a_foreign_uuid_is_no_name_without_its_source() -> None:
    """Two services that use an order's id for their events' must not hide each other's."""
    assert message_id({"ce_id": OURS, "ce_source": b"shop"}, is_ours=False) != message_id(
        {"ce_id": OURS, "ce_source": b"depot"}, is_ours=False
    )


@pytest.mark.parametrize("headers", [{}, {"ce_id": None}, {"ce_id": b""}, {"ce_source": b"shop"}])
def test_a_message_without_id(headers: dict[str, bytes | None]) -> None:
    assert message_id(headers, is_ours=False) is None


def test_bytes_that_are_no_text_make_an_id_too() -> None:
    identity = message_id({"ce_id": b"\xff\x00", "ce_source": b"\xfe"}, is_ours=False)
    assert identity is not None
