"""Evidence for and against a canary: e-values that may be looked at after every event.

An e-value is the wealth of a bettor who started with 1 and bets against a null hypothesis at fair
odds. While the null holds, wealth does not grow on average, so the chance that it *ever* reaches
1/α is at most α (Ville's inequality), however often one looks and whenever one stops. Fixed
thresholds and p-values lose that guarantee at the second look.

*Two arms.* A unit (a request, or a batch) goes to the canary (A = 1) with known probability ρ and
has an event (Y = 1: an error, a slow answer, a wrong label) or not. Null: p_canary ≤ r0·p_baseline
+ δ at all times, however p_baseline drifts and ρ is ramped. With

    Z = A·Y/ρ − r0·(1−A)·Y/(1−ρ),    E[Z] = p_canary − r0·p_baseline

the stake λ wins λ·(Z − δ) on every unit: nothing on average at the null's boundary, less inside
it. λ is a share of the largest stake that cannot go broke; nobody knows the best share beforehand,
so the capital is spread over `GRID` and wealth is the average. A test for the opposite claim
(PASS) bets on −(Z − δ).

*One arm* (shadow disagreement against a bound q0) and the closed forms for two arms bet on a beta
mixture of likelihood ratios instead. *Means* (cost) use a scale-invariant t-test mixture.

Everything is a pure function of counts, and so the same after a restart. Logarithms are natural.
Several triggers share one α by weighted Bonferroni (`log_threshold`). E-values of the same data may
be averaged (`log_average`); where either of two nulls excuses the canary, take the minimum.
Latency is the two-arm test of Y = "slower than a bound frozen before".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import fsum, inf, isfinite, log, log1p
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.core.incomplete_beta import log_beta, log_mass_above, log_mass_below

GRID: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The shares of the largest safe stake that the capital is spread over."""

_GRID: Final = np.array(GRID)

_Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ArmCounts:
    """`n` units of an arm, `k` of them with the event. Raises ValueError unless 0 ≤ k ≤ n < ∞."""

    n: float
    k: float

    def __post_init__(self) -> None:
        _check_counts(self.k, self.n)


@dataclass(frozen=True, slots=True)
class Period:
    """What both arms counted while a unit went to the canary with probability `rho`.

    A period without units, or with one arm closed (`rho` not between 0 and 1), is no evidence.
    """

    rho: float
    canary: ArmCounts
    baseline: ArmCounts


def log_e_two_arms(periods: Sequence[Period], r0: float, delta: float) -> float:
    """Log e-value against p_canary ≤ r0·p_baseline + delta: large when the canary is worse.

    `r0` is a ratio ≥ 0 and `delta` a probability in [0, 1), not both 0, else ValueError.
    """
    return float(_log_mean(_growth_by_period(periods, r0, delta, passing=False).sum(axis=0)))


def log_e_two_arms_pass(periods: Sequence[Period], r0: float, delta: float) -> float:
    """Log e-value against p_canary ≥ r0·p_baseline + delta: large when the canary is no worse.

    `r0` and `delta` as in `log_e_two_arms`.
    """
    return float(_log_mean(_growth_by_period(periods, r0, delta, passing=True).sum(axis=0)))


def log_e_late_onset(
    steps: Sequence[Sequence[Period]], planned: int, r0: float, delta: float
) -> float:
    """`log_e_two_arms`, as the average of a fresh copy started at each of `planned` steps.

    A canary that turns bad late has first to win back what the test lost while it was well; a
    fresh copy has nothing to win back. `steps` has one list of periods a step that has begun;
    the copies of later steps still hold their 1. Raises ValueError if more have begun than planned.
    """
    if planned < 1 or len(steps) > planned:
        raise ValueError(
            f"{len(steps)} of {planned} planned steps have begun: at least one must be planned, "
            "and no more begin than were planned"
        )
    rows = _growth_by_period(list(chain.from_iterable(steps)), r0, delta, passing=False)
    from_row_on = np.zeros((len(rows) + 1, _GRID.size))
    from_row_on[:-1] = rows[::-1].cumsum(axis=0)[::-1]
    first_rows = accumulate((len(step) for step in steps[:-1]), initial=0) if steps else ()
    copies = np.zeros(planned)
    copies[: len(steps)] = _log_mean(from_row_on[list(first_rows)])
    return float(_log_mean(copies))


def log_growth(
    rho: ArrayLike, counts: ArrayLike, r0: float, delta: float, *, passing: bool = False
) -> _Array:
    """Log growth of each bet of `GRID` over a period; arrays broadcast, to simulate many at once.

    `rho` has shape (…), every element in (0, 1); `counts` (…, 4): units and events of the canary,
    units and events of the baseline. Returns (…, 12). Growth adds up over periods.
    """
    if not (0 <= r0 < inf and 0 <= delta < 1 and r0 + delta > 0):
        raise ValueError(
            f"r0={r0}, delta={delta}: r0 ≥ 0 and 0 ≤ delta < 1 are allowed, not both 0"
        )
    rho = np.asarray(rho, dtype=np.float64)[..., np.newaxis]
    counts = np.asarray(counts, dtype=np.float64)[..., np.newaxis]
    canary_n, canary_k = counts[..., 0, :], counts[..., 1, :]
    baseline_n, baseline_k = counts[..., 2, :], counts[..., 3, :]
    # What Z − δ is for an event of the canary, one of the baseline, and for no event.
    canary, baseline, neither = 1 / rho - delta, -r0 / (1 - rho) - delta, -delta
    stake = -_GRID / canary if passing else -_GRID / baseline
    growth = canary_k * np.log1p(stake * canary)
    growth += baseline_k * np.log1p(stake * baseline)
    growth += (canary_n + baseline_n - canary_k - baseline_k) * np.log1p(stake * neither)
    return growth


def _growth_by_period(
    periods: Sequence[Period], r0: float, delta: float, *, passing: bool
) -> _Array:
    """Shape (periods, 12). What is no evidence has zeros."""
    table = np.array(
        [
            (p.rho, p.canary.n, p.canary.k, p.baseline.n, p.baseline.k)
            if 0 < p.rho < 1
            else (0.5, 0, 0, 0, 0)
            for p in periods
        ],
        dtype=np.float64,
    ).reshape(-1, 5)
    return log_growth(table[:, 0], table[:, 1:], r0, delta, passing=passing)


def _log_mean(logs: _Array) -> _Array:
    """Logarithm of the mean of what `logs` are logarithms of, over the last axis."""
    # Relative to the largest: nothing overflows, and the mean of equal values is exact.
    largest = logs.max(axis=-1, keepdims=True)
    mean = np.exp(logs - largest).sum(axis=-1) / logs.shape[-1]
    log_mean: _Array = largest[..., 0] + np.log(mean)
    return log_mean


def log_average(log_es: Sequence[float]) -> float:
    """Log of the average of e-values: again an e-value if all come from the same data.

    Raises ValueError if there are none.
    """
    if not log_es:
        raise ValueError("an average needs at least one e-value")
    return float(_log_mean(np.array(log_es, dtype=np.float64)))


def log_threshold(weight: float, alpha: float) -> float:
    """Where a trigger fires: log(1/(weight·alpha)), infinite for weight 0 (never by evidence).

    With weights that sum to at most 1, the chance that any trigger ever fires wrongly is `alpha`.
    Raises ValueError unless 0 ≤ weight ≤ 1 and 0 < alpha < 1.
    """
    if not (0 <= weight <= 1 and 0 < alpha < 1):
        raise ValueError(f"weight={weight}, alpha={alpha}: a weight in [0, 1], alpha in (0, 1)")
    return -log(weight) - log(alpha) if weight else inf


def log_bf_two_sided(
    canary_events: float, baseline_events: float, rho: float, kappa: float
) -> float:
    """Log Bayes factor against equal rates, closed form for one `rho`, from events alone.

    The canary's share of the events is Beta(kappa·rho, kappa·(1 − rho)) instead of `rho`: the
    larger `kappa`, the smaller the differences it looks for.
    """
    a, b = kappa * rho, kappa * (1 - rho)
    return _log_mixture(log_beta, canary_events, canary_events + baseline_events, rho, a, b)


def log_e_one_sided(
    canary_events: float,
    baseline_events: float,
    rho: float,
    r0: float,
    a: float = 1.0,
    b: float = 1.0,
) -> float:
    """Log e-value against p_canary ≤ r0·p_baseline, closed form for one `rho`, from events alone.

    The canary's share of the events is Beta(a, b), cut to above what the null allows.
    """
    share = rho * r0 / (rho * r0 + 1 - rho)
    return log_e_bounded(canary_events, canary_events + baseline_events, share, a, b)


def log_e_bounded(k: float, n: float, q0: float, a: float, b: float) -> float:
    """Log e-value against q ≤ q0 after `k` events in `n` units: large when events are too many.

    Bets on Beta(a, b) cut to (q0, 1). Raises ValueError unless 0 ≤ k ≤ n, 0 < q0 < 1, a > 0, b > 0.
    """
    return _log_mixture(lambda a, b: log_mass_above(a, b, q0), k, n, q0, a, b)


def log_e_bounded_pass(k: float, n: float, q0: float, a: float, b: float) -> float:
    """Log e-value against q ≥ q0: large when events are few. Otherwise as `log_e_bounded`."""
    return _log_mixture(lambda a, b: log_mass_below(a, b, q0), k, n, q0, a, b)


def _log_mixture(
    log_mass: Callable[[float, float], float], k: float, n: float, q0: float, a: float, b: float
) -> float:
    """Log likelihood of k in n under the prior with `log_mass`, over that under `q0`."""
    _check_counts(k, n)
    if not (0 < q0 < 1 and 0 < a < inf and 0 < b < inf):
        raise ValueError(f"q0={q0}, Beta({a}, {b}): q0 in (0, 1), a > 0 and b > 0 are allowed")
    return log_mass(a + k, b + n - k) - log_mass(a, b) - _log_likelihood(k, n, q0)


def _log_likelihood(k: float, n: float, q: float) -> float:
    return k * log(q) + (n - k) * log1p(-q)


def confidence_sequence(
    k: float, n: float, alpha: float, a: float, b: float
) -> tuple[float, float]:
    """Bounds on an event's probability, after `k` events in `n` units, that hold at all times.

    They are wrong at any time with a chance of at most `alpha`: all p that a Beta(a, b) mixture
    does not reject. Raises ValueError as `log_e_bounded`, and unless 0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: alpha in (0, 1) is allowed")

    def rejected(p: float) -> bool:
        return _log_mixture(log_beta, k, n, p, a, b) >= -log(alpha)

    # A mixture is never likelier than the best fit, k/n, so that is always inside.
    low = _border(rejected, 0.0, k / n) if k else 0.0
    high = _border(rejected, 1.0, k / n) if k < n else 1.0
    return low, high


def _border(rejected: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where `rejected` changes between two numbers, by bisection to neighbouring floats."""
    while (middle := (outside + inside) / 2) not in (outside, inside):
        if rejected(middle):
            outside = middle
        else:
            inside = middle
    return inside


def log_e_means(values: Sequence[float], tolerance_log: float) -> float:
    """Log e-value against a mean log ratio ≤ `tolerance_log`: large when the canary costs more.

    `values` are ln(canary / baseline), one a window, independent and roughly normal. Fewer than
    two, or a mean within the tolerance, are no evidence (0). Raises ValueError if not all finite.
    """
    if not (isfinite(tolerance_log) and all(map(isfinite, values))):
        raise ValueError("log ratios and their tolerance must be finite numbers")
    n = len(values)
    if n < 2:
        return 0.0
    mean = fsum(values) / n - tolerance_log
    if mean <= 0:
        return 0.0
    spread = fsum((value - tolerance_log - mean) ** 2 for value in values)
    shift, shrink = n * mean**2, 1 / (1 + n)
    # (1 + t²/ν) / (1 + r·t²/ν), multiplied out: a spread of zero is no division by zero.
    gain = log(spread + shift) - log(spread + shrink * shift)
    return 0.5 * log(shrink) + 0.5 * n * gain


def _check_counts(k: float, n: float) -> None:
    if not 0 <= k <= n < inf:
        raise ValueError(f"{k} events in {n} units: 0 ≤ events ≤ units is allowed")
