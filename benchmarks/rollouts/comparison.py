"""The product's triggers and the peers' rules on the same traffic.

200 requests a second, 5 % of them to the canary, for an hour: long enough for Kayenta's documented
minimum. Each rule is taken as it comes, and with its thresholds moved, for this very traffic, to
where they take back 1 % of healthy canaries: a choice that nobody can make beforehand. Tuned rules
of thresholds may also choose for each regression how many failed checks catch it soonest.
Healthy canaries are others than those that the rules were tuned by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.special import ndtri

from benchmarks.rollouts import simulate, traffic
from benchmarks.rollouts.cells import Array, Cell, Fault, Plan
from benchmarks.rollouts.detection import quantiles
from benchmarks.rollouts.false_rollbacks import ALLOWED
from benchmarks.rollouts.peers import ARGO, FLAGGER, Kayenta, ThresholdRule
from benchmarks.rollouts.simulate import Fired
from benchmarks.rollouts.traffic import MEDIAN_S, SPREAD, STABLE
from serving.core.rollout_spec import RolloutSpec, Step

OURS: Final = "this gateway"
RATE: Final = 200.0
WEIGHT: Final = 5.0
HOUR_S: Final = 3600
BASE_ERRORS: Final = (0.001, 0.005, 0.02)
REGRESSIONS: Final = tuple(
    [("errors", x, Fault(errors=x)) for x in (2.0, 5.0, 10.0, 50.0)]
    + [("latency", x, Fault(latency=x)) for x in (1.1, 1.25, 1.5, 2.0)]
)
_FAILURES: Final = (1, 2, 3, 5)
_TUNED_BY: Final = 10_000  # healthy rollouts: a bound near their extremes needs many


@dataclass(frozen=True)
class Minutes:
    """What monitoring saw each minute: (rollouts, minutes). The baseline is the canary's size."""

    canary_errors: Array
    baseline_errors: Array
    canary_p99_s: Array
    baseline_p99_s: Array

    @property
    def metrics(self) -> list[tuple[Array, Array]]:
        """Kayenta's two metrics as (canary, baseline)."""
        return [
            (self.canary_errors, self.baseline_errors),
            (self.canary_p99_s, self.baseline_p99_s),
        ]


Rule = Callable[[Minutes], Array]


def measure(rollouts: int, seed: int) -> list[dict[str, Any]]:
    """One row a rule, share of errors and regression, the healthy canary (factor 1) among them."""
    plan = Plan.of(RolloutSpec(steps=(Step(weight=WEIGHT, hold_s=HOUR_S),)), (HOUR_S,), RATE)
    rows: list[dict[str, Any]] = []
    for base_error in BASE_ERRORS:
        healthy = _watched(Cell(RATE, base_error), plan, _TUNED_BY, seed)
        rules = _rules(healthy)
        for kind, factor, fault in (("healthy", 1.0, Fault()), *REGRESSIONS):
            cell = Cell(RATE, base_error, fault=fault)
            # Other rollouts than those that the rules were tuned by.
            minutes, fired = _simulate(cell, plan, rollouts, seed + 1)
            _, alone = _simulate(replace(cell, replicas=1), plan, rollouts, seed + 2)
            decided: dict[str, Sequence[Array]] = {
                OURS: [fired.at],
                f"{OURS}, one canary replica": [alone.at],
            }
            decided |= {name: [rule(minutes) for rule in some] for name, some in rules.items()}
            rows += _rows(decided, base_error, kind, factor)
            print(f"peers: errors {base_error:g}, {kind} × {factor:g}", file=sys.stderr, flush=True)
    return rows


def _watched(cell: Cell, plan: Plan, rollouts: int, seed: int) -> Minutes:
    """Rollouts that nobody judges."""
    rng = simulate.generator(cell, seed)
    return _together(
        by_minute(cell, plan, traffic.draw(cell, plan, size, rng).blocks[:, :, 0, :, :2], rng)
        for size in simulate.chunks(rollouts)
    )


def _together(parts: Iterable[Minutes]) -> Minutes:
    found = list(parts)
    names = Minutes.__annotations__
    return Minutes(*(np.concatenate([getattr(part, name) for part in found]) for name in names))


def _simulate(cell: Cell, plan: Plan, rollouts: int, seed: int) -> tuple[Minutes, Fired]:
    rng = simulate.generator(cell, seed)
    found, fired = [], []
    for size in simulate.chunks(rollouts):
        counts = traffic.draw(cell, plan, size, rng)
        fired.append(simulate.judged(cell, plan, counts, rng))
        found.append(by_minute(cell, plan, counts.blocks[:, :, 0, :, :2], rng))
    return _together(found), simulate.together(fired)


def by_minute(cell: Cell, plan: Plan, errors: Array, rng: np.random.Generator) -> Minutes:
    """Minutes out of blocks (rollouts, blocks, 3, 2) of requests and failures."""
    first = np.nonzero(plan.begin % 60 == 0)[0]
    minutes = np.add.reduceat(errors, first, axis=1)
    canary, stable = minutes[:, :, :STABLE].sum(axis=2), minutes[:, :, STABLE]
    part = WEIGHT / (100 - WEIGHT)
    failed = rng.binomial(stable[..., 1].astype(int), part)
    served = rng.binomial((stable[..., 0] - stable[..., 1]).astype(int), part)
    with np.errstate(invalid="ignore"):
        return Minutes(
            canary[..., 1] / canary[..., 0],
            failed / (failed + served),
            _p99(canary[..., 0], cell.fault.latency, rng),
            _p99((failed + served).astype(np.float64), 1.0, rng),
        )


def _p99(n: Array, slower: float, rng: np.random.Generator) -> Array:
    """The 99th percentile of n latencies: what lies below it has a beta distribution."""
    below = rng.beta(0.99 * n + 0.5, 0.01 * n + 0.5)
    return MEDIAN_S * slower * np.exp(SPREAD * ndtri(below))


def _rules(healthy: Minutes) -> dict[str, Sequence[Rule]]:
    """Each rule as it comes and tuned; the best of several counts."""
    tuned = [tune(healthy, failures) for failures in _FAILURES]
    judge = tune_kayenta(healthy)
    return {
        "Flagger": [_threshold(FLAGGER)],
        "Flagger, tuned": [_threshold(replace(rule, lag=FLAGGER.lag)) for rule in tuned],
        "Argo Rollouts": [_threshold(ARGO)],
        "Argo Rollouts, tuned": [_threshold(rule) for rule in tuned],
        "Kayenta": [lambda minutes: Kayenta().decide(minutes.metrics)],
        "Kayenta, tuned": [lambda minutes: judge.decide(minutes.metrics)],
    }


def _threshold(rule: ThresholdRule) -> Rule:
    return lambda minutes: rule.decide(1 - minutes.canary_errors, minutes.canary_p99_s)


def tune(healthy: Minutes, failures: int) -> ThresholdRule:
    """The tightest bounds, checked each minute, that take back 1 % of these healthy canaries.

    Each bound alone takes back as many as the other, at most half of the 1 %.
    """
    success = np.sort(1 - healthy.canary_errors, axis=1)[:, failures - 1]
    p99_s = np.sort(healthy.canary_p99_s, axis=1)[:, -failures]
    for part in np.linspace(ALLOWED / 2, 0, 11):
        rule = ThresholdRule(
            failures,
            float(np.quantile(success, part, method="lower")),
            float(np.quantile(p99_s, 1 - part, method="higher")),
        )
        if np.isfinite(_threshold(rule)(healthy)).mean() <= ALLOWED:
            break
    return rule


def tune_kayenta(healthy: Minutes) -> Kayenta:
    """Its confidence level, looking for worse canaries only, likewise."""
    judge = Kayenta(either=False)
    highest = np.max([judge.scores(*metric)[0] for metric in healthy.metrics], axis=0)
    return replace(judge, z=float(np.quantile(highest, 1 - ALLOWED, method="higher")))


def _rows(
    decided: Mapping[str, Sequence[Array]], base_error: float, kind: str, factor: float
) -> list[dict[str, Any]]:
    """One row a rule; of several variants the soonest one, of healthy canaries their mean."""
    share = min(base_error * (factor if kind == "errors" else 1.0), 1.0)
    rows = []
    for name, several in decided.items():
        caught = [float(np.isfinite(at).mean()) for at in several]
        best = min(
            several, key=lambda at: (np.quantile(at, 0.5, method="higher"), -np.isfinite(at).sum())
        )
        served = best * RATE * WEIGHT / 100
        rows.append(
            {
                "rule": name,
                "base_error": base_error,
                "kind": kind,
                "factor": factor,
                "rollouts": len(best),
                "caught": round(
                    float(np.mean(caught) if kind == "healthy" else np.isfinite(best).mean()), 4
                ),
                "delay_s": quantiles(best),
                "served": quantiles(served),
                "failed": quantiles(served * share),
            }
        )
    return rows
