"""Python's garbage collector, held while a batch or a page is decoded.

A batch of some thousand events is a hundred thousand objects that all live until it is encoded, and then die by their
reference counts. The collector runs after each 700 new ones (its default), looks at every one of them up to three
times and finds nothing: a third of a consumer's CPU, and of a rebuild's. So it rests for a section without an await, of
a bounded number of records, and the objects are gone when it wakes.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """No collections within the block; one that somebody switched off stays off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
