"""The most rows that a run may have, learned from runs that did not fit into memory.

Rows need not be alike: a run of few long sequences may fail where many short ones fit. So what is
learned of rows of some size holds for rows at least as large, and not for smaller ones.
"""

from __future__ import annotations

import sys
from typing import Final

NO_LIMIT: Final = sys.maxsize


class Ceiling:
    """Limits by the bytes that one row of input has. One thread at a time changes it."""

    def __init__(self, rows: int | None = None) -> None:
        """`rows`: a limit known from before, for rows of any size."""
        # (bytes of a row, rows): the larger the row, the lower the limit.
        self._limits: tuple[tuple[int, int], ...] = () if rows is None else ((0, rows),)

    @property
    def lowest(self) -> int:
        """The limit for the largest rows; `NO_LIMIT` where nothing was learned."""
        return min((rows for _, rows in self._limits), default=NO_LIMIT)

    def rows(self, row_bytes: int) -> int:
        """The most rows of `row_bytes` bytes each; `NO_LIMIT` where nothing was learned of them."""
        return min((rows for least, rows in self._limits if least <= row_bytes), default=NO_LIMIT)

    def lower(self, row_bytes: int, rows: int) -> None:
        """From now on, no more than `rows` rows of `row_bytes` bytes or larger."""
        kept = [known for known in self._limits if known[0] < row_bytes or known[1] < rows]
        self._limits = (*kept, (row_bytes, rows))
