"""When errors burn the budget too fast: the product's own trigger, asked where it may fail."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.rollouts.cells import Array, Plan
from benchmarks.rollouts.traffic import NEVER, STABLE, Counts, attempts, split
from serving.core.hard_triggers import OWN_FAULT
from serving.core.hard_triggers import slo_burn as judge
from serving.core.rollout import new_rollout
from serving.core.rollout_counts import ArmCountsRow, EpochCounts, Sample, Tally
from serving.core.rollout_spec import Trigger
from serving.core.rollout_types import Outcome, Rollout, Snapshot

_SHORT = 0.2  # of the window


def first_failure(trigger: Trigger, counts: Counts, plan: Plan, rng: np.random.Generator) -> Array:
    """The second at which the trigger fails first, by rollout.

    Windows begin where blocks do, so they are up to a block longer than they should be. Asked at
    the end of each block, then at each second of the first block that fails.
    """
    blocks = attempts(counts.blocks)
    by_step = blocks[:, :, STABLE]
    by_source = blocks.cumsum(axis=1)
    total = np.concatenate([np.zeros((len(by_source), 1, *by_source.shape[2:])), by_source], axis=1)
    ends = np.concatenate([[0], plan.seconds.cumsum()])
    # Of every block's end, the latest one that lies a window before.
    starts = np.stack(
        [
            np.maximum(np.searchsorted(ends, ends[1:] - window, side="right") - 1, 0)
            for window in (trigger.window_s, _SHORT * trigger.window_s)
        ]
    )
    rollout = _rollout(plan)
    at = np.full(len(total), NEVER)
    bad = _bad(trigger, plan, total, starts)
    for row in np.nonzero(bad.any(axis=1))[0]:
        for block in np.nonzero(bad[row])[0]:
            before = [(float(ends[i]), total[row, i]) for i in sorted(set(starts[:, block]))]
            steps = _stable_by_step(by_step[row], plan, int(block))
            asked = partial(_fails, trigger, rollout, steps, before)
            if not asked(float(ends[block + 1]), total[row, block + 1]):
                continue
            length = int(plan.seconds[block])
            seconds = total[row, block] + np.swapaxes(split(blocks[row, block], length, rng), 0, 1)
            at[row] = next(
                second
                for second in range(int(ends[block]) + 1, int(ends[block + 1]) + 1)
                if asked(second, seconds[second - ends[block] - 1])
            )
            break
    return at


def _bad(trigger: Trigger, plan: Plan, total: Array, starts: NDArray[np.intp]) -> NDArray[np.bool_]:
    """(rollouts, blocks): where both windows' rates are above the bound at the block's end."""
    arms = np.stack([total[:, :, :STABLE].sum(axis=2), total[:, :, STABLE]], axis=2)[..., :2]
    windows = [arms[:, 1:] - arms[:, begin] for begin in starts]
    n, k = np.moveaxis(windows[0][:, :, 1], -1, 0)
    likewise = np.where(n >= plan.spec.analysis.min_units, OWN_FAULT * k / np.maximum(n, 1), 0.0)
    bound = np.maximum(np.minimum(likewise, 0.5), trigger.threshold * (1 - trigger.objective))
    bad: NDArray[np.bool_] = windows[0][:, :, 0, 1] >= trigger.failures
    for window in windows:
        bad &= window[:, :, 0, 1] >= bound * np.maximum(window[:, :, 0, 0], 1)
    return bad


def _stable_by_step(blocks: Array, plan: Plan, until: int) -> dict[int, EpochCounts]:
    """What stable did before a block, `blocks` being (blocks, 4): a step is an epoch."""
    found = {}
    for step in np.unique(plan.step[:until]).tolist():
        n, k, batches, failed = _tally(blocks[:until][plan.step[:until] == step].sum(axis=0))
        row = ArmCountsRow(requests=n, failed=k, batches=batches, failed_batches=failed)
        found[step] = EpochCounts(stable={"s": row})
    return found


def _fails(
    trigger: Trigger,
    rollout: Rollout,
    steps: dict[int, EpochCounts],
    before: list[tuple[float, Array]],
    now: float,
    counts: Array,
) -> bool:
    snapshot = Snapshot(
        now=now,
        canary_ready=2,
        canary_wanted=2,
        stable_ready=2,
        revision=1,
        gateways_at=1,
        counts=steps,
        history=tuple(_sample(at, sources) for at, sources in [*before, (now, counts)]),
    )
    return judge(trigger, rollout, snapshot).verdict is Outcome.FAIL


def _sample(at: float, sources: Array) -> Sample:
    return Sample(at, stable=_tally(sources[STABLE]), canary=_tally(sources[:STABLE].sum(axis=0)))


def _tally(row: Array) -> Tally:
    n, k, batches, failed = (int(value) for value in row)
    return n, k, batches, failed


def _rollout(plan: Plan) -> Rollout:
    return new_rollout(
        "simulated",
        model="",
        stable=("1", ""),
        canary=("2", ""),
        spec=plan.spec,
        salt="",
        actor="",
        reason="",
        now=0.0,
    )
