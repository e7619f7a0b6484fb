"""How much evidence events are that come in clusters: a failed batch of 32 is one event, not 32.

Requests of one batch share its fate more or less. To count each as an event of its own overstates
the evidence; to count batches compares unlike things as soon as the arms batch differently, because
a large batch is likelier to have a failure in it (with independent failures the canary's small
batches then look healthy whatever they do). So requests are counted, and both numbers of an arm are
divided by Kish's design effect

    d = 1 + (m − 1)·c,    m requests a batch, c the correlation of events within a batch:

d = 1 for independent failures, d = m where a batch fails as a whole. The event's rate k/n stays
what it was; the number of units it stands on becomes what it is worth.

A batch is a run, or the requests of one draw where that is more: those went to their arm together.

The correlation comes from two counts, k of n requests and f of b batches with an event. Let a
batch have a shared event with probability q, and a request one of its own with probability p. Then
1 − k/n = (1 − q)(1 − p) and 1 − f/b = (1 − q)(1 − p)^m give both.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Before anything is known events count as shared, with the weight of a quarter of a failed batch:
# the smallest prior that kept false alarms of every simulated mixture below one in a thousand.
_PRIOR_BATCHES: Final = 0.25


def correlation(counts: ArrayLike) -> NDArray[np.float64]:
    """How far requests of one batch share an event, 0 (not at all) to 1 (all or none).

    `counts` has shape (…, 4): requests, those with the event, batches, those with the event.
    Returns shape (…); 0 where there was no event.
    """
    n, k, batches, failed = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    n, batches = np.maximum(n, 1.0), np.maximum(batches, 1.0)
    rate = np.minimum(k / n, _ALMOST_ONE)
    batch_rate = np.minimum(failed / batches, _ALMOST_ONE)
    others = np.maximum(n / batches - 1.0, _ALMOST_ZERO)
    spared = np.minimum((1.0 - batch_rate) / (1.0 - rate), 1.0)
    own = np.minimum(1.0 - spared ** (1.0 / others), rate)
    shared = 1.0 - (1.0 - rate) / (1.0 - own)
    covariance = shared * (1.0 - shared) * (1.0 - own) ** 2
    variance = np.maximum(rate * (1.0 - rate), _ALMOST_ZERO)
    result: NDArray[np.float64] = np.clip(covariance / variance, 0.0, 1.0)
    return result


def design_effect(counts: ArrayLike) -> NDArray[np.float64]:
    """What to divide an arm's units and events by, in each of its epochs; at least 1.

    `counts` has shape (…, epochs, 4), the last axis as in `correlation`. Returns (…, epochs). The
    correlation is learnt from all epochs, batches are as large as they were in the epoch.
    """
    table = np.asarray(counts, np.float64)
    n, k, batches, failed = np.moveaxis(table, -1, 0)
    size = np.maximum(n / np.maximum(batches, 1.0), 1.0)
    # A failed batch of one request says nothing about how requests of a batch fail.
    weight = failed * (1.0 - 1.0 / size)
    known = (weight * correlation(table)).sum(-1, keepdims=True) + _PRIOR_BATCHES
    shared = known / (weight.sum(-1, keepdims=True) + _PRIOR_BATCHES)
    # Where larger batches than usual fail, clusters are larger than a batch is on average.
    seen: Any = k / np.maximum(failed, 1.0)
    result: NDArray[np.float64] = np.maximum(1.0 + (size - 1.0) * shared, seen)
    return result


_ALMOST_ZERO: Final = 1e-12
_ALMOST_ONE: Final = 1.0 - 1e-12
