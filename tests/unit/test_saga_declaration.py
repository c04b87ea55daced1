"""Misuse of a saga, a step, a contract or a participant is told at import: the field, the problem, what to do."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from outbox import Transaction
from saga import (
    BodyError,
    NotDone,
    Participant,
    Retry,
    Run,
    SagaDeclarationError,
    StepContext,
    Unknown,
    remote,
    saga,
    step,
)


class Order(BaseModel):
    sku: str


class Reserved(BaseModel):
    shelf: str


@step
async def charge(ctx: StepContext, order: Order) -> str:
    return ctx.idempotency_key


@charge.compensation
async def refund(ctx: StepContext, done: str | Unknown, order: Order) -> None: ...


@step(irreversible=True)
async def mail(ctx: StepContext, order: Order, *, subject: str = "") -> None: ...


class Opaque: ...


async def no_parameter() -> None: ...


async def no_return(ctx: StepContext):  # type: ignore[no-untyped-def]  # noqa: ANN201
    ...


async def no_annotation(ctx: StepContext, order) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001


async def collects(ctx: StepContext, *orders: Order) -> None: ...


async def opaque(ctx: StepContext, order: Opaque) -> object: ...


async def one_parameter(run: Run) -> None: ...


async def body(run: Run, order: Order) -> None: ...


def not_async(ctx: StepContext, order: Order) -> None: ...


async def too_few(ctx: StepContext, done: str | Unknown) -> None: ...


async def undo(ctx: StepContext, done: Unknown | None, order: Order, *, subject: str) -> None: ...


async def handler(tx: Transaction, command: Order) -> Reserved:
    raise NotImplementedError


reserve = remote("stock.reserve", Order, Reserved, timeout=30)
MISUSES: dict[str, tuple[Callable[[], object], str]] = {
    "step without parameter": (lambda: step(no_parameter), "ctx: StepContext"),  # type: ignore[arg-type, call-overload]
    "step without return": (lambda: step(no_return), "annotate what it returns"),
    "step without annotation": (lambda: step(no_annotation), "has no annotation"),
    "step with *args": (lambda: step(collects), "name each parameter"),
    "step of a type without JSON": (lambda: step(opaque), "types that pydantic can write"),
    "step that is not async": (lambda: step(not_async), "write async def"),  # type: ignore[call-overload]
    "retry at most once": (lambda: step(at_most_once=True, retry=Retry(2)), "drop retry"),  # type: ignore[call-overload]
    "transactional with timeout": (lambda: step(transactional=True, timeout=3), "drop the other options"),  # type: ignore[call-overload]
    "no attempts": (lambda: Retry(0), "at least one"),
    "pauses that shrink": (lambda: Retry(3, initial=5, maximum=1), "0 <= initial <= maximum"),
    "no time": (lambda: step(timeout=0), "above zero"),
    "settles before": (lambda: step(settle=-1), "from zero"),
    "second compensation": (lambda: charge.compensation(refund), "keep one of the two"),
    "irreversible undone": (lambda: mail.compensation(undo), "drop irreversible=True"),
    "compensation of other arguments": (lambda: step(body).compensation(too_few), "let it take the same ones"),  # type: ignore[arg-type, call-overload]
    "remote without participant": (lambda: remote("reserve", Order, Reserved, timeout=3), "participant.command"),
    "remote that is no topic": (lambda: remote("a:b.reserve", Order, timeout=3), "name of a topic"),
    "saga of one parameter": (lambda: saga("x", deadline=3)(one_parameter), "async def name(run: Run"),  # type: ignore[arg-type]
    "saga without a name": (lambda: saga("", deadline=3), "is no name"),
    "saga without a deadline": (lambda: saga("x", deadline=timedelta(0))(body), "above zero"),
    "saga of version 0": (lambda: saga("x", version=0, deadline=3), "from 1"),
    "participant with a dot": (lambda: Participant("stock.a"), "participant.command"),
    "contract of another": (lambda: Participant("courier").on(reserve), "register it there"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_a_misuse_names_what_to_do(case: str) -> None:
    attempt, remedy = MISUSES[case]
    with pytest.raises(SagaDeclarationError) as raised:
        attempt()
    assert remedy in str(raised.value)
    assert raised.value.field
    assert raised.value.problem
    assert raised.value.remedy


def test_a_contract_has_one_handler() -> None:
    participant = Participant("stock")
    registered = participant.on(reserve)(handler)
    assert participant.handlers == {"stock.reserve": registered}
    with pytest.raises(SagaDeclarationError, match="is handled already"):
        participant.on(reserve)


def test_a_handler_is_undone_by_one_function_of_three_parameters() -> None:
    registered = Participant("stock").on(reserve)(handler)
    with pytest.raises(SagaDeclarationError, match="does not take"):
        registered.compensation(handler)  # type: ignore[arg-type]


def test_options_become_what_the_engine_reads() -> None:
    @step(retry=Retry(3, initial=1, maximum=timedelta(seconds=2)), timeout=timedelta(seconds=7))
    async def pay(ctx: StepContext, order: Order) -> int:
        return 1

    assert (pay.name, pay.kind, pay.retry.attempts, pay.timeout_seconds) == ("pay", "step", 3, 7.0)
    assert pay.settle_seconds > pay.timeout_seconds, "an effect may appear until the worker's lease has ended"
    assert [pay.retry.delay(n, 1.0) for n in (1, 2, 3)] == [1.0, 2.0, 2.0]
    assert pay.retry.delay(1, 0.0) == 0.5
    assert reserve.fences, "a participant refuses a command after its undo"

    @step(at_most_once=True)
    async def once(ctx: StepContext, order: Order) -> int:
        return 1

    assert once.retry.attempts == 1


def test_calling_describes_and_the_function_stays_callable() -> None:
    call = charge(Order(sku="x"))
    assert call.target is charge
    assert call.values == {"order": Order(sku="x")}
    with pytest.raises(TypeError):
        charge()  # type: ignore[call-arg]


async def test_a_step_can_be_called_outside_a_saga() -> None:
    context = StepContext(deps=None, idempotency_key="k", attempt=1)
    assert await charge.function(context, Order(sku="x")) == "k"


def test_one_name_means_one_step_in_a_saga() -> None:
    declared = saga("x", deadline=3)(body)
    declared.learn(charge)

    def another() -> Any:
        @step
        async def charge(ctx: StepContext, order: Order) -> str:
            return ""

        return charge

    with pytest.raises(BodyError, match="rename one of the functions"):
        declared.learn(another())


@step
async def in_a_helper(ctx: StepContext, order: Order) -> int:
    return 1


async def helper(run: Run, order: Order) -> int:
    return await run(in_a_helper(order))


@saga("reaching", deadline=3)
async def reaching(run: Run, order: Order) -> int:
    await run(charge(order))
    return await helper(run, order)


@step
async def in_a_comprehension(ctx: StepContext, order: Order) -> int:
    return 1


@step
async def in_a_list(ctx: StepContext, order: Order) -> int:
    return 1


@step
async def _of_a_class(ctx: StepContext, order: Order) -> int:
    return 1


class Steps:
    of_a_class = _of_a_class


EVERY = {"first": [in_a_list]}


@saga("fanning", deadline=3)
async def fanning(run: Run, order: Order) -> int:
    await run.parallel(*[in_a_comprehension(order) for _ in range(3)])
    for each in EVERY["first"]:
        await run(each(order))
    return await run(Steps.of_a_class(order))


@pytest.mark.parametrize("name", ["in_a_comprehension", "in_a_list", "_of_a_class"])
def test_a_step_is_found_wherever_the_code_names_it(name: str) -> None:
    """A cancel right after a claim, and replies after a restart, need it before the body has run.

    Red where `definition._names` looks at the function's own code object only, at modules only, at bare names only.
    """
    target = fanning.find(name)
    assert target is not None
    assert target.name == name


def test_a_step_is_found_by_its_name_before_any_body_has_run() -> None:
    assert reaching.find("charge") is charge
    assert reaching.find("in_a_helper") is in_a_helper
    assert reaching.find("nobody") is None


def test_values_of_ours_are_values() -> None:
    assert NotDone() == NotDone()
    assert Unknown("a") == Unknown("a") != Unknown("b")
    assert UUID(int=1) != Unknown("a")
