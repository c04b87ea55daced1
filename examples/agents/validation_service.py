"""The validation service: takes part in the sagas of others. `saga worker --app examples.agents.validation_service`."""

from examples.agents.contracts import Validate, Validated, validate
from outbox import Transaction
from saga import Participant, Rejected

participant = Participant("validation")


@participant.on(validate)
async def check(tx: Transaction, command: Validate) -> Validated:
    if "nonsense" in command.text:
        raise Rejected("the text is nonsense")
    result_id = await tx.fetchval(
        "insert into validation_results (workflow_id, content) values ($1, $2) returning id",
        command.workflow_id,
        command.text,
    )
    return Validated(result_id=result_id)


@check.compensation
async def withdraw(tx: Transaction, done: Validated, command: Validate) -> None:
    await tx.execute("update validation_results set status = 'withdrawn' where id = $1", done.result_id)
