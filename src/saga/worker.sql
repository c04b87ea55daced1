-- What a worker says once, when it starts.

-- name: register_saga
-- One row, once for each definition; by primary key.
insert into saga.workflows (id, name, version) values ($1, $2, $3) on conflict do nothing
