"""When each of many simulated rollouts is taken back, by which trigger, and what it had cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.rollouts import shadow, slo_burn, traffic
from benchmarks.rollouts.cells import SCENARIOS, Array, Cell, Plan
from benchmarks.rollouts.judge import Judge, fails, growth_ceiling, judges, possible
from benchmarks.rollouts.traffic import NEVER, STABLE, Counts
from serving.core.two_arms import WITNESS

_CHUNK: Final = 500
_ITEMS: Final = 2000  # blocks looked at in seconds at a time


@dataclass(frozen=True)
class Fired:
    """By rollout: seconds from the first step to the verdict (inf: none), and the trigger's index.

    `served` are the canary's requests from the fault until then and `failed` those that failed. In
    the shadow, before the first step, the time is negative and nothing was served.
    """

    triggers: tuple[str, ...]
    at: Array
    trigger: NDArray[np.intp]
    served: Array
    failed: Array


def run(cell: Cell, plan: Plan, rollouts: int, seed: int) -> Fired:
    """Simulate rollouts of a cell and judge them each second."""
    rng = generator(cell, seed)
    return together(
        judged(cell, plan, traffic.draw(cell, plan, size, rng), rng) for size in chunks(rollouts)
    )


def generator(cell: Cell, seed: int) -> np.random.Generator:
    """Randomness of its own for every kind of healthy traffic."""
    scenario = SCENARIOS.index(cell.scenario)
    return np.random.default_rng([seed, int(cell.rate), round(cell.base_error * 1e4), scenario])


def chunks(rollouts: int) -> list[int]:
    """How many rollouts to simulate at a time."""
    return [min(_CHUNK, rollouts - done) for done in range(0, rollouts, _CHUNK)]


def together(parts: Iterable[Fired]) -> Fired:
    """Several simulations of one cell as one."""
    found = list(parts)
    columns = (
        np.concatenate([getattr(part, name) for part in found])
        for name in ("at", "trigger", "served", "failed")
    )
    return Fired(found[0].triggers, *columns)


def judged(cell: Cell, plan: Plan, counts: Counts, rng: np.random.Generator) -> Fired:
    """What the product's triggers make of these counts."""
    rollouts, triggers = len(counts.blocks), plan.spec.analysis.triggers
    found = {
        judge.name: _first_failure(judge, counts, plan, rng) for judge in judges(plan.spec.analysis)
    }
    for trigger in triggers:
        if trigger.kind == "disagreement":
            found[trigger.name] = shadow.first_failure(trigger, cell, plan, rollouts, rng)
        if trigger.kind == "slo_burn":
            found[trigger.name] = slo_burn.first_failure(trigger, counts, plan, rng)
    by_trigger = np.stack(list(found.values()))
    at = by_trigger.min(axis=0)
    served, failed = _until(counts, plan, plan.starts_s(cell.fault.from_step), at)
    return Fired(tuple(found), at, by_trigger.argmin(axis=0), served, failed)


def _until(counts: Counts, plan: Plan, since: int, at: Array) -> tuple[Array, Array]:
    """Requests and failures of the canary from `since` to `at`, of its last block in proportion."""
    by_block = counts.blocks[:, :, 0, :STABLE, :2].sum(axis=2)
    part = np.clip((at[:, np.newaxis] - plan.begin) / plan.seconds, 0, 1)
    part[:, plan.begin < since] = 0.0
    total = (by_block * part[..., np.newaxis]).sum(axis=1)
    return total[:, 0], total[:, 1]


@dataclass(frozen=True)
class _History:
    """Cumulated counts of what a judge counts, sources and columns last.

    `closed` has epochs as wholes (rollouts, steps, bets, …), `begin` and `end` what the running
    epoch had at each block's beginning and end (rollouts, blocks, bets, …).
    """

    closed: Array
    begin: Array
    end: Array

    @classmethod
    def of(cls, judge: Judge, counts: Counts, plan: Plan) -> _History:
        blocks = judge.blocks(counts)
        end = np.empty_like(blocks)
        for first, last in zip([0, *plan.last[:-1] + 1], plan.last + 1, strict=True):
            np.cumsum(blocks[:, first:last], axis=1, out=end[:, first:last])
        return cls(end[:, plan.last], end - blocks, end)


_Views = dict[int | None, Array]
"""Something by the replica of the canary that is set aside: none, or each in turn."""


def _views(judge: Judge) -> tuple[int | None, ...]:
    return (None, 0, 1) if judge.witnesses else (None,)


def _canary(counts: Array, without: int | None = None) -> Array:
    """All replicas of the canary but one, if one is set aside."""
    if without is not None:
        return counts[..., 1 - without, :]
    if counts.shape[-2] == 2:
        return np.array(counts[..., 0, :])
    return counts[..., 0, :] + counts[..., 1, :]


def _first_failure(judge: Judge, counts: Counts, plan: Plan, rng: np.random.Generator) -> Array:
    """The second at which the trigger fails first, by rollout."""
    at = np.full(len(counts.blocks), NEVER)
    history = _History.of(judge, counts, plan)
    closed = {view: _closed_ceiling(judge, history, plan, view) for view in _views(judge)}
    rows, blocks = np.nonzero(_possible_blocks(judge, history, closed, plan))
    # In the order of time: what has failed need not be looked at again.
    for block in np.unique(blocks):
        row = rows[blocks == block]
        row = row[at[row] > plan.begin[block]]
        for chosen in (row[i : i + _ITEMS] for i in range(0, len(row), _ITEMS)):
            when = _look_closely(judge, counts, history, closed, plan, chosen, block, rng)
            at[chosen] = np.minimum(at[chosen], when)
    return at


def _ceiling(judge: Judge, weight: Array, now: Array, without: int | None) -> Array:
    """`growth_ceiling` of every bet (items, bets, …) from counts (items, bets, …, sources, 2)."""
    found = []
    for i, bet in enumerate(judge.bets):
        part, share = _canary(now[:, i], without), weight
        if without is not None and bet.assigned:
            left = part[..., 0] / np.maximum(_canary(now[:, i])[..., 0], 1.0)
            share = weight * left / np.maximum(weight * left + 1 - weight, 1e-12)
        found.append(growth_ceiling(bet, share, part, now[:, i, ..., -1, :]))
    return np.stack(found, axis=1)


def _closed_ceiling(judge: Judge, history: _History, plan: Plan, without: int | None) -> Array:
    """(rollouts, bets, steps): what each epoch as a whole can be worth."""
    closed = np.moveaxis(history.closed[..., :2], 1, 2)
    return _ceiling(judge, plan.weights, closed, without)


def _possible_blocks(
    judge: Judge, history: _History, closed: _Views, plan: Plan
) -> NDArray[np.bool_]:
    """(rollouts, blocks): where the trigger may fail within the block, in whatever order of events.

    The worst order has all events of the canary first, then all else of stable's but its events.
    """
    # Too few requests, or events, at the end of a block are too few within it.
    total = _canary(history.end)
    over = _canary(history.closed)
    for step in range(1, len(plan.lengths_s)):
        total[:, plan.step == step] += over[:, :step].sum(axis=1)[:, np.newaxis]
    found: NDArray[np.bool_] = total[:, :, 0, 0] >= judge.min_units
    found &= total[..., 1::2].min(axis=-1).max(axis=-1) >= judge.min_events
    for without in _views(judge):
        row, block = np.nonzero(found)
        steps = plan.step[block]
        worst = _worst_order(judge, history, row, block)
        current = _ceiling(judge, plan.weights[steps], worst, without)
        may = possible(judge, closed[without][row], current, steps, len(plan.lengths_s))
        if without is not None:
            # Twice what a witness needs: it will be one throughout the block.
            may |= ~_heard(history, row, steps, history.begin[row, block, 0], 2 * WITNESS)
        found[row, block] = may
    return found


def _worst_order(
    judge: Judge, history: _History, row: NDArray[np.intp], block: NDArray[np.intp]
) -> Array:
    """Units and events (items, bets, sources, 2) once all that speaks against the canary came."""
    found = history.begin[row, block][..., :2]
    events = history.end[row, block][..., 1]
    more = events - found[..., 1]
    found[..., :-1, 1] = events[..., :-1]
    found[..., :-1, 0] += more[..., :-1]
    realised = [i for i, bet in enumerate(judge.bets) if not bet.assigned]
    if realised:
        found[:, realised, -1, 0] = (history.end[row, block][..., 0] - more)[:, realised, -1]
    return found


def _heard(
    history: _History,
    row: NDArray[np.intp],
    step: NDArray[np.intp],
    now: Array,
    least: float = WITNESS,
) -> NDArray[np.bool_]:
    """Whether each replica of the canary has had enough of a fair share to be a witness."""
    over = np.arange(history.closed.shape[1]) < step[:, np.newaxis]
    earlier = (history.closed[row, :, 0, :STABLE, 0] * over[..., np.newaxis]).sum(axis=1)
    units = earlier + now[:, :STABLE, 0]
    fair = units.sum(axis=1, keepdims=True) / STABLE
    heard: NDArray[np.bool_] = ((units > 0) & (units >= least * fair)).all(axis=1)
    return heard


def _look_closely(
    judge: Judge,
    counts: Counts,
    history: _History,
    closed: _Views,
    plan: Plan,
    row: NDArray[np.intp],
    block: np.intp,
    rng: np.random.Generator,
) -> Array:
    """When the trigger fails within this block of these rollouts (inf: not in this one)."""
    length = int(plan.seconds[block])
    totals, begun = judge.blocks(counts)[row, block], history.begin[row, block]
    draw = traffic.split if judge.witnesses else traffic.split_predictions
    drawn = draw(totals, length, rng)
    # Items are now (rollout, second); bets and sources follow.
    seconds = np.moveaxis(begun[..., np.newaxis, :] + drawn, 3, 1)
    seconds = seconds.reshape(-1, *begun.shape[1:])
    item, step = np.repeat(np.arange(len(row)), length), plan.step[block]
    chosen, weight = np.arange(len(item)), plan.weights[[step]]
    for without in _views(judge):
        now = seconds[chosen][..., :2]
        current = _ceiling(judge, weight, now, without)
        steps, of = np.full(len(chosen), step), row[item[chosen]]
        may = possible(judge, closed[without][of], current, steps, len(plan.lengths_s))
        if without is not None:
            may |= ~_heard(history, of, steps, now[:, 0])
        chosen = chosen[may]
    when = np.full(len(item), NEVER)
    if chosen.size:
        table = _tables(judge, counts, history, row[item[chosen]], step, seconds[chosen])
        _, failing = fails(judge, table, np.array([0.0, *plan.weights]))
        second = plan.begin[block] + chosen % length + 1.0
        when[chosen] = np.where(failing, second, NEVER)
    found: Array = when.reshape(-1, length).min(axis=1)
    return found


def _tables(
    judge: Judge,
    counts: Counts,
    history: _History,
    row: NDArray[np.intp],
    step: np.intp,
    now: Array,
) -> Array:
    """(items, bets, 3, epochs, 4): before the steps, the steps that are over, the running one."""
    closed = history.closed[row]
    closed[:, step:] = 0.0
    closed[:, step] = now
    if not judge.witnesses:
        closed = traffic.widen(closed)
    before = judge.before(counts)[row][:, np.newaxis]
    return np.moveaxis(np.concatenate([before, closed], axis=1), 1, 3)
