"""What one inference costs, in integer nano-USD."""

from __future__ import annotations

from typing import Final

NANO: Final = 1_000_000_000
_SECONDS_PER_HOUR: Final = 3600


def direct_cost(usd_per_hour: float, run_s: float, rows: int, run_rows: int) -> int:
    """Direct cost of a request with `rows` of the `run_rows` rows of a run of `run_s` seconds.

    `usd_per_hour` is the price of the whole replica. Returns nano-USD, rounded to nearest:
    price / 3600 · run time · share of the rows.
    """
    return round(usd_per_hour * NANO / _SECONDS_PER_HOUR * run_s * rows / run_rows)


def format_usd(nano_usd: int) -> str:
    """Nano-USD as a decimal number of USD with nine places."""
    whole, part = divmod(nano_usd, NANO)
    return f"{whole}.{part:09d}"
