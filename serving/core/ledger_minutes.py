"""Amounts of the ledger by the minute."""

from __future__ import annotations

from collections.abc import Iterator

from serving.core.ledger_accounts import Amount


def by_minute(amount: Amount, begin_s: float, end_s: float) -> Iterator[tuple[int, Amount]]:
    """An amount that arose evenly between two Unix times, by the minute that a part of it fell in.

    A minute is the Unix time of its begin, in seconds. The parts add up to the amount.
    """
    first, last = int(begin_s // 60) * 60, int(end_s // 60) * 60
    done = Amount()
    for minute in range(first, last, 60):
        upto = _share(amount, (minute + 60 - begin_s) / (end_s - begin_s))
        yield minute, _less(upto, done)
        done = upto
    yield last, _less(amount, done)


def _share(whole: Amount, share: float) -> Amount:
    energy = None if whole.energy_mj is None else int(whole.energy_mj * share)
    numbers = (whole.nano_usd, whole.ns, whole.unpriced_ns, whole.requests)
    nano, ns, unpriced, requests = (int(n * share) for n in numbers)
    return Amount(nano, ns, unpriced, requests, energy)


def _less(amount: Amount, done: Amount) -> Amount:
    energy = None if amount.energy_mj is None else amount.energy_mj - (done.energy_mj or 0)
    return Amount(
        amount.nano_usd - done.nano_usd,
        amount.ns - done.ns,
        amount.unpriced_ns - done.unpriced_ns,
        amount.requests - done.requests,
        energy,
    )
