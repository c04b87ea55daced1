"""Four services, a cache and a saga between them: the example that `make demo` runs.

What services of yours would contain; the tables of each are in the .sql file of its name:

    events.py                what the agent service tells others
    agent_service.py         writes and emits in one transaction; executes prompts, once an id
    workflow_service.py      keeps a cache of the agents
    contracts.py             what the workflow service asks of the next two
    workflow_saga.py         what has to happen in four databases, or in none
    validation_service.py    takes part in it
    notification_service.py  likewise

What makes a demonstration of it:

    demo.py                  starts everything, waits for states, ends with a verdict
    stage.py                 servers, databases, topics, processes
    traffic.py               many writers, some of whom change their minds
    observer.py              how late the cache is, and whether it ever goes back
    workflows.py             sagas, and the large troubles: a killed worker, replies that are late
    trouble.py, trouble.sql  the small ones: a bad network, writes that fail
    progress.py              what the person watching sees
    verdict.py               every committed change against the topic and the cache
    saga_verdict.py          every saga's outcome against what the services' tables hold
    sabotage.py              how to see the verdict fail
"""
