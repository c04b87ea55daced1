"""Sagas on top of the outbox: steps that commit locally, and compensations that undo them.

The package may import `outbox`; `outbox` never imports it.
"""
