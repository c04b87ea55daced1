"""The notification service: tells people. `saga worker --app examples.agents.notification_service` serves it."""

from examples.agents.contracts import Notified, Notify, notify
from outbox import Transaction
from saga import Participant, Rejected

participant = Participant("notification")


@participant.on(notify)
async def send(tx: Transaction, command: Notify) -> Notified:
    if await tx.fetchval("select not enabled from notification_preferences where recipient = $1", command.recipient):
        raise Rejected(f"{command.recipient} does not want to be told")
    notification_id = await tx.fetchval(
        "insert into notifications (workflow_id, recipient, body) values ($1, $2, $3) returning id",
        command.workflow_id,
        command.recipient,
        command.text,
    )
    return Notified(notification_id=notification_id)


@send.compensation
async def take_back(tx: Transaction, done: Notified, command: Notify) -> None:
    await tx.execute("update notifications set status = 'cancelled' where id = $1", done.notification_id)
