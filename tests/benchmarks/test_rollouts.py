"""Simulated rollouts decide as the product decides, and the peers' rules as their authors wrote."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from benchmarks.rollouts import __main__ as command
from benchmarks.rollouts import bakes, comparison, draws, false_rollbacks, report, simulate, traffic
from benchmarks.rollouts.cells import SCENARIOS, Cell, Fault, Plan, Scenario, default_ramp
from benchmarks.rollouts.judge import Judge, fails, judges
from benchmarks.rollouts.peers import ARGO, FLAGGER, Kayenta, ThresholdRule, mann_whitney_z
from serving.core.one_arm import spent
from serving.core.rollout import new_rollout
from serving.core.rollout_counts import ArmCountsRow, EpochCounts, Histogram
from serving.core.rollout_spec import default_plan
from serving.core.rollout_types import Epoch, Outcome, Rollout, Snapshot
from serving.core.triggers import KINDS, tolerance

CANARY = default_plan("canary")
WEIGHTS = np.array([0.0, 0.01, 0.05, 0.25, 0.5])
TAIL, BODY = 100, 60
CLASSES = [f"class {i}" for i in range(10)]


def random_table(judge: Judge, rng: np.random.Generator, items: int) -> np.ndarray:
    """Counts (items, bets, 3, epochs, 4), of canaries from healthy to bad."""
    shape = (items, len(judge.bets), 3, len(WEIGHTS))
    shares = np.stack([WEIGHTS / 2, WEIGHTS / 2, 1 - WEIGHTS])
    scale = 10 ** rng.uniform(1, 4.5, (items, 1, 1, 1))
    batches = rng.poisson(scale * shares, shape)
    n = batches + rng.poisson(batches * rng.uniform(0, 10, (items, 1, 1, 1)))
    worse = np.where(np.arange(3)[:, None] < 2, rng.uniform(1, 9, shape[:2])[..., None, None], 1)
    share = np.minimum(10 ** rng.uniform(-3, -0.7, (items, len(judge.bets), 1, 1)) * worse, 0.9)
    failed = rng.binomial(batches, share)
    k = failed + rng.binomial(n - batches, failed / np.maximum(batches, 1) * rng.uniform())
    table = np.stack([n, k, batches, failed], axis=-1).astype(float)
    running = rng.integers(1, len(WEIGHTS), (items, 1, 1, 1, 1))
    table *= np.arange(len(WEIGHTS))[:, None] <= running
    if judge.name == "labels":
        table[..., 2:] = table[..., :2]
    if judge.name != "errors":
        table[..., 0, :] = 0  # nothing is frozen before the first step, and no label is known
    return table


def latencies(slow: np.ndarray) -> dict[str, Histogram]:
    """Histograms that have these tail and body tallies (2, 4)."""

    def histogram(tail: float, body: float, n: float) -> Histogram:
        counted = {TAIL + 1: tail, BODY + 1: body - tail, 1: n - body}
        return Histogram({bucket: int(count) for bucket, count in counted.items() if count})

    (n, tail, batches, tail_batches), (_, body, _, body_batches) = slow
    return {
        "latency": histogram(tail, body, n),
        "batch_latency": histogram(tail_batches, body_batches, batches),
    }


def row(name: str, tallies: np.ndarray) -> ArmCountsRow:
    """What a replica must have counted so that its trigger sees these tallies (bets, 4)."""
    n, k, batches, failed = (int(x) for x in tallies[0])
    if name == "errors":
        return ArmCountsRow(requests=n, failed=k, batches=batches, failed_batches=failed)
    if name == "labels":
        return ArmCountsRow(labels=(n, k))
    if name == "latency":
        return ArmCountsRow(**latencies(tallies))
    predictions = dict(zip([*CLASSES, "rare"], tallies[:, 1].astype(int).tolist(), strict=True))
    return ArmCountsRow(requests=n, predictions=predictions)


def as_product(name: str, table: np.ndarray) -> tuple[Rollout, Snapshot]:
    """The rollout and snapshot with the counts (bets, 3, epochs, 4)."""
    epochs = tuple(
        Epoch(i, i - 1, w, (TAIL, BODY, 120) if i else None, tuple(CLASSES) if i else None)
        for i, w in enumerate(WEIGHTS)
    )
    counts = {
        e.epoch: EpochCounts(
            stable={"s": row(name, table[:, 2, e.epoch])},
            canary={r: row(name, table[:, i, e.epoch]) for i, r in enumerate("ab")},
        )
        for e in epochs
    }
    rollout = new_rollout(
        "r",
        model="m",
        stable=("1", ""),
        canary=("2", ""),
        spec=CANARY,
        salt="",
        actor="",
        reason="",
        now=0.0,
    )
    snapshot = Snapshot(0.0, 2, 2, 2, 1, 1, counts=counts)
    return replace(rollout, epochs=epochs), snapshot


def nested(judge: Judge, table: np.ndarray) -> np.ndarray:
    """Tables as a gateway could have counted them: who is past the tail is past the body."""
    if judge.name == "latency":
        table[:, 1, ..., ::2] = table[:, 0, ..., ::2]
        table[:, 1, ..., 1::2] = table[..., 1::2].max(axis=1).clip(max=table[:, 0, ..., ::2])
    if judge.name == "drift":
        table[:, :, 1] = 0  # one replica is enough: drift does not ask for it
        table[..., 0] = table[..., 1].sum(axis=1, keepdims=True)
        table[..., 2:] = table[..., :2]
    return table


@pytest.mark.parametrize("judge", judges(CANARY.analysis), ids=lambda judge: judge.name)
def test_many_rollouts_are_judged_as_the_product_judges_each(judge: Judge):
    table = nested(judge, random_table(judge, np.random.default_rng(7), 300))
    trigger = CANARY.analysis.trigger(judge.name)
    assert trigger is not None
    log_e, failing = fails(judge, table, WEIGHTS)
    verdicts = [KINDS[trigger.kind](trigger, *as_product(judge.name, item)) for item in table]
    assert log_e == pytest.approx([v.log_e for v in verdicts], rel=1e-9, abs=1e-9)
    assert failing.tolist() == [v.verdict is Outcome.FAIL for v in verdicts]
    assert 10 < failing.sum() < 290  # both outcomes were compared


def test_what_is_not_looked_at_closely_could_not_have_failed():
    cell = Cell(200.0, 0.005, "batches", Fault(errors=6.0, latency=1.5))
    plan = Plan.of(CANARY, (60, 60, 60, 60), cell.rate)
    counts = traffic.draw(cell, plan, 40, np.random.default_rng(3))
    found = 0
    for judge in judges(CANARY.analysis):
        rng = np.random.default_rng(5)
        quick = simulate._first_failure(judge, counts, plan, rng)
        found += int(np.isfinite(quick).sum())
        closed = {v: np.full((40, len(judge.bets), 4), 99.0) for v in simulate._views(judge)}
        history = simulate._History.of(judge, counts, plan)
        skipped = ~simulate._possible_blocks(
            judge,
            history,
            {v: simulate._closed_ceiling(judge, history, plan, v) for v in simulate._views(judge)},
            plan,
        )
        for block in range(plan.blocks):
            row = np.nonzero(skipped[:, block])[0]
            if row.size:
                at = simulate._look_closely(
                    judge, counts, history, closed, plan, row, np.intp(block), rng
                )
                assert np.isinf(at).all()
    assert found > 5


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_healthy_canaries_are_kept(scenario: Scenario):
    fired = simulate.run(Cell(200.0, 0.005, scenario), default_ramp(200.0), 200, seed=11)
    assert np.isfinite(fired.at).sum() <= 4  # of 200, where 2 are allowed on average


def test_a_failing_canary_is_taken_back_in_seconds_and_for_its_errors():
    cell = Cell(200.0, 0.001, fault=Fault(errors=500), replicas=1)
    fired = simulate.run(cell, default_ramp(200.0), 100, seed=1)
    assert np.isfinite(fired.at).all()
    assert np.median(fired.at) < 60
    assert {fired.triggers[i] for i in fired.trigger} <= {"errors", "slo_burn"}
    assert (fired.failed > 0).all()
    assert (fired.failed <= fired.served).all()


def test_a_fault_that_starts_late_is_not_caught_before():
    cell = Cell(200.0, 0.001, fault=Fault(errors=200, from_step=2))
    plan = default_ramp(200.0)
    fired = simulate.run(cell, plan, 100, seed=1)
    assert (fired.at > plan.starts_s(2)).all()
    assert np.isfinite(fired.at).all()


def test_disagreeing_shadows_are_caught_before_the_first_step():
    cell = Cell(200.0, 0.001, fault=Fault(disagreement=10))
    fired = simulate.run(cell, default_ramp(200.0), 100, seed=1)
    assert (fired.at <= 0).all()
    assert (fired.served == 0).all()


@pytest.mark.parametrize("together", [False, True])
def test_events_have_the_share_that_was_asked_for(together: bool):
    rng = np.random.default_rng(2)
    batches = rng.poisson(50, 20_000)
    n = batches + rng.poisson(batches * 7.0)
    drawn = traffic._events(rng, n, batches, 8.0, 0.02, together=together)
    requests, events, _, failed = drawn.sum(axis=0)
    assert events / requests == pytest.approx(0.02, rel=0.02)
    assert events / failed == pytest.approx(8.0 if together else 0.16 / (1 - 0.98**8), rel=0.03)
    assert (drawn[:, 1] <= drawn[:, 0]).all()


@pytest.mark.parametrize("scenario", draws.PARTS)
def test_what_is_drawn_together_has_the_share_that_was_asked_for(scenario: Scenario):
    rng = np.random.default_rng(3)
    shares = np.array([0.05, 0.05, 0.9])[:, np.newaxis, np.newaxis] * np.ones((3, 200, 50))
    drawn = draws.divided(rng, np.full(50, 40_000.0), shares)
    assert drawn.sum(axis=(1, 2)) / drawn.sum() == pytest.approx([0.05, 0.05, 0.9], rel=0.01)
    counts = draws.counts(rng, scenario, 2000.0, drawn, np.full(shares.shape, 0.02))
    requests, events, batches, failed = np.moveaxis(counts.sum(axis=(0, 1)), -1, 0)
    assert events / requests == pytest.approx([0.02] * 3, rel=0.05)
    # A run of stable's has two draws.
    assert requests / batches == pytest.approx([draws.MOST, draws.MOST, 2 * draws.MOST], rel=0.01)
    # Blips are whole: as many events a failed run as it has requests, but for stable's last one.
    whole = events / failed > 0.9 * requests / batches
    assert whole.tolist() == [scenario == "blips"] * 3
    assert (counts[..., 1] <= counts[..., 0]).all()
    assert (counts[..., 3] <= np.minimum(counts[..., 2], counts[..., 1])).all()


def test_seconds_add_up_to_their_block():
    rng = np.random.default_rng(4)
    totals = np.array([[900, 40, 300, 30], [0, 0, 0, 0], [7, 7, 2, 2]], float)
    seconds = traffic.split(totals, 20, rng)
    assert (seconds[:, -1] == totals).all()
    assert (np.diff(seconds, axis=1) >= 0).all()
    assert (seconds[..., 1] <= seconds[..., 0]).all()
    assert (seconds[..., 3] <= seconds[..., 2]).all()


def bake(share: float, late: float, rng: np.random.Generator) -> np.ndarray:
    """A bake's counts (seconds, 4) at 100 requests a second, worse in its second half."""
    n = rng.poisson(100, 3600).astype(float)
    k = rng.binomial(n.astype(int), np.where(np.arange(3600) < 1900, share, late)).astype(float)
    return np.stack([n, k, n, k], axis=-1)


def test_a_bake_is_judged_as_the_product_judges_it():
    trigger = CANARY.analysis.trigger("errors")
    assert trigger is not None
    stable = np.array([(50_000, 60, 50_000, 60), (20_000, 15, 20_000, 15)], float)
    allowed = tolerance(trigger, 0.01)
    seconds = bake(0.002, 0.05, np.random.default_rng(2))
    ceiling = bakes._ceiling(seconds, allowed.of(stable))
    for until in (100, 1900, 1930, 3000, 3600):
        parts = bakes._parts(seconds, until)
        log_e = bakes._watch(stable, parts, allowed).log_e
        assert min(log_e, bakes._LARGEST) <= ceiling[until - 1] + bakes._MARGIN
    # And the product, with both arms' epochs and its own numbers for them.
    verdicts = []
    for until in (1900, 2000):
        parts = bakes._parts(seconds, until)
        epochs = [Epoch(i, i, 0.0) for i in range(2)]
        epochs += [Epoch(2 + i, 4, 1.0, part=i) for i in range(len(parts))]
        counts = {i: EpochCounts(stable={"s": row("errors", stable[[i]])}) for i in range(2)}
        counts |= {
            2 + i: EpochCounts(canary={"a": row("errors", part[np.newaxis])})
            for i, part in enumerate(parts)
        }
        rollout, _ = as_product("errors", np.zeros((1, 3, 5, 4)))
        snapshot = Snapshot(0.0, 2, 2, 2, 1, 1, counts=counts)
        verdict = KINDS["errors"](trigger, replace(rollout, epochs=tuple(epochs)), snapshot)
        watch = bakes._watch(stable, parts, allowed)
        assert verdict.log_e == pytest.approx(spent(0.0, watch.log_e))
        verdicts.append(verdict.verdict)
    assert verdicts == [Outcome.HOLD, Outcome.FAIL]


@pytest.mark.parametrize("scenario", ["independent", "sticky", "day"])
def test_healthy_canaries_are_kept_through_the_bake(scenario: Scenario):
    ended = bakes._run(Cell(200.0, 0.005, scenario, replicas=1), 50, seed=11)
    assert not np.isfinite(ended.at).any()


def test_faults_that_begin_in_the_bake_end_it_soon():
    for fault, name in ((Fault(errors=100), "errors"), (Fault(latency=5), "latency")):
        ended = bakes._run(Cell(200.0, 0.001, fault=fault, replicas=1), 20, seed=11)
        at = ended.at[ended.triggers.index(name)]
        assert (at > 0).all()
        assert np.median(at) < 60


def minutes(values: list[float]) -> np.ndarray:
    return np.array([values])


def test_flagger_rolls_back_at_the_check_after_the_fifth_failed_one():
    fine = minutes([0.01] * 12)
    bad = minutes([0.98, 1, 0.98, 0.98, 1, 0.98, 0.98, 1, 1, 1, 1, 1])
    assert FLAGGER.decide(bad, fine) == [8 * 60]  # successes do not take failed checks off
    assert FLAGGER.decide(minutes([0.98] * 12), fine) == [6 * 60]
    assert FLAGGER.decide(minutes([0.98] * 4 + [1] * 8), fine) == [np.inf]
    assert FLAGGER.decide(minutes([1] * 12), minutes([0.6] * 12)) == [6 * 60]
    assert FLAGGER.decide(minutes([np.nan] * 12), fine) == [6 * 60]


def test_argo_measures_every_five_minutes_and_fails_at_the_fourth_failure():
    fine = minutes([9.0] * 60)
    assert ARGO.decide(minutes([0.9] * 60), fine) == [20 * 60]
    assert ARGO.decide(minutes([0.9 if i % 5 < 4 else 1 for i in range(60)]), fine) == [np.inf]
    assert ARGO.decide(minutes([0.95] * 60), fine) == [np.inf]
    assert ThresholdRule(1, 0.95).decide(minutes([1, 0.9, 1]), fine[:, :3]) == [120]


def test_kayenta_fails_a_metric_that_differs_by_more_than_its_tolerance():
    rng = np.random.default_rng(1)
    baseline = rng.normal(100, 5, (3, 60))
    canary = np.stack([baseline[0] + 0.1, rng.normal(200, 5, 60), rng.normal(50, 5, 60)])
    assert Kayenta().decide([(canary, baseline)]).tolist() == [np.inf, 3000, 3000]
    assert Kayenta(either=False).decide([(canary, baseline)]).tolist() == [np.inf, 3000, np.inf]
    same = np.zeros((1, 60))
    assert Kayenta().decide([(same, same)]) == [np.inf]


def test_the_u_statistic_is_the_textbook_s():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 9, 50).astype(float), rng.integers(1, 10, 40).astype(float)
    p = mannwhitneyu(x, y, alternative="two-sided", method="asymptotic").pvalue
    assert 2 * norm.sf(abs(mann_whitney_z(x, y))) == pytest.approx(p)


def test_tuned_rules_take_back_one_percent_of_the_canaries_they_were_tuned_by():
    rng = np.random.default_rng(1)
    n = 600
    healthy = comparison.Minutes(
        *(rng.binomial(n, 0.005, (2, 1000, 60)) / n),
        *np.exp(rng.normal(0, 0.1, (2, 1000, 60))),
    )
    for failures in (1, 3):
        at = comparison._threshold(comparison.tune(healthy, failures))(healthy)
        assert 0.001 <= np.isfinite(at).mean() <= 0.01
    at = comparison.tune_kayenta(healthy).decide(healthy.metrics)
    assert 0.001 <= np.isfinite(at).mean() <= 0.01


def test_the_upper_bound_is_clopper_and_pearson_s():
    assert false_rollbacks.upper_bound(0, 10_000) == pytest.approx(1 - 0.025 ** (1 / 10_000))
    assert (
        false_rollbacks.upper_bound(81, 10_000) < 0.0101 < false_rollbacks.upper_bound(82, 10_000)
    )
    assert false_rollbacks.upper_bound(5, 5) == 1.0


def test_the_command_writes_what_it_found_and_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    arguments = ["--rollouts", "500", "--cells", "independent/1/0*", "--only", "false-rollbacks"]
    assert command.main(arguments) == 0
    document = json.loads((tmp_path / "false-rollbacks.json").read_text(encoding="utf-8"))
    assert [row["cell"] for row in document["rows"]] == [
        f"independent/1/{error}" for error in ("0", "0.001", "0.005", "0.02")
    ]
    assert document["machine"]["command"].startswith("python -m benchmarks.rollouts")
    assert (
        {document["machine"]["rollouts"]} == {row["rollouts"] for row in document["rows"]} == {500}
    )
    assert (tmp_path / "false-rollbacks.png").stat().st_size > 1000
    assert "0 cells" in capsys.readouterr().out


def test_as_many_rollouts_are_simulated_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    asked = []

    def measure(*what: Any) -> list[dict]:
        *_, rollouts, _ = what
        asked.append(rollouts)
        return []

    for part, module in (("bakes", bakes), ("detection", command.detection), ("peers", comparison)):
        monkeypatch.setattr(module, "measure", measure)
        monkeypatch.setattr(command.plots, part, lambda rows, directory: None, raising=False)
        assert command.main(["--only", part, "--rollouts", "50"]) == 0
        assert command.main(["--only", part]) == 0
        assert "1,000 rollouts a row" in (tmp_path / f"{part}.md").read_text(encoding="utf-8")
    assert asked == [50, 1000] * 3


def test_a_cell_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["--cells", "stormy/1/0"])
    assert "stormy/1/0: no such cell" in capsys.readouterr().err


def test_rows_that_were_not_measured_again_stay_and_say_where_they_are_from(
    tmp_path: Path,
) -> None:
    def rows(*false: int) -> list[dict[str, Any]]:
        names = ("sticky", "batches", "blips")
        return [
            {"cell": f"{name}/1/0", "scenario": name, "rate": 1.0, "base_error": 0.0}
            | {"rollouts": 10, "ramp_s": 1, "false": n, "upper": 0.1, "by_trigger": {}}
            for name, n in zip(names, false, strict=False)
        ]

    def machine(commit: str) -> dict[str, Any]:
        fixed = {"date": "d", "cpu": "c", "kernel": "k", "python": "3", "packages": {}}
        return fixed | {"commit": commit, "command": commit, "rollouts": 10, "cpu_seconds": 1}

    report.write("false-rollbacks", machine("first"), rows(1, 2), tmp_path)
    described = machine("second")
    again = [rows(7)[0], rows(0, 0, 9)[2]]
    merged = report.with_kept("false-rollbacks", described, again, tmp_path)
    assert [(row["scenario"], row["false"]) for row in merged] == [
        ("sticky", 7),
        ("batches", 2),
        ("blips", 9),
    ]
    report.write("false-rollbacks", described, merged, tmp_path)
    page = (tmp_path / "false-rollbacks.md").read_text()
    assert "1 rows (batches) are of `first`, commit first." in page
