"""The rules by which Flagger, Argo Rollouts and Kayenta take a canary back.

Read in their sources and documentation, and nothing but the decision: each is given a perfect
monitoring system (no scrape delay, exact quantiles). A check fails without data, as theirs does.

- Flagger 1.44.0: `pkg/controller/scheduler.go` (advanceCanary: failed checks add up and are never
  taken off; the rollback comes at the check after the one that reached the threshold),
  `scheduler_metrics.go` (which check fails), `docs/gitbook/tutorials/istio-progressive-delivery.md`
  (interval 1m, threshold 5, success rate ≥ 99 % over 1m, p99 ≤ 500 ms).
- Argo Rollouts, 9f8d111 (after 1.10.0-rc1): `docs/features/analysis.md` (interval 5m, success rate
  ≥ 0.95, failureLimit 3, irate: the latest scrape), `analysis/analysis.go` (fails at more than
  failureLimit failed measurements).
- Kayenta, a69573b (April 2025): `NetflixACAJudge.scala` (98 %, tolerance 0.25, either direction),
  `MannWhitneyClassifier.scala`, `MannWhitney.scala`; spinnaker.io, "Best practices for configuring
  canary": at least 50 data points, a baseline as large as the canary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import norm, rankdata

from benchmarks.rollouts.cells import Array

MINUTE_S: Final = 60


@dataclass(frozen=True)
class ThresholdRule:
    """Checks that a success rate and a p99 are within bounds; so many failed ones are too many.

    `every` is in minutes: each check sees the last minute's traffic. `lag` is how many checks after
    the last straw the rollback comes.
    """

    failures: int
    least_success: float
    most_p99_s: float = np.inf
    every: int = 1
    lag: int = 0

    def decide(self, success: Array, p99_s: Array) -> Array:
        """When it rolls back, in seconds (inf: never); minutes are (rollouts, minutes)."""
        checked = slice(self.every - 1, None, self.every)
        # NaN, no data, is not within bounds.
        within = (success[:, checked] >= self.least_success) & (
            p99_s[:, checked] <= self.most_p99_s
        )
        failed = (~within).cumsum(axis=1) >= self.failures
        check = failed.argmax(axis=1) + 1 + self.lag
        done = failed.any(axis=1) & (check <= failed.shape[1])
        return np.where(done, check * self.every * MINUTE_S, np.inf)


FLAGGER: Final = ThresholdRule(failures=5, least_success=0.99, most_p99_s=0.5, lag=1)
ARGO: Final = ThresholdRule(failures=4, least_success=0.95, every=5)


@dataclass(frozen=True)
class Kayenta:
    """Mann-Whitney U of a value a minute, after `minutes`; the canary fails if any metric differs.

    With two metrics in groups of equal weight one that differs makes a score of 50: below 75, the
    usual marginal threshold. `z` is the normal quantile of the confidence level.
    """

    minutes: int = 50
    z: float = float(norm.ppf(0.99))
    tolerance: float = 0.25
    either: bool = True

    def decide(self, metrics: list[tuple[Array, Array]]) -> Array:
        """When it rolls back, in seconds; metrics are (canary, baseline), (rollouts, minutes)."""
        failed = np.zeros(len(metrics[0][0]), dtype=np.bool_)
        for canary, baseline in metrics:
            high, low = self.scores(canary, baseline)
            failed |= (high > self.z) | (self.either & (low > self.z))
        return np.where(failed, self.minutes * MINUTE_S, np.inf)

    def scores(self, canary: Array, baseline: Array) -> tuple[Array, Array]:
        """By rollout, the largest z at which the canary is high, and at which it is low."""
        pairs = [
            self._scores(x[: self.minutes], y[: self.minutes])
            for x, y in zip(canary, baseline, strict=True)
        ]
        high, low = np.array(pairs).T
        return high, low

    def _scores(self, x: Array, y: Array) -> tuple[float, float]:
        if np.array_equal(np.sort(x), np.sort(y)):
            return -np.inf, -np.inf
        shift = abs(float(np.median(np.subtract.outer(x, y)))) * self.tolerance
        return mann_whitney_z(x - shift, y), -mann_whitney_z(x + shift, y)


def mann_whitney_z(x: Array, y: Array) -> float:
    """The U statistic of x against y in standard deviations, corrected for ties and continuity.

    -inf where all are equal: there is nothing to compare.
    """
    n, m = len(x), len(y)
    ranks = rankdata(np.concatenate([x, y]))
    u = ranks[:n].sum() - n * (n + 1) / 2 - n * m / 2
    _, ties = np.unique(ranks, return_counts=True)
    spread = (n * m / 12) * (n + m + 1 - float((ties**3 - ties).sum()) / ((n + m) * (n + m - 1)))
    return float((u - np.sign(u) * 0.5) / np.sqrt(spread)) if spread > 0 else -np.inf
