"""What the journal holds is read back as it was written, and recognised whatever was added since."""

from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, computed_field
from pydantic.alias_generators import to_camel

from saga.codec import Arguments, Value
from saga.errors import PayloadError


class Item(BaseModel):
    sku: str
    count: int = 1


class Grown(BaseModel):
    sku: str
    count: int = 1
    gift: bool = False


async def first(ctx: object, item: Item, *, note: str = "") -> None: ...


async def grown(ctx: object, item: Grown, *, note: str = "", urgent: bool = False) -> None: ...


async def mapped(ctx: object, by_name: dict[str, int]) -> None: ...


def test_arguments_come_back_by_name() -> None:
    arguments = Arguments(first)
    values = arguments.bind((Item(sku="a"),), {"note": "n"})
    text = arguments.encode(values)
    assert text == '{"item":{"sku":"a","count":1},"note":"n"}'
    assert arguments.decode(text) == values
    assert arguments.unbind(values) == ([Item(sku="a")], {"note": "n"})


def test_a_field_and_a_parameter_with_a_default_may_be_added() -> None:
    old, new = Arguments(first), Arguments(grown)
    before = old.bind((Item(sku="a"),), {})
    after = new.bind((Grown(sku="a"),), {})
    assert old.digest(before) == new.digest(after)
    assert new.decode(old.encode(before)) == after
    assert new.digest(new.bind((Grown(sku="a", gift=True),), {})) != new.digest(after)
    assert new.digest(new.bind((Grown(sku="a"),), {"urgent": True})) != new.digest(after)


def test_a_parameter_without_a_default_cannot_be_read_from_an_old_journal() -> None:
    async def stricter(ctx: object, item: Item, who: str) -> None: ...

    with pytest.raises(PayloadError, match="give it a default"):
        Arguments(stricter).decode(Arguments(first).encode({"item": Item(sku="a"), "note": ""}))


def test_the_order_of_keys_is_kept_and_does_not_count() -> None:
    arguments = Arguments(mapped)
    one, other = {"by_name": {"b": 1, "a": 2}}, {"by_name": {"a": 2, "b": 1}}
    assert arguments.digest(one) == arguments.digest(other)
    assert list(arguments.decode(arguments.encode(one))["by_name"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("annotation", "value", "problem"),
    [
        (str, "a\x00b", "U\\+0000"),
        (dict[str, int], {"a\x00": 1}, "U\\+0000"),
        (float, float("nan"), "cannot be read|NaN"),
        (list[float], [float("inf")], "cannot be read|Infinity"),
        (Item, "no item", "cannot be written"),
        (int, "1", "cannot be written"),
        (str, "\ud800", "cannot be written"),
        (str, "x" * 1_000_001, "store the bulk elsewhere"),
    ],
)
def test_what_cannot_be_journalled_is_refused(annotation: Any, value: Any, problem: str) -> None:
    codec: Value[Any] = Value(annotation, "result of x")
    with pytest.raises(PayloadError, match=problem):
        codec.decode(codec.encode(value))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1)),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
    )
)
def test_what_can_be_journalled_comes_back(value: Any) -> None:
    codec: Value[Any] = Value(Any, "value")
    assert codec.decode(codec.encode(value)) == value
    assert codec.digest(codec.decode(codec.encode(value))) == codec.digest(value)


def test_types_of_python_come_back_as_they_were() -> None:
    codec: Value[tuple[Decimal, UUID]] = Value(tuple[Decimal, UUID], "value")
    value = (Decimal("1.10"), UUID(int=5))
    assert codec.decode(codec.encode(value)) == value


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, serialize_by_alias=True, extra="forbid")
    order_id: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def label(self) -> str:
        return f"order {self.order_id}"


async def camel(ctx: object, order: Camel) -> None: ...


def test_aliases_and_computed_fields_are_no_part_of_the_journal() -> None:
    """Red where what is written is by alias, or has computed fields: an input of that kind could never be undone."""
    value, order = Value[Camel](Camel, "result"), Camel(orderId=1)  # type: ignore[call-arg]
    assert value.encode(order) == '{"order_id":1}'
    assert value.decode(value.encode(order)) == order
    arguments = Arguments(camel)
    assert arguments.decode(arguments.encode({"order": order})) == {"order": order}
    assert value.read('{"orderId": 1}') == value.read('{"order_id": 1}') == order


async def tagged(ctx: object, tags: set[int]) -> None: ...


def test_the_order_of_a_set_does_not_count() -> None:
    """It is another one in each process, so a takeover would pause as diverged.

    Red where the digest is that of what is written.
    """
    arguments = Arguments(tagged)
    one, other = {0, 8}, {8, 0}  # two numbers of one hash in a small set stay in the order in which they came
    assert list(one) != list(other)
    assert arguments.encode({"tags": one}) != arguments.encode({"tags": other})
    assert arguments.digest({"tags": one}) == arguments.digest({"tags": other}) != arguments.digest({"tags": {0, 9}})


def test_the_order_of_a_list_counts() -> None:
    async def listed(ctx: object, counts: list[int]) -> None: ...

    arguments = Arguments(listed)
    assert arguments.digest({"counts": [1, 2]}) != arguments.digest({"counts": [2, 1]})
