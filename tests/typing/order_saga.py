"""An order saga with remote participants, a pivot and an approval, and the misuses that a type checker must catch."""

from datetime import timedelta
from typing import assert_type
from uuid import UUID

from pydantic import BaseModel

import outbox
from outbox import Connection, Pool, Transaction
from saga import (
    Call,
    Handle,
    Handler,
    NotDone,
    Participant,
    Rejected,
    Remote,
    Retry,
    Run,
    Saga,
    Signal,
    StepContext,
    Unknown,
    Worker,
    remote,
    saga,
    step,
)


class PlaceOrder(BaseModel):
    order_id: UUID
    sku: str
    amount: int


class Receipt(BaseModel):
    charge_id: str


class Charge(BaseModel):
    id: str


class ReserveStock(BaseModel):
    sku: str


class Reserved(BaseModel):
    shelf: str


class BookCourier(BaseModel):
    order_id: UUID


class Booked(BaseModel):
    courier: str


class Approval(Signal):
    approved: bool


# Contracts, shared by both services.
reserve_stock = remote("stock.reserve", ReserveStock, Reserved, timeout=30)
book_courier = remote("courier.book", BookCourier, Booked, timeout=timedelta(seconds=30))
tell_audit = remote("audit.tell", BookCourier, timeout=30)
assert_type(reserve_stock, Remote[ReserveStock, Reserved])
assert_type(tell_audit, Remote[BookCourier, None])


@step(transactional=True)
async def create_order(tx: Transaction, order: PlaceOrder) -> UUID:
    await tx.execute("insert into orders (id, status) values ($1, 'pending')", order.order_id)
    return order.order_id


@create_order.compensation
async def cancel_order(tx: Transaction, _done: UUID | Unknown, order: PlaceOrder) -> None:
    await tx.execute("update orders set status = 'cancelled' where id = $1", order.order_id)


@step(retry=Retry(attempts=5, initial=0.2), timeout=10)
async def charge(ctx: StepContext, _order: PlaceOrder) -> Charge:
    return Charge(id=ctx.idempotency_key)


@charge.compensation(required=False, retry=Retry(attempts=3))
async def refund(_ctx: StepContext, done: Charge | Unknown, _order: PlaceOrder) -> None:
    if isinstance(done, Unknown):
        assert_type(done.idempotency_key, str)
        return
    assert_type(done, Charge)


@charge.probe
async def find_charge(_ctx: StepContext, _order: PlaceOrder) -> Charge | NotDone:
    return NotDone()


@step()
async def send_mail(_ctx: StepContext, _order: PlaceOrder, *, subject: str = "") -> None:
    assert subject


@step
async def bare(_ctx: StepContext, _order: PlaceOrder) -> int:
    return 1


class Deps(BaseModel):
    url: str


@step(at_most_once=True, timeout=5, irreversible=True)
async def with_deps(ctx: StepContext[Deps], _order: PlaceOrder) -> str:
    return assert_type(ctx.deps, Deps).url


@saga("place_order", deadline=timedelta(hours=48))
async def place_order(run: Run, order: PlaceOrder) -> Receipt:
    await run(create_order(order))
    stock, paid = await run.parallel(reserve_stock(ReserveStock(sku=order.sku)), charge(order))
    assert_type(stock, Reserved)
    assert_type(paid, Charge)
    approval = await run.receive(Approval, timeout=timedelta(hours=24))
    if approval is None or not approval.approved:
        raise Rejected("not approved")
    await run.pivot()
    assert_type(await run(book_courier(BookCourier(order_id=order.order_id))), Booked)
    assert_type(await run.parallel(*[charge(order) for _ in range(3)]), tuple[Charge, ...])
    assert_type(await run(bare(order)), int)
    assert_type(await run(with_deps(order)), str)
    assert_type(charge(order), Call[Charge])
    await run(tell_audit(BookCourier(order_id=order.order_id)))
    await run(send_mail(order, subject="sent"))
    await run.sleep(2)
    await run.lock(f"sku:{order.sku}")
    assert_type(await run.child(place_order, order), Receipt)
    return Receipt(charge_id=paid.id)


assert_type(place_order, Saga[PlaceOrder, Receipt])

# ------------------------------------------------------------------------------------------------ the stock service

participant = Participant("stock")


@participant.on(reserve_stock)
async def do_reserve(tx: Transaction, command: ReserveStock) -> Reserved:
    if not await tx.fetchval("update stock set left = left - 1 where sku = $1 returning true", command.sku):
        raise Rejected("out of stock")
    return Reserved(shelf="A1")


@do_reserve.compensation
async def undo_reserve(tx: Transaction, _done: Reserved, command: ReserveStock) -> None:
    await tx.execute("update stock set left = left + 1 where sku = $1", command.sku)


assert_type(do_reserve, Handler[Transaction, ReserveStock, Reserved])


async def checkout(pool: Pool, connection: Connection, order: PlaceOrder) -> Handle[Receipt]:
    async with outbox.transaction(pool) as tx:
        handle = await place_order.start(tx, order, key=f"order-{order.order_id}")
    assert_type(await handle.result(timeout=30), Receipt)
    assert_type(await place_order.start(connection, order), Handle[Receipt])
    assert_type(handle.id, UUID)
    await place_order.handle(pool, "order-1").signal(Approval(approved=True), dedupe_key="once")
    await handle.cancel("changed my mind")
    return handle


# ------------------------------------------------------------------------------------------------ misuse


async def misuse_of_a_handle(pool: Pool, order: PlaceOrder) -> None:
    await place_order.start(pool, "x")  # type: ignore[arg-type]
    await place_order.start(order)  # type: ignore[arg-type, call-arg] # every call takes the database first
    handle = place_order.handle(pool, "order-1")
    await handle.result()  # type: ignore[call-arg] # for how long?
    await handle.signal(order)  # type: ignore[arg-type] # signals are Signals
    await handle.cancel()  # type: ignore[call-arg] # why?


@saga("misuse", deadline=60)
async def misuse(run: Run, order: PlaceOrder) -> None:
    await run(send_mail(order, subjekt="sent"))  # type: ignore[call-arg]
    await run(charge())  # type: ignore[call-arg]
    await run(charge("x"))  # type: ignore[arg-type]
    await run(reserve_stock(BookCourier(order_id=order.order_id)))  # type: ignore[arg-type]
    await charge(order)  # type: ignore[misc] # a call is only described
    await run(charge)  # type: ignore[arg-type]
    await run.receive(PlaceOrder, timeout=3)  # type: ignore[type-var] # signals are Signals
    await run.receive(Approval)  # type: ignore[call-arg] # for how long?
    await run.child(place_order, "order")  # type: ignore[misc]
    _nothing = await run(tell_audit(BookCourier(order_id=order.order_id)))  # type: ignore[func-returns-value]


@participant.on(reserve_stock)  # type: ignore[arg-type]
async def wrong(_tx: Transaction, _command: ReserveStock) -> Booked:
    raise NotImplementedError


@charge.compensation  # type: ignore[arg-type]
async def forgot_unknown(_ctx: StepContext, _done: Charge, _order: PlaceOrder) -> None: ...


@charge.probe  # type: ignore[arg-type]
async def probes_something_else(_ctx: StepContext, _order: PlaceOrder) -> Booked | NotDone:
    raise NotImplementedError


@step(transactional=True)  # type: ignore[type-var]
async def wrong_context(_ctx: StepContext, _order: PlaceOrder) -> None: ...


@step(at_most_once=True, retry=Retry(attempts=2))  # type: ignore[call-overload, untyped-decorator]
async def pointless_retry(_ctx: StepContext, _order: PlaceOrder) -> None: ...


@step(transactional=True, timeout=3)  # type: ignore[call-overload, untyped-decorator]
async def pointless_timeout(_tx: Transaction, _order: PlaceOrder) -> None: ...


@saga("two", deadline=5)  # type: ignore[arg-type]
async def two_arguments(_run: Run, _a: int, _b: int) -> None: ...


@saga("endless")  # type: ignore[call-arg] # every saga ends
async def no_deadline(_run: Run, _order: PlaceOrder) -> None: ...


async def serve(pool: Pool) -> None:
    async with Worker(pool, "kafka:9092", place_order, participant) as worker:
        await worker.run()


def serves_a_step(pool: Pool) -> Worker:
    return Worker(pool, "kafka:9092", charge)  # type: ignore[arg-type]
