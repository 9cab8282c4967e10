"""Collects what is wrong with the records of one pass, so that a user is told of all of them at once."""

from qdist.core.errors import DataError

_NAMED = 3


class BadRecords:
    """Counts errors and keeps the first three."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[DataError] = []

    def add(self, error: DataError) -> None:
        """Take note of a record that cannot be used."""
        self.count += 1
        if len(self._first) < _NAMED:
            self._first.append(error)

    def raise_any(self, total: int, *, what: str = "records") -> None:
        """Raise DataError where there was one: itself if it is alone, else how many there are and the first three.

        total: records of the pass, the bad ones included.
        """
        if not self.count:
            return
        if self.count == 1:
            raise self._first[0]
        lines = [f"{self.count:,} of {total:,} {what} cannot be used", *(error.message for error in self._first)]
        if self.count > len(self._first):
            lines.append(f"and {self.count - len(self._first):,} more")
        raise DataError("\n  ".join(lines), try_=next((error.try_ for error in self._first if error.try_), ""))
