from __future__ import annotations

import timeit
from itertools import product
from math import comb, exp, inf, isfinite, log, log1p, nan
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln

from serving.core import evidence
from serving.core.evidence import (
    GRID,
    ArmCounts,
    Period,
    confidence_sequence,
    log_average,
    log_bf_two_sided,
    log_e_bounded,
    log_e_bounded_pass,
    log_e_late_onset,
    log_e_means,
    log_e_one_sided,
    log_e_two_arms,
    log_e_two_arms_pass,
    log_growth,
    log_threshold,
)

R0, DELTA = 1.5, 0.001
COST_RATIOS = (0.10, 0.14, 0.20, 0.09, 0.17, 0.12, 0.15, 0.11, 0.19, 0.13)


def period(canary: tuple[float, float], baseline: tuple[float, float], rho: float) -> Period:
    """Arms as (events, units), in the order in which the vectors are written."""
    return Period(rho, ArmCounts(canary[1], canary[0]), ArmCounts(baseline[1], baseline[0]))


def five_percent(canary: tuple[float, float], baseline: tuple[float, float]) -> list[Period]:
    return [period(canary, baseline, 0.05)]


# --- reference values ---------------------------------------------------------------------------


RAMP = [period((2, 40), (1, 760), 0.05), period((6, 200), (2, 800), 0.2)]
REFERENCE = {
    "V1": (8.479617, log_e_two_arms, five_percent((4, 80), (1, 1520)), 1, 0),
    "V2": (6.328874, log_e_two_arms, five_percent((4, 80), (1, 1520)), R0, DELTA),
    "V3": (5.625572, log_e_two_arms, RAMP, R0, DELTA),
    "V4": (-3.172185, log_e_two_arms, five_percent((5, 5000), (95, 95000)), R0, DELTA),
    "V4b": (2.308086, log_e_two_arms, five_percent((2, 200), (0, 3800)), R0, DELTA),
    "V5 wide": (0.890265, log_bf_two_sided, 4, 1, 0.05, 100),
    "V5 narrow": (6.081477, log_bf_two_sided, 4, 1, 0.05, 1),
    "V6": (8.684317, log_e_one_sided, 4, 1, 0.05, 1),
    "V6 margin": (7.210602, log_e_one_sided, 4, 1, 0.05, 1.5),
    "V7": (4.177649, log_e_bounded, 9, 100, 0.02, 1, 1),
    "V7 prior": (5.587817, log_e_bounded, 9, 100, 0.02, 0.5, 5),
    "V8": (-2.079208, log_e_bounded, 30, 1000, 0.02, 1, 1),
    "V10": (6.592735, log_e_means, COST_RATIOS, log(1.05)),
    "V10 tolerant": (2.876726, log_e_means, COST_RATIOS, log(1.1)),
    "V13": (6.801894, log_e_two_arms_pass, five_percent((3, 3000), (57, 57000)), R0, 0.004),
    "V14": (2.053892, log_e_bounded_pass, 2, 1500, 0.005, 0.5, 50),
}


@pytest.mark.parametrize("vector", REFERENCE.values(), ids=REFERENCE)
def test_reference_values(vector):
    expected, log_e, *arguments = vector
    assert log_e(*arguments) == pytest.approx(expected, abs=1e-5)


# V9
@pytest.mark.parametrize(("k", "low", "high"), [(5, 0.000539304, 0.018003859), (0, 0, 0.006997503)])
def test_reference_confidence_sequences(k, low, high):
    bounds = confidence_sequence(k, 1000, 0.05, 0.5, 0.5)
    assert bounds == pytest.approx((low, high), abs=1e-8)


# --- two arms: what makes it an e-value -----------------------------------------------------------

shares = st.floats(0.001, 0.999)
ratios = st.floats(0, 5)
margins = st.floats(0.0001, 0.5)


def expectation(log_e, rho: float, p_canary: float, p_baseline: float) -> float:
    """The mean e-value after one unit, over the four things that can happen to it."""
    return sum(
        (rho if canary else 1 - rho) * (p if event else 1 - p) * exp(log_e([one]))
        for canary, event in product((0, 1), (0, 1))
        for p in (p_canary if canary else p_baseline,)
        for one in (period((event, 1), (0, 0), rho) if canary else period((0, 0), (event, 1), rho),)
    )


@given(
    rho=shares, r0=ratios, delta=margins, at=st.floats(0, 1), inside=st.floats(0, 1), data=st.data()
)
@pytest.mark.parametrize("passing", [False, True])
def test_wealth_neither_grows_nor_shrinks_on_average_at_the_boundary(
    passing, rho, r0, delta, at, inside, data
):
    bet = data.draw(st.floats(0.001, 0.999), label="the only bet")
    test = log_e_two_arms_pass if passing else log_e_two_arms
    p_baseline = at * min(1, (1 - delta) / r0 if r0 else 1)
    boundary = min(1, r0 * p_baseline + delta)
    within = boundary + inside * (1 - boundary) if passing else boundary * inside

    with patch.object(evidence, "_GRID", np.array([bet])):
        at_boundary = expectation(lambda p: test(p, r0, delta), rho, boundary, p_baseline)
        in_null = expectation(lambda p: test(p, r0, delta), rho, within, p_baseline)

    assert at_boundary == pytest.approx(1, abs=1e-9)
    assert in_null <= 1 + 1e-9


def test_wealth_grows_on_average_outside_the_null():
    assert expectation(lambda p: log_e_two_arms(p, R0, DELTA), 0.05, 0.05, 0.001) > 1.01
    assert expectation(lambda p: log_e_two_arms_pass(p, R0, 0.01), 0.05, 0.001, 0.001) > 1


class Ramp:
    """Many rollouts of four steps each at once, their baseline drifting, counted each second."""

    RHOS = (0.01, 0.05, 0.25, 0.5)
    SECONDS = 75

    def __init__(self, runs: int, seed: int) -> None:
        self.runs = runs
        self.random = np.random.default_rng(seed)

    def seconds(self, canary_rate):
        """Yields (step, ρ, counts of shape (runs, 4)), 40 units a second."""
        for step, rho in enumerate(self.RHOS):
            for second in range(self.SECONDS):
                baseline = 0.05 + 0.045 * np.sin((step * self.SECONDS + second) / 30)
                canary_n = self.random.binomial(40, rho, self.runs)
                canary_k = self.random.binomial(canary_n, canary_rate(baseline, step))
                baseline_k = self.random.binomial(40 - canary_n, baseline)
                yield step, rho, np.stack([canary_n, canary_k, 40 - canary_n, baseline_k], axis=-1)

    def most(self, canary_rate, *, passing: bool = False, late_onset: bool = False):
        """The largest log e-value a rollout ever had: shape (runs,)."""
        copies = np.zeros((len(self.RHOS) if late_onset else 1, self.runs, len(GRID)))
        most = np.zeros(self.runs)
        for step, rho, counts in self.seconds(canary_rate):
            started = slice(0, step + 1)
            copies[started] += log_growth(rho, counts, R0, DELTA, passing=passing)
            log_e = np.logaddexp.reduce(copies, axis=(0, 2)) - log(copies.shape[0] * len(GRID))
            most = np.maximum(most, log_e)
        return most


def boundary(baseline: float, step: int) -> float:
    return R0 * baseline + DELTA


@pytest.mark.parametrize("passing", [False, True])
def test_looked_at_every_second_it_fires_wrongly_no_more_often_than_promised(passing):
    most = Ramp(runs=4000, seed=1).most(boundary, passing=passing)
    for alpha in (0.01, 0.05):
        assert 0 < np.mean(most >= -log(alpha)) <= alpha


def test_late_onset_copies_keep_the_promise_too():
    fired = Ramp(runs=1500, seed=2).most(boundary, late_onset=True) >= -log(0.05)
    assert 0 < np.mean(fired) <= 0.05


def test_a_canary_as_good_is_left_alone_and_a_bad_one_is_found():
    ramp = Ramp(runs=500, seed=3)
    assert np.mean(ramp.most(lambda p, _: p) >= -log(0.01)) <= 0.01
    assert np.all(ramp.most(lambda p, _: 5 * p) >= -log(0.01))


def test_a_small_canary_with_five_percent_errors_is_found_in_seconds():
    """200 units a second, 5 % of them to the canary, 0.1 % errors of the baseline."""
    random = np.random.default_rng(4)
    threshold = log_threshold(0.3, 0.01)
    seconds_needed = []
    for _ in range(200):
        canary, baseline, second = np.zeros(2), np.zeros(2), 0
        log_e = 0.0
        while log_e < threshold and second < 120:
            second += 1
            n = random.binomial(200, 0.05)
            canary += n, random.binomial(n, 0.05)
            baseline += 200 - n, random.binomial(200 - n, 0.001)
            log_e = log_e_two_arms(
                [Period(0.05, ArmCounts(*canary), ArmCounts(*baseline))], R0, DELTA
            )
        seconds_needed.append(second)
    assert np.median(seconds_needed) < 15
    assert max(seconds_needed) < 60


def test_arrays_and_periods_give_the_same():
    ramp = list(Ramp(runs=3, seed=5).seconds(boundary))
    growth = sum(log_growth(rho, counts, R0, DELTA) for _, rho, counts in ramp)
    for run in range(3):
        periods = [
            Period(rho, ArmCounts(*counts[run, :2]), ArmCounts(*counts[run, 2:]))
            for _, rho, counts in ramp
        ]
        assert log_e_two_arms(periods, R0, DELTA) == pytest.approx(
            np.logaddexp.reduce(growth[run]) - log(len(GRID)), abs=1e-9
        )


# --- two arms: how it answers to its input --------------------------------------------------------


@st.composite
def arms(draw, most: int = 2000) -> ArmCounts:
    n = draw(st.integers(0, most))
    return ArmCounts(n, draw(st.integers(0, n)))


@st.composite
def some_periods(draw) -> list[Period]:
    made = st.builds(Period, shares, arms(), arms())
    return draw(st.lists(made, max_size=6))


@given(periods=some_periods(), rho=shares, canary=arms(), baseline=arms(), r0=ratios, delta=margins)
def test_more_events_of_the_canary_speak_against_it_and_more_of_the_baseline_for_it(
    periods, rho, canary, baseline, r0, delta
):
    canary, baseline = (ArmCounts(arm.n + 1, arm.k) for arm in (canary, baseline))
    one_more = ArmCounts(canary.n, canary.k + 1), ArmCounts(baseline.n, baseline.k + 1)

    for test, sign in ((log_e_two_arms, 1), (log_e_two_arms_pass, -1)):

        def speaks(canary: ArmCounts, baseline: ArmCounts) -> float:
            added = Period(rho, canary, baseline)
            return sign * test([*periods, added], r0, delta)  # noqa: B023

        rounding = 1e-9 * abs(speaks(canary, baseline)) + 1e-9
        assert speaks(one_more[0], baseline) > speaks(canary, baseline) - rounding
        assert speaks(canary, one_more[1]) < speaks(canary, baseline) + rounding


def test_one_more_event_makes_a_difference():
    before = log_e_two_arms(five_percent((4, 80), (1, 1520)), R0, DELTA)
    assert log_e_two_arms(five_percent((5, 80), (1, 1520)), R0, DELTA) > before + 0.5
    assert log_e_two_arms(five_percent((4, 80), (2, 1520)), R0, DELTA) < before - 0.1


def total(counts: list[ArmCounts]) -> ArmCounts:
    return ArmCounts(sum(c.n for c in counts), sum(c.k for c in counts))


@given(
    parts=st.lists(st.tuples(arms(), arms()), min_size=1, max_size=6),
    rho=shares,
    others=some_periods(),
    at=st.integers(0, 6),
    r0=ratios,
    delta=margins,
)
def test_it_does_not_matter_how_counts_are_split_into_periods(parts, rho, others, at, r0, delta):
    canary, baseline = zip(*parts, strict=True)
    whole = [*others, Period(rho, total(canary), total(baseline))]
    split = [*others[:at], *(Period(rho, *part) for part in parts), *others[at:]]
    for test in (log_e_two_arms, log_e_two_arms_pass):
        assert test(split, r0, delta) == pytest.approx(test(whole, r0, delta), rel=1e-9, abs=1e-9)


def test_counts_pooled_over_a_ramp_would_accuse_a_healthy_canary():
    """The canary's share grew while all errors did (Simpson): each period has its own share."""
    quiet = period((1, 1000), (19, 19000), 0.05)
    busy = period((500, 10000), (500, 10000), 0.5)
    pooled = period((501, 11000), (519, 29000), 11000 / 40000)

    assert log_e_two_arms([pooled], R0, DELTA) > log_threshold(1, 0.01)
    assert log_e_two_arms([quiet, busy], R0, DELTA) < 0


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.1, 1.5, nan])
def test_with_one_arm_closed_there_is_nothing_to_compare(rho):
    open_period = period((4, 80), (1, 1520), 0.05)
    closed = Period(rho, ArmCounts(100, 100), ArmCounts(0, 0))
    for test in (log_e_two_arms, log_e_two_arms_pass):
        assert test([closed], R0, DELTA) == 0
        assert test([closed, open_period], R0, DELTA) == test([open_period], R0, DELTA)


def test_no_data_is_no_evidence():
    nothing = period((0, 0), (0, 0), 0.05)
    for test in (log_e_two_arms, log_e_two_arms_pass):
        assert test([], R0, DELTA) == 0
        assert test([nothing], R0, DELTA) == 0
    assert log_e_late_onset([], 4, R0, DELTA) == 0
    assert log_e_late_onset([[], [nothing]], 4, R0, DELTA) == 0


@pytest.mark.parametrize("n", [1e9, 1e15])
def test_large_counts_do_not_overflow(n):
    bad = [period((n / 10, n), (n / 1000, n), 0.5)]
    good = [period((n / 1000, n), (n / 1000, n), 0.5)]
    for log_e, sign in [
        (log_e_two_arms(bad, R0, DELTA), 1),
        (log_e_two_arms(good, R0, DELTA), -1),
        (log_e_two_arms_pass(good, R0, DELTA), 1),
        (log_e_two_arms_pass(bad, R0, DELTA), -1),
        (log_e_late_onset([good, bad], 4, R0, DELTA), 1),
        (log_e_one_sided(n / 10, n / 1000, 0.5, R0), 1),
        (log_bf_two_sided(n / 10, n / 1000, 0.5, 100), 1),
        (log_e_bounded(n / 10, n, 0.02, 0.5, 5), 1),
        (log_e_bounded(0, n, 0.02, 0.5, 5), -1),
        (log_e_bounded_pass(0, n, 0.02, 0.5, 5), 1),
        (log_e_bounded_pass(n / 10, n, 0.02, 0.5, 5), -1),
    ]:
        assert isfinite(log_e)
        assert log_e * sign > 5
    low, high = confidence_sequence(n / 10, n, 0.05, 0.5, 0.5)
    assert 0.0997 < low < 0.1 < high < 0.1003


@pytest.mark.parametrize("counts", [(1, 2), (5, -1), (-1, -1), (inf, 1), (nan, 0), (1, nan)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="0 ≤ events ≤ units is allowed"):
        ArmCounts(*counts)
    with pytest.raises(ValueError, match="0 ≤ events ≤ units is allowed"):
        log_e_bounded(counts[1], counts[0], 0.02, 1, 1)


@pytest.mark.parametrize(
    ("r0", "delta"), [(0, 0), (-1, 0.1), (1, -0.1), (1, 1), (inf, 0.1), (nan, 0.1), (1, nan)]
)
def test_impossible_margins_are_refused(r0, delta):
    for test in (log_e_two_arms, log_e_two_arms_pass):
        with pytest.raises(ValueError, match="r0 ≥ 0 and 0 ≤ delta < 1 are allowed, not both 0"):
            test([], r0, delta)


def test_it_is_fast_enough_for_every_trigger_of_every_tick():
    periods = [period((3, 300), (5, 5700), 0.01 + i / 100) for i in range(10)]
    best = min(timeit.repeat(lambda: log_e_two_arms(periods, R0, DELTA), number=50, repeat=20))
    assert best / 50 < 100e-6


# --- late onset -----------------------------------------------------------------------------------


def test_a_canary_that_turns_bad_late_is_found_by_a_fresh_copy():
    well = [period((20, 20000), (380, 380000), 0.05)]
    bad = [period((15, 500), (2, 1500), 0.25)]  # 3 % where the other arm has 0.13 %
    assert log_e_two_arms(well + bad, R0, DELTA) < log_threshold(0.3, 0.01)
    assert log_e_late_onset([well, bad], 4, R0, DELTA) > log_threshold(0.3, 0.01)


@given(
    steps=st.lists(some_periods(), max_size=4), spare=st.integers(1, 3), r0=ratios, delta=margins
)
def test_late_onset_is_the_average_of_a_copy_from_each_step_on(steps, spare, r0, delta):
    copies = [
        log_e_two_arms([p for step in steps[start:] for p in step], r0, delta)
        for start in range(len(steps))
    ]
    expected = log_average(copies + [0.0] * spare)
    log_e = log_e_late_onset(steps, len(steps) + spare, r0, delta)
    assert log_e == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_late_onset_of_a_single_step_is_the_plain_test():
    periods = five_percent((4, 80), (1, 1520))
    assert log_e_late_onset([periods], 1, R0, DELTA) == log_e_two_arms(periods, R0, DELTA)


@pytest.mark.parametrize(("begun", "planned"), [(3, 2), (0, 0), (0, -1)])
def test_more_steps_than_planned_are_refused(begun, planned):
    with pytest.raises(ValueError, match="planned"):
        log_e_late_onset([[]] * begun, planned, R0, DELTA)


# --- closed forms, one arm ------------------------------------------------------------------------


@given(
    canary=st.integers(0, 60),
    baseline=st.integers(0, 60),
    rho=st.floats(0.02, 0.98),
    r0=st.floats(0.2, 5),
)
def test_many_bets_without_margin_come_to_the_closed_form(canary, baseline, rho, r0):
    """Bets spread evenly over all stakes are a uniform prior on the canary's share of events."""
    events = five_percent((canary, canary), (baseline, baseline))[0]
    periods = [Period(rho, events.canary, events.baseline)]
    even = (np.arange(20_000) + 0.5) / 20_000
    share = rho * r0 / (rho * r0 + 1 - rho)

    with patch.object(evidence, "_GRID", even):
        against = log_e_two_arms(periods, r0, 0)
        in_favour = log_e_two_arms_pass(periods, r0, 0)

    assert against == pytest.approx(log_e_one_sided(canary, baseline, rho, r0), abs=1e-4)
    assert in_favour == pytest.approx(
        log_e_bounded_pass(canary, canary + baseline, share, 1, 1), abs=1e-4
    )


@given(q0=st.floats(0.001, 0.999), a=st.floats(0.1, 50), b=st.floats(0.1, 50), n=st.integers(0, 30))
def test_one_arm_has_a_mean_of_one_at_its_bound(q0, a, b, n):
    for test in (log_e_bounded, log_e_bounded_pass):
        mean = sum(
            comb(n, k) * q0**k * (1 - q0) ** (n - k) * exp(test(k, n, q0, a, b))
            for k in range(n + 1)
        )
        assert mean == pytest.approx(1, rel=1e-7)


@given(n=st.integers(1, 100_000), q0=st.floats(0.001, 0.5), share=st.floats(0, 1))
def test_more_events_speak_against_a_bound(n, q0, share):
    k = int(share * (n - 1))
    assert log_e_bounded(k + 1, n, q0, 0.5, 5) > log_e_bounded(k, n, q0, 0.5, 5)
    assert log_e_bounded_pass(k + 1, n, q0, 0.5, 5) < log_e_bounded_pass(k, n, q0, 0.5, 5)


@pytest.mark.parametrize("test", [log_e_bounded, log_e_bounded_pass])
def test_one_arm_looked_at_all_the_time_keeps_its_promise(test):
    random = np.random.default_rng(6)
    events = random.binomial(20, 0.05, (1000, 20)).cumsum(axis=1)
    threshold = log_threshold(1, 0.05)
    fired = [
        any(test(k, 20 * (i + 1), 0.05, 1, 1) >= threshold for i, k in enumerate(run.tolist()))
        for run in events
    ]
    assert 0 < np.mean(fired) <= 0.05


def test_disagreement_is_found_and_agreement_believed():
    threshold = log_threshold(0.2, 0.01)
    assert log_e_bounded(60, 1000, 0.02, 0.5, 5) > threshold
    assert log_e_bounded(20, 1000, 0.02, 0.5, 5) < 0
    assert log_e_bounded_pass(5, 2000, 0.02, 0.5, 5) > -log(0.05)
    assert log_e_bounded_pass(0, 20, 0.02, 0.5, 5) < -log(0.05)


def test_one_arm_without_data_is_no_evidence():
    assert log_e_bounded(0, 0, 0.02, 0.5, 5) == 0
    assert log_e_bounded_pass(0, 0, 0.02, 0.5, 5) == 0
    assert log_bf_two_sided(0, 0, 0.05, 100) == 0
    assert confidence_sequence(0, 0, 0.05, 0.5, 0.5) == (0, 1)


@pytest.mark.parametrize(
    ("q0", "a", "b"), [(0, 1, 1), (1, 1, 1), (nan, 1, 1), (0.5, 0, 1), (0.5, 1, -1), (0.5, inf, 1)]
)
def test_impossible_bounds_are_refused(q0, a, b):
    for test in (log_e_bounded, log_e_bounded_pass):
        with pytest.raises(ValueError, match="a > 0 and b > 0 are allowed"):
            test(1, 10, q0, a, b)


@given(n=st.integers(1, 1_000_000), share=st.floats(0, 1), alpha=st.floats(0.001, 0.5))
def test_a_confidence_sequence_ends_where_the_mixture_reaches_its_threshold(n, share, alpha):
    k = round(share * n)
    low, high = confidence_sequence(k, n, alpha, 0.5, 0.5)
    assert 0 <= low <= k / n <= high <= 1
    for p, outside in ((low, low * (1 - 1e-6)), (high, high + (1 - high) * 1e-6)):
        if 0 < p < 1:
            assert mixture(k, n, p) < -log(alpha) + 1e-6
            assert mixture(k, n, outside) > -log(alpha) - 1e-6


def mixture(k: int, n: int, p: float) -> float:
    """Beta(.5, .5) against `p`, with scipy."""
    return betaln(0.5 + k, 0.5 + n - k) - betaln(0.5, 0.5) - k * log(p) - (n - k) * log1p(-p)


def test_a_confidence_sequence_holds_at_all_times():
    events = np.random.default_rng(7).binomial(5, 0.3, (100, 15)).cumsum(axis=1)
    missed = 0
    for run in events.tolist():
        bounds = [confidence_sequence(k, 5 * (i + 1), 0.5, 0.5, 0.5) for i, k in enumerate(run)]
        missed += any(not low <= 0.3 <= high for low, high in bounds)
    assert 0 < missed <= 0.5 * 100


@pytest.mark.parametrize("alpha", [0, 1, -1, nan])
def test_a_confidence_sequence_refuses_an_impossible_level(alpha):
    with pytest.raises(ValueError, match=r"alpha in \(0, 1\) is allowed"):
        confidence_sequence(1, 10, alpha, 0.5, 0.5)


# --- means ----------------------------------------------------------------------------------------


def test_means_looked_at_all_the_time_keep_their_promise():
    random = np.random.default_rng(8)
    runs = (log(1.05) + random.normal(0, 0.1, (1000, 40))).tolist()
    threshold = -log(0.05)
    fired = [
        any(log_e_means(run[:n], log(1.05)) >= threshold for n in range(2, 41)) for run in runs
    ]
    assert 0 < np.mean(fired) <= 0.05


def test_a_canary_that_costs_less_or_within_the_tolerance_is_never_accused():
    assert log_e_means([-ratio for ratio in COST_RATIOS], log(1.05)) == 0
    assert log_e_means(COST_RATIOS, log(1.2)) == 0
    assert log_e_means([0.05] * 30, 0.05) == 0


def test_the_scale_of_ratios_does_not_matter():
    for scale in (1e-9, 1e9):
        scaled = log_e_means([scale * ratio for ratio in COST_RATIOS], scale * log(1.05))
        assert scaled == pytest.approx(6.592735, abs=1e-5)


def test_too_few_means_are_no_evidence():
    assert log_e_means([], log(1.05)) == 0
    assert log_e_means([5.0], log(1.05)) == 0


def test_means_without_spread_have_a_bounded_e_value():
    assert log_e_means([0.25] * 10, 0) == pytest.approx(4.5 * log(11))


@pytest.mark.parametrize(("values", "tolerance"), [([nan, 1], 0), ([inf, 1], 0), ([1, 2], nan)])
def test_means_must_be_numbers(values, tolerance):
    with pytest.raises(ValueError, match="must be finite"):
        log_e_means(values, tolerance)


# --- several triggers -----------------------------------------------------------------------------


def test_thresholds_share_one_alpha():
    assert log_threshold(1, 0.01) == pytest.approx(4.605170)
    assert log_threshold(0.3, 0.01) == pytest.approx(5.809143)
    assert log_threshold(0, 0.01) == inf
    weights = (0.3, 0.25, 0.2, 0.15, 0.05, 0.05)
    assert sum(exp(-log_threshold(weight, 0.01)) for weight in weights) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("weight", "alpha"), [(-0.1, 0.01), (1.1, 0.01), (1, 0), (1, 1), (nan, 0.1)]
)
def test_impossible_shares_of_alpha_are_refused(weight, alpha):
    with pytest.raises(ValueError, match="a weight in"):
        log_threshold(weight, alpha)


def test_averages_are_of_e_values_not_of_logarithms():
    assert log_average([log(3), log(1)]) == pytest.approx(log(2))
    assert log_average([2.5]) == 2.5
    assert log_average([1e9, -1e9]) == pytest.approx(1e9 - log(2))
    with pytest.raises(ValueError, match="at least one"):
        log_average([])
