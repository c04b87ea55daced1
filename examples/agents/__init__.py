"""Two services and a cache between them: the example that `make demo` runs.

What a service of yours would contain:

    events.py             what the agent service tells others
    agent_service.py      writes and emits in one transaction; its tables are in agent_service.sql
    workflow_service.py   keeps a cache of the agents; its table is in workflow_service.sql

What makes a demonstration of it:

    demo.py               starts everything, waits for states, ends with a verdict
    stage.py              servers, databases, the topic, processes
    traffic.py            many writers, some of whom change their minds
    observer.py           how late the cache is, and whether it ever goes back
    progress.py           what the person watching sees
    verdict.py            every committed change against the topic and the cache
"""
