"""Sagas in memory: run them, and try everything that can go wrong, in milliseconds and without a database."""
