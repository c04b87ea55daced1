"""What a deployment would bring, as `saga check` is given it: `asks` is changed, `sleeps` is not."""

from tests.support.changed_sagas import other_step
from tests.support.saga_cases import sleeps

__all__ = ["other_step", "sleeps"]
