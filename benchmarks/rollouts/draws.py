"""Counts of a busy gateway, which draws requests in groups: a draw is what goes to an arm at once.

Events strike what has one fate. In `blips` it is moments: for 50 ms everything fails, or is slow,
in whichever arm. In `draws` a third of the events comes so, a third strikes whole runs (stable's
has two draws, the canary's has one), and a third single requests.

Every draw is of the most requests that one may have, which is the hardest case. The seconds of a
block share its moments evenly; tests/core has traffic in which a moment is within its second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.gateway.draws import MOST

BLIP_S: Final = 0.05
PARTS: Final[Mapping[str, tuple[float, float]]] = {"draws": (1 / 3, 1 / 3), "blips": (1.0, 0.0)}
"""By scenario, which parts of all events come in moments, and in whole runs."""

_STABLE: Final = 2
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


def divided(rng: np.random.Generator, expected: _Floats, shares: _Floats) -> _Ints:
    """How many draws go to each source, (sources, rollouts, blocks).

    So many requests are `expected` a block; `shares`, of the result's shape, is a source's part.
    """
    left = rng.poisson(expected / MOST, shares.shape[1:])
    among, found = np.ones(left.shape), []
    for share in shares[:-1]:
        here = rng.binomial(left, np.clip(share / np.maximum(among, 1e-12), 0.0, 1.0))
        found.append(here)
        left, among = left - here, among - share
    return np.stack([*found, left])


def counts(
    rng: np.random.Generator, scenario: str, rate: float, draws: _Ints, parts: _Floats
) -> _Floats:
    """Tallies (rollouts, blocks, sources, 4) of so many `draws` (sources, rollouts, blocks).

    `rate` is requests a second, and `parts`, of the same shape as `draws`, the part of a source's
    requests that have the event.
    """
    of_moments, of_runs = PARTS[scenario]
    # What strikes a moment strikes stable and canary alike.
    usual, total = parts[_STABLE], draws.sum(axis=0)
    in_blip = max(1, round(rate * BLIP_S / MOST))
    moments = rng.poisson(of_moments * usual * total / in_blip)
    struck = np.minimum(in_blip * moments, total)
    found = []
    for source, part in enumerate(parts):
        size = 2 if source == _STABLE else 1
        bad = rng.hypergeometric(draws[source], total - draws[source], struck)
        total, struck = total - draws[source], struck - bad
        whole = np.minimum(of_runs * usual, part)
        single = np.maximum(part - (of_moments + of_runs) * usual, 0.0)
        n, k, runs, failed = _by_runs(rng, draws[source] - bad, size, whole, single)
        lost = bad * MOST, _runs(bad, size)
        found.append([n + lost[0], k + lost[0], runs + lost[1], failed + lost[1]])
    return np.moveaxis(np.array(found, np.float64), (0, 1), (2, 3))


def _by_runs(
    rng: np.random.Generator, draws: _Ints, size: int, whole: _Floats, single: _Floats
) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """The tally of draws in runs of `size`: a part `whole` of runs fails, `single` of requests."""
    runs = _runs(draws, size)
    lost = rng.binomial(runs, whole)
    gone = np.minimum(size * lost, draws)
    alone = rng.binomial((draws - gone) * MOST, single)
    hit = rng.binomial(runs - lost, 1 - (1 - single) ** (size * MOST))
    hit = np.minimum(np.maximum(hit, alone > 0), np.minimum(alone, runs - lost))
    return draws * MOST, gone * MOST + alone, runs, lost + hit


def _runs(draws: _Ints, size: int) -> _Ints:
    return -(-draws // size)
