"""Questions about many keys."""

from collections.abc import Sequence
from uuid import UUID

from outbox import OwnerPage, limits
from outbox.cache.asking import answers, questions

KEYS = [str(UUID(int=n)) for n in range(1_000)]


class Counting:
    """Answers nothing, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[object]] = []

    async def page(self, after: object | None, limit: int) -> OwnerPage:
        raise NotImplementedError

    async def get(self, key: object) -> OwnerPage:
        self.asked.append([key])
        return OwnerPage(log="1-0000", snapshot="1:1:", rows=[], last=True)


class Comparable(Counting):
    async def get_many(self, keys: Sequence[object]) -> OwnerPage:
        self.asked.append(list(keys))
        return OwnerPage(log="1-0000", snapshot="1:1:", rows=[], last=True)

    async def digests(self, columns: Sequence[str]) -> OwnerPage:
        raise NotImplementedError

    async def bucket_keys(self, columns: Sequence[str], buckets: Sequence[int], after: str, limit: int) -> OwnerPage:
        raise NotImplementedError


async def test_a_question_fits_into_a_url() -> None:
    """Red with all keys in one question, as reads of many stale rows once asked: a thousand keys are 40 KB of URL."""
    owner = Comparable()
    spoken_for = [key async for keys, _ in answers(owner, KEYS, UUID) for key in keys]
    assert spoken_for == KEYS
    assert [key for keys in owner.asked for key in keys] == list(map(UUID, KEYS))
    assert max(map(len, owner.asked)) <= limits.OWNER_KEYS_ASKED


def test_long_keys_are_fewer_to_a_question() -> None:
    assert [len(part) for part in questions(["k" * 1_500] * 5)] == [2, 2, 1]
    assert [len(part) for part in questions(["k" * 9_000] * 2)] == [1, 1]


async def test_an_owner_that_takes_one_key_each_is_asked_so() -> None:
    owner = Counting()
    assert [keys async for keys, _ in answers(owner, KEYS[:40], UUID)] == [[key] for key in KEYS[:40]]
    assert owner.asked == [[UUID(key)] for key in KEYS[:40]]
