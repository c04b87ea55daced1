-- Around a handler that is called alone, in its savepoint.

-- name: begin_event
-- As if the transaction had just begun: what may be checked late is, up to the event's end. Lock, index, rows: none.
set constraints all deferred

-- name: end_event
-- Deferred constraints speak now, while it is known which event violates them. Locks: those of the checks.
set constraints all immediate
