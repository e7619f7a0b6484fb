"""Tail masses of the beta density, as logarithms.

In logarithms because the tails that evidence is made of underflow a float long before a shadow run
ends (a million pairs without a disagreement have a tail of 1e-8774), and the logarithm of zero is
of no use to a test.
"""

from __future__ import annotations

from math import exp, lgamma, log, log1p, tau
from typing import Final

_STIRLING_FROM: Final = 10.0
_TINY: Final = 1e-300
_PRECISION: Final = 1e-14
# About 0.2·sqrt(max(a, b)) terms are enough, so this is never reached: it only rules out a hang.
_MAX_TERMS: Final = 1_000_000


def log_beta(a: float, b: float) -> float:
    """Logarithm of the beta function B(a, b), for a, b > 0.

    Large arguments by Stirling's series: in lgamma(a) + lgamma(b) − lgamma(a + b) little would be
    left of a small difference of large numbers.
    """
    small, large = min(a, b), max(a, b)
    if large < _STIRLING_FROM:
        return lgamma(small) + lgamma(large) - lgamma(small + large)
    whole = small + large
    ratio = _stirling(large) - _stirling(whole) - (large - 0.5) * log1p(small / large)
    if small < _STIRLING_FROM:
        return lgamma(small) + ratio - small * (log(whole) - 1)
    return ratio + _stirling(small) + (small - 0.5) * log(small / whole) - 0.5 * log(whole / tau)


def _stirling(x: float) -> float:
    """What Stirling's formula for ln Γ(x) lacks, to 1e-12 from `_STIRLING_FROM` on."""
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / x**2) / x**2) / x**2) / x


def log_mass_below(a: float, b: float, x: float) -> float:
    """Logarithm of ∫ t^(a−1)·(1−t)^(b−1) dt over (0, x), for a, b > 0 and 0 < x < 1."""
    return _log_mass(a, b, x, 1 - x)


def log_mass_above(a: float, b: float, x: float) -> float:
    """Logarithm of ∫ t^(a−1)·(1−t)^(b−1) dt over (x, 1), for a, b > 0 and 0 < x < 1."""
    return _log_mass(b, a, 1 - x, x)


def _log_mass(a: float, b: float, x: float, y: float) -> float:
    """Mass below x, with y = 1 − x. The fraction converges fast on the thin side of the mean."""
    if x < (a + 1) / (a + b + 2):
        return _log_thin_tail(a, b, x, y)
    total = log_beta(a, b)
    return total + log1p(-exp(_log_thin_tail(b, a, y, x) - total))


def _log_thin_tail(a: float, b: float, x: float, y: float) -> float:
    return a * log(x) + b * log(y) - log(a) + log(_continued_fraction(a, b, x))


def _continued_fraction(a: float, b: float, x: float) -> float:
    """The incomplete beta function's continued fraction (DLMF 8.17.22), by Lentz's method."""
    c = 1.0
    d = 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MAX_TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _not_zero(1 + term * d)
            c = _not_zero(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
