"""What the workflow service asks of other services: the contracts of its remote steps, which both sides import."""

from uuid import UUID

from pydantic import BaseModel

from saga import remote


class Validate(BaseModel):
    workflow_id: UUID
    text: str


class Validated(BaseModel):
    result_id: UUID


class Notify(BaseModel):
    workflow_id: UUID
    recipient: str
    text: str


class Notified(BaseModel):
    notification_id: UUID


# Short, so that the demo shows soon what late replies do. Minutes are better: until a killed worker's partitions have
# gone to another one nobody reads replies, and what is not read in time counts as not known.
validate = remote("validation.validate", Validate, Validated, timeout=8)
notify = remote("notification.notify", Notify, Notified, timeout=8)
