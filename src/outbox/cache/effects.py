"""What a handler says about the row with the event's key: a full row, a `Patch`, or `DELETE`."""

import enum
from types import MappingProxyType
from typing import Final
from uuid import UUID


class Delete(enum.Enum):
    """The type of `DELETE`, for annotations."""

    DELETE = enum.auto()


DELETE: Final = Delete.DELETE
"""The row is gone, whether or not the cache has it."""


class Patch:
    """Changes some columns of the row with this key.

    A patch of a row that the cache does not have waits in parking, with the key's later patches, for a full row.
    """

    __slots__ = ("columns", "key")

    def __init__(self, key: UUID | str | int, /, **columns: object) -> None:
        """Change `columns` of the row `key`."""
        self.key: Final = key
        self.columns: Final = MappingProxyType(columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Patch):
            return NotImplemented
        return (self.key, self.columns) == (other.key, other.columns)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        columns = "".join(f", {name}={value!r}" for name, value in self.columns.items())
        return f"Patch({self.key!r}{columns})"
