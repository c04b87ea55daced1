"""Sagas in memory: run them, and try everything that can go wrong, in milliseconds and without a database."""

from saga.testing.explore import Counterexample
from saga.testing.lab import Lab, Outcome, Stub

__all__ = ["Counterexample", "Lab", "Outcome", "Stub"]
