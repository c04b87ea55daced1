"""Unit tests of a service's saga, and the misuses that a type checker must catch."""

from collections.abc import Sequence
from typing import assert_type
from uuid import uuid4

from order_saga import (
    Approval,
    Booked,
    Charge,
    PlaceOrder,
    Receipt,
    Reserved,
    charge,
    create_order,
    place_order,
    reserve_stock,
)

from saga.testing import Lab, Outcome, Stub

order = PlaceOrder(order_id=uuid4(), sku="x", amount=3)


async def test_not_approved_releases_everything() -> None:
    lab = Lab(place_order)
    assert_type(lab, Lab[PlaceOrder, Receipt])
    lab.on(create_order).returns(order.order_id)
    lab.on(reserve_stock).returns(Reserved(shelf="A1"))
    assert_type(lab.on(charge), Stub[Charge])
    lab.on(charge).times_out(landed=True)
    lab.on(charge).compensation_fails(times=2)
    lab.on(charge).rejects("no money")
    lab.signal(Approval(approved=False), after=60)
    lab.cancel("changed my mind", after=3600)
    outcome = await lab.run(order)
    assert_type(outcome, Outcome[Receipt])
    assert_type(outcome.compensated, Sequence[str])
    assert outcome.compensated == ["charge", "reserve_stock", "create_order"]
    assert_type(outcome.result, Receipt)
    assert_type(outcome.blocked_on, str | None)
    await lab.explore(order, world=dict)


async def misuse() -> None:
    lab = Lab(place_order)
    lab.on(charge).returns("x")  # type: ignore[arg-type]
    lab.on(reserve_stock).returns(Booked(courier="c"))  # type: ignore[arg-type]
    lab.on(charge).times_out()  # type: ignore[call-arg] # did it land?
    lab.on(place_order)  # type: ignore[arg-type] # a saga is no step
    lab.signal(order)  # type: ignore[arg-type]
    await lab.run("order")  # type: ignore[arg-type]
    await lab.explore(order)  # type: ignore[call-arg] # in which world?
    await lab.explore(order, world={})  # type: ignore[arg-type] # each history has a new one
