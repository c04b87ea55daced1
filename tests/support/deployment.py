"""What a deployment would bring, as `saga check` is given it: `asks` is changed, `sleeps` prints."""

from tests.support.changed_sagas import other_step, printing

__all__ = ["other_step", "printing"]
