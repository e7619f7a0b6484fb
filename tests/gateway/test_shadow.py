"""Shadow traffic: copies of requests that stable answered, compared with what the canary says."""

from __future__ import annotations

import gzip
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serving.errors import InvalidRequest
from serving.gateway import links, shadow
from serving.gateway.encoding import INLINE_INFLATE_BYTES
from tests.gateway.client import infer, post, tensor
from tests.gateway.harness import PATIENCE_S, Gateway, Replica, eventually
from tests.gateway.models import LENGTHS, RAISES, ScriptedBackend
from tests.gateway.rollouts import Rollout, answered_by
from tests.gateway.test_batches import callers

CLOSE = {"kind": "tolerance", "rtol": 1e-3, "atol": 1e-5}


def totals(rollout: Rollout, epoch: int = 1) -> tuple[int, int, int]:
    """Pairs, disagreements, and copies that were dropped."""
    counts = rollout.counts(epoch)
    return counts.pairs, counts.disagreements, counts.dropped


def settle(rollout: Rollout, count: int, epoch: int = 1) -> tuple[int, int, int]:
    """The totals once so many copies have been compared or dropped."""

    def reached() -> tuple[int, int, int] | None:
        pairs, disagreements, dropped = totals(rollout, epoch)
        assert pairs + dropped <= count
        return (pairs, disagreements, dropped) if pairs + dropped == count else None

    found = eventually(reached, f"{count} copies")
    assert found is not None
    return found


def ask(rollout: Rollout, count: int, first: float = 1) -> None:
    with rollout.gateway.connect() as client:
        for i in range(count):
            reply = client.ask(infer("m", first + i))
            assert answered_by(reply) == "stable"
            assert reply.values == [2 * (first + i)] * 2


def test_answers_that_agree(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    ask(rollout, 20)
    pairs, disagreements, dropped = settle(rollout, 20)
    assert (disagreements, dropped) == (0, 0)
    assert pairs == len(rollout.canary.backend.seen) == 20


def test_answers_that_differ(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    rollout.canary.backend.factor = 2.1
    ask(rollout, 20)
    assert settle(rollout, 20) == (20, 20, 0)


def test_what_cannot_be_copied_is_dropped_and_costs_neither_client_nor_stable(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(outputs: object) -> list[Any]:
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(shadow, "_copy", no_room)
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    ask(rollout, 2)
    assert settle(rollout, 2) == (0, 0, 2)
    assert rollout.stable_counts().failures == (2, 0, 2, 0)
    assert rollout.gateway.outcomes("m", "1") == {"success": 2}


def test_members_of_a_batch_are_compared_each_with_its_own(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 8, "max_delay_s": 60.0}
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    with callers(rollout.gateway, 8) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i + 1))
        assert [answered_by(c.reply()) for c in clients] == ["stable"] * 8
    assert settle(rollout, 8) == (8, 0, 0)
    assert sorted(rollout.canary.backend.seen) == [float(i + 1) for i in range(8)]


def test_a_share_is_copied(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=0.3, compare={"kind": "none"})
    ask(rollout, 200)
    rollout.gateway.until(lambda: not list(rollout.gateway.batcher("m", "2").outstanding()))
    pairs, disagreements, dropped = totals(rollout)
    # Five standard deviations.
    assert abs(pairs + dropped - 60) < 33
    assert disagreements == 0


def test_copies_are_in_no_count_of_clients(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    rollout.canary.backend.factor = 3
    ask(rollout, 5)
    assert settle(rollout, 5) == (5, 5, 0)
    rollout.canary.backend.failure = RuntimeError("a bad version")
    for n in range(6, 11):
        # One at a time: copies that fail as a batch are one failure.
        ask(rollout, 1)
        assert settle(rollout, n) == (n, n, 0)
    gateway = rollout.gateway
    assert gateway.outcomes("m", "2") == {}
    sizes = gateway.run(lambda: gateway.batcher("m", "2").recorder.batch_size.counts)
    assert sum(sizes) == 0
    counts = rollout.counts()
    assert counts.canary == {}
    assert counts.arm("stable").requests == 10
    assert rollout.summary()["opened"] == 0


@pytest.mark.parametrize("failure", [RuntimeError("no"), InvalidRequest("no")])
def test_what_the_canary_fails_disagrees(rollout: Rollout, failure: Exception) -> None:
    rollout.begin(0.0, shadow=1.0, compare={"kind": "none"})
    rollout.canary.backend.failure = failure
    for n in (1, 2, 3):
        ask(rollout, 1)
        assert settle(rollout, n) == (n, n, 0)


def test_a_failed_batch_of_copies_disagrees_once(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 8, "max_delay_s": 60.0}
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    rollout.canary.backend.failure = RuntimeError("a bad version")
    with callers(rollout.gateway, 8) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
        assert [answered_by(c.reply()) for c in clients] == ["stable"] * 8
    assert settle(rollout, 8) == (1, 1, 7)
    # Nor is one of them run again.
    assert [len(run) for run in rollout.canary.backend.runs] == [8]


def test_what_stable_fails_is_not_copied(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    with rollout.gateway.connect() as client:
        assert client.ask(infer("m", RAISES)).status == 500
        assert client.ask(infer("m", 1)).status == 200
    assert settle(rollout, 1) == (1, 0, 0)
    assert rollout.canary.backend.seen == [1]


def test_nobody_waits_for_a_canary_that_hangs(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    rollout.canary.backend.gate.clear()
    ask(rollout, 200)
    waiting = rollout.gateway.run(lambda: rollout.gateway.batcher("m", "2").queue_depth)
    assert waiting <= shadow.MAX_WAITING_ROWS + 1
    copied = len(rollout.gateway.run(lambda: list(rollout.gateway.batcher("m", "2").outstanding())))
    assert copied <= shadow.MAX_COPIES
    assert totals(rollout) == (0, 0, 200 - copied)
    rollout.canary.backend.gate.set()
    assert settle(rollout, 200) == (copied, 0, 200 - copied)
    assert rollout.gateway.outcomes("m", "1") == {"success": 200}


def test_copies_that_are_late_are_dropped(rollout: Rollout) -> None:
    rollout.limits = {"timeout_s": 0.2}
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    rollout.canary.backend.gate.clear()
    ask(rollout, 3)
    assert settle(rollout, 3) == (0, 0, 3)


def test_while_stable_has_requests_waiting_nothing_is_copied(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 8}
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    gateway = rollout.gateway
    stable = gateway.batcher("m", "1")
    rollout.stable.backend.gate.clear()
    many = shadow.MAX_WAITING_ROWS + 16
    with callers(gateway, many) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
            gateway.until(lambda n=i + 1: stable.in_flight + stable.queue_depth == n)
        rollout.stable.backend.gate.set()
        assert [answered_by(c.reply()) for c in clients] == ["stable"] * many
    pairs, disagreements, dropped = settle(rollout, many)
    # The first of them were answered while more than enough waited.
    assert dropped >= 1
    assert pairs >= 1
    assert disagreements == 0


def rollout_shadow(gateway: Gateway) -> shadow.Shadow:
    (splitter,) = gateway.server.routes._splitters.values()
    return splitter.shadow


def test_clients_of_the_canary_come_before_copies(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A replica reads from two connections in any order.
    monkeypatch.setattr(links, "BATCHES_IN_FLIGHT", 1)
    rollout.begin(0.0, shadow=1.0, compare=CLOSE, overrides=(("x-arm", "canary", "canary"),))
    gateway = rollout.gateway
    canary = gateway.batcher("m", "2")
    rollout.canary.backend.gate.clear()
    with gateway.connect() as client:
        ask(rollout, 1)
        eventually(lambda: rollout.canary.backend.running)
        ask(rollout, 4, first=100)
        gateway.until(lambda: canary.queue_depth == 4)
        client.send(infer("m", 50, headers=["X-Arm: canary"], parameters={"priority": 9}))
        gateway.until(lambda: canary.queue_depth == 5)
        rollout.canary.backend.gate.set()
        assert answered_by(client.reply()) == "canary"
    assert settle(rollout, 5) == (5, 0, 0)
    seen = rollout.canary.backend.seen
    assert seen.index(50) < min(seen.index(100 + i) for i in range(4))


def test_a_canary_without_replicas_gets_no_copies(rollout: Rollout) -> None:
    rollout.canaries = []
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    ask(rollout, 3)
    assert totals(rollout) == (0, 0, 3)


def test_a_lost_replica_takes_its_copies_with_it(gateway: Gateway, run_dir: Path) -> None:
    """A copy that killed it must not kill the next."""
    names = ("stable-1", "canary-1", "canary-2")
    stable, *canaries = [Replica(ScriptedBackend(), run_dir, name) for name in names]
    rollout = Rollout(gateway, stable, *canaries)
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    for replica in canaries:
        replica.backend.gate.clear()
    ask(rollout, 1)
    first = eventually(lambda: next((r for r in canaries if r.backend.running), None))
    first.stop()
    assert settle(rollout, 1) == (0, 0, 1)
    for replica in canaries:
        replica.backend.gate.set()
    ask(rollout, 1, first=5)
    assert settle(rollout, 2) == (1, 0, 1)
    (second,) = (r for r in canaries if r is not first)
    assert second.backend.seen == [5]
    for replica in (stable, second):
        replica.stop()


def test_the_end_of_a_rollout_with_copies_on_their_way(rollout: Rollout) -> None:
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    rollout.canary.backend.gate.clear()
    ask(rollout, 3)
    rollout.end()
    rollout.canary.backend.gate.set()
    assert settle(rollout, 3) == (3, 0, 0)
    ask(rollout, 3)
    assert totals(rollout) == (3, 0, 0)


def test_an_epoch_has_its_own_pairs(rollout: Rollout) -> None:
    rollout.begin(0.0, epoch=1, shadow=1.0, compare=CLOSE)
    ask(rollout, 2)
    settle(rollout, 2)
    rollout.begin(0.0, epoch=2, shadow=1.0, compare=CLOSE)
    ask(rollout, 3)
    assert settle(rollout, 3, epoch=2) == (3, 0, 0)
    assert totals(rollout, epoch=1) == (2, 0, 0)


@pytest.fixture
def operators_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module: Any = ModuleType("operators_metrics")
    module.off_by = lambda a, b: abs(float((a - b).max()))
    module.broken = lambda a, b: 1 / 0
    module.constant = 3
    monkeypatch.setitem(sys.modules, "operators_metrics", module)
    return module


def metric(name: str, threshold: float = 0.5) -> dict[str, Any]:
    return {"kind": "metric", "metric": f"operators_metrics:{name}", "threshold": threshold}


@pytest.mark.usefixtures("operators_module")
def test_a_metric_of_the_operators(rollout: Rollout) -> None:
    rollout.canary.backend.factor = 2.1
    for epoch, (threshold, differ) in enumerate(((10.0, 0), (0.01, 4))):
        rollout.begin(0.0, epoch, shadow=1.0, compare=metric("off_by", threshold))
        rollout.gateway.until(lambda: rollout_shadow(rollout.gateway)._compare)
        ask(rollout, 4, first=10)
        assert settle(rollout, 4, epoch) == (4, differ, 0)


def test_a_slow_metric_keeps_nobody_waiting(rollout: Rollout, operators_module: Any) -> None:
    go_on = threading.Event()
    operators_module.slow = lambda a, b: float(not go_on.wait(PATIENCE_S))
    rollout.begin(0.0, shadow=1.0, compare=metric("slow"))
    rollout.gateway.until(lambda: rollout_shadow(rollout.gateway)._compare)
    # More than the event loop has threads for what clients wait for, as a large body inflated.
    ask(rollout, shadow.MAX_COPIES + 6)
    with rollout.gateway.connect() as client:
        padding = random.Random(0).randbytes(INLINE_INFLATE_BYTES).hex()
        raw = {"inputs": [tensor("x", [[1.0, 1.0]])], "parameters": {"padding": padding}}
        packed = gzip.compress(json.dumps(raw).encode())
        assert len(packed) > INLINE_INFLATE_BYTES
        head = ("Content-Type: application/json", "Content-Encoding: gzip")
        reply = client.ask(post("/v2/models/m/infer", packed, *head))
        assert answered_by(reply) == "stable"
    assert totals(rollout)[0] == 0
    go_on.set()
    pairs, disagreements, dropped = settle(rollout, shadow.MAX_COPIES + 7)
    assert disagreements == 0
    assert pairs >= dropped > 0


@pytest.mark.usefixtures("operators_module")
@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (metric("broken"), "a comparison failed: ZeroDivisionError"),
        (metric("missing"), "has no attribute 'missing'"),
        (metric("constant"), "'operators_metrics:constant' is no function"),
        ({"kind": "metric", "metric": "no_such_module:f"}, "No module named 'no_such_module'"),
        ({"kind": "metric", "metric": "l7"}, "module:function"),
        ({"kind": "argmax", "output": "q"}, "the model has no output 'q'; its outputs: y"),
    ],
)
def test_a_comparison_that_does_not_work_drops_and_says_why(
    rollout: Rollout, compare: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rollout.begin(0.0, shadow=1.0, compare=compare)
    ask(rollout, 2)
    assert settle(rollout, 2) == (0, 0, 2)
    eventually(lambda: message in caplog.text)
    assert "rollout rollout-1" in caplog.text


def test_large_answers(gateway: Gateway, run_dir: Path) -> None:
    replicas = [Replica(ScriptedBackend(LENGTHS), run_dir, n) for n in ("stable-1", "canary-1")]
    rollout = Rollout(gateway, *replicas)
    rollout.begin(0.0, shadow=1.0, compare=CLOSE)
    with gateway.connect() as client:
        for factor, expected in ((2.0, (2, 0, 0)), (2.5, (4, 2, 0))):
            replicas[1].backend.factor = factor
            for _ in range(2):
                reply = client.ask(post("/v2/models/m/infer", large_body(50_000)))
                assert answered_by(reply) == "stable"
            assert settle(rollout, expected[0]) == expected
    for replica in replicas:
        replica.stop()


def large_body(width: int) -> bytes:
    row = [[1.5] * width]
    return json.dumps({"inputs": [tensor("x", row)]}).encode()


def test_the_end_of_the_gateway_drops_what_is_on_its_way(run_dir: Path) -> None:
    replicas = [Replica(ScriptedBackend(), run_dir, n) for n in ("stable-1", "canary-1")]
    with Gateway() as gateway:
        rollout = Rollout(gateway, *replicas)
        rollout.begin(0.0, shadow=1.0, compare=CLOSE)
        replicas[1].backend.gate.clear()
        ask(rollout, 3)
        started = time.monotonic()
        gateway.stop()
        assert time.monotonic() - started < gateway.config.drain_s / 2
        (row,) = gateway.controller.reports[-1]["rollouts"]["shadows"]
        assert (row["pairs"], row["dropped"]) == (0, 3)
    for replica in replicas:
        replica.backend.gate.set()
        replica.stop()
