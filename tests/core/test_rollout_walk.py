"""Random walks through plans, worlds and commands: what must hold after every single decision."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace

from serving.core.rollout import COMMANDS, Rollout, State, decide
from serving.core.rollout_progress import WATCHED
from serving.core.rollout_spec import Bake, Gate, RolloutSpec, Shadow, Step, Webhook
from serving.core.rollout_states import TERMINAL, TRANSITIONS
from serving.core.rollout_types import Outcome, ProviderState
from serving.errors import ConflictError
from tests.core.rollouts import OK, PLAN, QUEUE, World, analysis, stored, world

WALKS, LENGTH = 80, 60
HOOKS = ("pre-rollout:0:0", *(f"pre-step:{i}:0" for i in range(4)))


def random_plan(rng: random.Random) -> RolloutSpec:
    weights = sorted(rng.sample([0, 1, 5, 25, 50, 90], rng.randint(0, 3)))
    steps = tuple(
        Step(
            weight,
            rng.choice([0, 20, 60]),
            require_pass=("errors",) if rng.random() < 0.3 else (),
            gate=Gate(timeout_s=60, on_timeout=rng.choice(["pause", "rollback", "proceed"]))
            if rng.random() < 0.4
            else None,
        )
        for weight in weights
    )
    hooks = (Webhook("pre-rollout", "http://a"), Webhook("pre-step", "http://b"))
    return replace(
        PLAN,
        shadow=rng.choice([None, Shadow(min_pairs=100, max_duration_s=30)]),
        steps=steps,
        bake=Bake(rng.choice([0, 60])),
        webhooks=hooks if rng.random() < 0.3 else (),
        analysis=analysis(QUEUE, dry_run=rng.random() < 0.1),
    )


def disturb(rng: random.Random, w: World) -> None:
    w.canary_ready = rng.choices([0, 1, 2], [1, 2, 12])[0]
    w.stable_ready = rng.choices([0, 1, 2], [1, 2, 12])[0]
    w.canary_failed = "it crashed" if rng.random() < 0.005 else ""
    w.canary_fails = rng.choices([0.0, 0.3], [30, 1])[0]
    w.lagging = rng.random() < 0.2
    w.rate = rng.choice([0, 10, 1000])
    bad = [ProviderState("unknown", errors=9), ProviderState("fail", fails=9)]
    w.providers = {key: OK if rng.random() < 0.95 else rng.choice(bad) for key in ("queue", *HOOKS)}


def check(w: World, before: Rollout) -> None:
    r, spec = w.rollout, w.rollout.spec
    # Weights come from the plan, but for an arm that is away.
    allowed = {0.0, 1.0, *(s.weight / 100 for s in spec.steps)}
    assert r.weight in allowed
    assert r.current.weight == r.weight
    assert r.current.step == r.step
    # A change of weight or step starts an epoch; epochs only grow, and none is rewritten.
    assert r.epochs[: len(before.epochs)] == before.epochs
    assert [e.epoch for e in r.epochs] == list(range(len(r.epochs)))
    changed = (before.weight, before.step) != (r.weight, r.step)
    assert not changed or len(r.epochs) > len(before.epochs)
    if r.state is not before.state and before.state is not State.PAUSED:
        assert r.entered_at == w.now
    assert (r.finished_at is not None) == (r.state in TERMINAL)
    assert (r.resume_to is not None) == (r.state is State.PAUSED)


def check_tick(w: World, before: Rollout) -> None:
    r = w.rollout
    check(w, before)
    # One transition of the table at most.
    if r.state is not before.state:
        targets = {t for (s, _), t in TRANSITIONS.items() if s is before.state}
        assert r.state in targets
    if r.active:
        assert r.weight == 0 or w.canary_ready > 0
        lost_stable = w.stable_ready == 0 and w.canary_ready > 0
        if lost_stable and r.stage in WATCHED and before.stage in WATCHED:
            assert r.weight == (1.0 if r.planned_weight > 0 else 0.0)
    failed = [v for v in r.verdicts if v.verdict is Outcome.FAIL and v.action == "rollback"]
    if failed and before.stage in WATCHED and not r.spec.analysis.dry_run:
        # A verdict is withheld only while stable has no replica: nobody else could answer.
        assert r.state is State.ROLLING_BACK or w.stable_ready == 0
        assert r.weight == 0 or r.state is not State.ROLLING_BACK
    if r.state is State.ROLLING_BACK and before.stage in WATCHED and w.stable_ready == 0:
        assert "no ready replica" in r.reason or w.canary_failed
    assert w.next


def test_walks() -> None:
    seen = set[State]()
    for seed in range(WALKS):
        seen |= walk(random.Random(seed))
    assert seen >= set(State) - {State.PENDING}


def walk(rng: random.Random) -> set[State]:
    """The states that a walk came to. Most disturbances last for a while."""
    w, seen = world(random_plan(rng)), set[State]()
    for _ in range(LENGTH):
        if rng.random() < 0.4:
            disturb(rng, w)
        before = w.rollout
        seen.add(w.tick(rng.choice([1, 5, 30, 120])).state)
        check_tick(w, before)
        if rng.random() < 0.2:
            # A controller that has just come back from its store decides the same.
            assert decide(stored(before), w.snapshot()) == w.rollout
        if rng.random() < 0.1:
            before, name = w.rollout, rng.choice(list(COMMANDS)[:4])
            try:
                seen.add(w.say(name).state)
            except ConflictError:
                assert w.rollout == before
            check(w, before)
            assert stored(w.rollout) == w.rollout
        if rng.random() < 0.03:
            check_way_out(w)
    return seen


def check_way_out(w: World) -> None:
    """From wherever it is, in a healthy world, a person brings it to an end of either kind."""
    if not w.rollout.active:
        return
    for commands in (("resume", "approve", "promote"), ("abort", "rollback")):
        copy = replace(w, counts=dict(w.counts), restarts=())
        copy.canary_ready = copy.stable_ready = 2
        copy.canary_failed, copy.canary_fails, copy.lagging = "", 0.0, False
        copy.rate, copy.providers = 1000, dict.fromkeys(("queue", *HOOKS), OK)
        for _ in range(60):
            for command in commands:
                with suppress(ConflictError):
                    copy.say(command)
            if not copy.tick(10).active:
                break
        assert not copy.rollout.active, f"{copy.rollout.state} has no way out"
        assert "abort" not in commands or copy.rollout.state is State.ROLLED_BACK
