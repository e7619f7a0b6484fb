"""What becomes of the requests of a lost replica, one of which may have killed it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from serving.core import frames
from serving.gateway import links
from tests.gateway.client import Client, infer
from tests.gateway.harness import Gateway, NewReplica, Replica, ReplicaProcess, arm, eventually
from tests.gateway.rogue import Rogue, result
from tests.gateway.test_batches import NEVER_S, callers, plugged, send_all
from tests.gateway.test_processes import answer_to_poison
from tests.replica.client import Client as FrameClient

ONE_BATCH = {"max_size": 64, "max_delay_s": NEVER_S}


@contextmanager
def lost(
    gateway: Gateway, new: NewReplica, count: int, survivors: list[Replica]
) -> Iterator[list[Client]]:
    """Callers whose requests, 0 to `count` - 1, were in one batch at a replica that is gone."""
    first = new("lost")
    gateway.publish(arm("m", [first], max_size=count, max_delay_s=NEVER_S))
    batcher = gateway.batcher("m")
    first.backend.gate.clear()
    with callers(gateway, count) as clients:
        send_all(clients, list(range(count)))
        gateway.until(lambda: batcher.in_flight == count)
        gateway.publish(arm("m", survivors), ready=False)
        gateway.until(lambda: all(batcher.links[s.endpoint].up for s in survivors))
        first.stop()
        gateway.until(lambda: first.endpoint not in batcher.links, "the loss is noticed")
        yield clients


def answers(clients: list[Client]) -> list[float]:
    return [client.reply().values[0] for client in clients]


def doubled(count: int) -> list[float]:
    return [2.0 * i for i in range(count)]


def test_suspects_are_sent_in_a_few_groups(gateway: Gateway, new: NewReplica) -> None:
    second = new("second")
    with lost(gateway, new, 64, [second]) as clients:
        assert answers(clients) == doubled(64)
    assert [len(run) for run in second.backend.runs] == [8] * 8


def test_a_few_suspects_are_sent_one_by_one(gateway: Gateway, new: NewReplica) -> None:
    second = new("second")
    with lost(gateway, new, 8, [second]) as clients:
        assert answers(clients) == doubled(8)
    assert [len(run) for run in second.backend.runs] == [1] * 8


def test_a_poison_request_among_many_kills_three_replicas(
    gateway: Gateway, processes: Callable[[str], ReplicaProcess]
) -> None:
    replicas = [processes(name) for name in "abcd"]
    gateway.publish(arm("m", replicas, **ONE_BATCH))
    poisoned = answer_to_poison(gateway, 64, at=37)
    assert poisoned.status == 503
    assert "lost during the run, 3 times" in poisoned.error
    eventually(lambda: sum(r.dead for r in replicas) == 3)


def test_the_other_replicas_serve_on(gateway: Gateway, new: NewReplica) -> None:
    survivors = [new("a"), new("b")]
    for survivor in survivors:
        survivor.backend.gate.clear()
    with lost(gateway, new, 20, survivors) as clients, gateway.connect() as other:
        eventually(lambda: any(s.backend.running for s in survivors))
        other.send(infer("m", 500))
        eventually(lambda: all(s.backend.running for s in survivors))
        held, free = sorted(survivors, key=lambda s: 500 in s.backend.seen)
        assert free.backend.seen == [500]
        free.backend.gate.set()
        assert other.reply().values == [1000, 1000]
        assert [len(run) for run in held.backend.runs] == [5]
        held.backend.gate.set()
        assert answers(clients) == doubled(20)


def test_a_busy_replica_is_kept_free_for_suspects(gateway: Gateway, new: NewReplica) -> None:
    """However many others come, and however urgent they are."""
    survivors = [new("a"), new("b")]
    first = new("lost")
    gateway.publish(arm("m", [first, *survivors]))
    batcher = gateway.batcher("m")
    replicas = [first, *survivors]
    for replica in replicas:
        replica.backend.gate.clear()
    count = len(replicas) * links.BATCHES_IN_FLIGHT
    with callers(gateway, count) as clients, callers(gateway, 4) as others:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
            gateway.until(lambda n=i: batcher.in_flight == n + 1)
        for i, other in enumerate(others):
            other.send(infer("m", 100 + i, parameters={"priority": 1}))
        gateway.until(lambda: batcher.queue_depth == 4)
        first.stop()
        gateway.until(lambda: batcher._links.reserved is not None)
        for survivor in survivors:
            survivor.backend.gate.set()
        assert answers(clients) == doubled(count)
        assert answers(others) == [200, 202, 204, 206]
        assert gateway.run(lambda: batcher._links.reserved) is None


def test_one_replica_serves_suspects_and_others_in_turn(gateway: Gateway, new: NewReplica) -> None:
    only = new("only")
    only.backend.gate.clear()
    with lost(gateway, new, 20, [only]) as clients, callers(gateway, 3) as others:
        eventually(lambda: only.backend.running)
        for i, other in enumerate(others):
            other.send(infer("m", 500 + i))
        gateway.until(lambda: gateway.batcher("m").queue_depth == 15 + 3)
        only.backend.gate.set()
        assert answers(clients) == doubled(20)
        assert answers(others) == [1000, 1002, 1004]
    runs = only.backend.runs
    assert [len(run) for run in runs if run[0] < 500] == [5] * 4
    # One group was running when the others came, and no second one went before them.
    assert sorted(runs[1]) == [500, 501, 502]


def test_suspects_that_are_late_hold_nobody_up(gateway: Gateway, new: NewReplica) -> None:
    only = new("only")
    only.backend.gate.clear()
    first = new("lost")
    gateway.publish(arm("m", [first], max_size=3, max_delay_s=NEVER_S))
    batcher = gateway.batcher("m")
    first.backend.gate.clear()
    with callers(gateway, 3) as clients, gateway.connect() as other:
        send_all(clients, [0, 1, 2], parameters={"timeout": 300_000})
        gateway.until(lambda: batcher.in_flight == 3)
        gateway.publish(arm("m", [only]), ready=False)
        gateway.until(lambda: batcher.links[only.endpoint].up)
        first.stop()
        eventually(lambda: only.backend.running)
        assert [client.reply().status for client in clients] == [504] * 3
        other.send(infer("m", 500))
        only.backend.gate.set()
        assert other.reply().values == [1000, 1000]
    assert only.backend.seen == [0, 500]


def test_the_wait_is_estimated_from_the_runs_that_suspects_take(
    gateway: Gateway, new: NewReplica
) -> None:
    """Fifteen rows would be one run of a second; in groups of five they are three."""
    only = new("only")
    only.backend.gate.clear()
    with lost(gateway, new, 20, [only]) as clients, callers(gateway, 2) as others:
        eventually(lambda: only.backend.running)
        batcher = gateway.batcher("m")

        def slow() -> None:
            for rows in (1, 64):
                batcher._service.observe(rows, 1.0)

        gateway.run(slow)
        others[0].send(infer("m", 500))
        refused = others[0].reply()
        assert refused.status == 429
        assert "the estimated wait is 3000 ms" in refused.error
        only.backend.gate.set()
        assert answers(clients) == doubled(20)
        assert others[1].ask(infer("m", 500)).status == 200


def test_a_loss_after_a_batch_mates_failure_is_the_first_loss(
    gateway: Gateway, run_dir: Path
) -> None:
    """A request that was run again on account of another one is still sent again when lost."""
    sent: list[int] = []

    def answer(batch_id: int, rows: int, payload: bytes) -> bytes | None:
        sent.append(rows)
        if rows == 2:
            body = {"slug": "model_failed", "message": "one of them"}
            return frames.encode_json(frames.Kind.FAILED, body, frames.BATCH_ID.pack(batch_id))
        if sent.count(1) == 1:
            return None
        values = np.frombuffer(payload, np.float32)[: rows * 2] * 2
        return result(batch_id, rows, values.tobytes())

    rogue = Rogue(run_dir, answer)
    gateway.publish(arm("m", [rogue], max_size=2, max_delay_s=NEVER_S))
    with callers(gateway, 2) as clients:
        send_all(clients, [1, 2])
        assert answers(clients) == [2, 4]
    assert sent[0] == 2
    rogue.stop()


def test_a_replica_merges_no_batch_that_is_to_run_alone(new: NewReplica) -> None:
    """Whichever connection the others come by: a suspect of one gateway endangers no other's."""
    replica = new("shared")
    replica.backend.gate.clear()
    engine = replica.server.engine
    with ExitStack() as stack:
        clients = [stack.enter_context(FrameClient.unix(replica.endpoint.unix)) for _ in range(5)]
        flags = [0, 0, frames.NO_MERGE, 0, frames.NO_MERGE]
        for i, (client, flag) in enumerate(zip(clients, flags, strict=True)):
            client.send_infer(np.full((1, 2), i, np.float32), flags=flag)
            eventually(lambda n=i: replica.backend.running and engine.waiting == n)
        replica.backend.gate.set()
        for i, client in enumerate(clients):
            outputs, _ = client.read_result()
            assert outputs[0].tolist() == [[2 * i, 2 * i]]
    assert replica.backend.runs == [[0], [1, 3], [2], [4]]


def test_the_gateway_marks_suspects(gateway: Gateway, new: NewReplica) -> None:
    """A suspect that waits beside another gateway's batch is not run with it."""
    survivor = new("survivor")
    survivor.backend.gate.clear()
    engine = survivor.server.engine
    with ExitStack() as stack:
        others = [stack.enter_context(FrameClient.unix(survivor.endpoint.unix)) for _ in range(2)]
        for i, other in enumerate(others):
            other.send_infer(np.full((1, 2), 7 + i, np.float32))
            eventually(lambda n=i: survivor.backend.running and engine.waiting == n)
        with lost(gateway, new, 1, [survivor]) as clients:
            eventually(lambda: engine.waiting == 2)
            survivor.backend.gate.set()
            assert answers(clients) == [0]
        for other in others:
            other.read_result()
    assert survivor.backend.runs == [[7], [8], [0]]


def test_unknown_flags_close_the_connection(new: NewReplica) -> None:
    replica = new("strict")
    with FrameClient.unix(replica.endpoint.unix) as client:
        client.send_infer(np.zeros((1, 2), np.float32), flags=2)
        with pytest.raises(EOFError):
            client.read_result()
    assert replica.backend.runs == []


def test_a_batch_stays_within_the_largest_bucket(
    gateway: Gateway, new: NewReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica merges nothing past it; one request alone may have as many rows as allowed."""
    monkeypatch.setattr(links, "BATCHES_IN_FLIGHT", 1)
    only = new("only")
    gateway.publish(arm("m", [only], max_size=8, buckets=(2, 4)))
    batcher = gateway.batcher("m")
    with callers(gateway, 9) as clients:
        with plugged(gateway, only):
            send_all(clients[:8], list(range(8)))
            clients[8].send(infer("m", *range(10, 16)))
            gateway.until(lambda: batcher.queue_depth == 14)
        assert answers(clients) == [*doubled(8), 20]
    assert sorted(len(run) for run in only.backend.runs) == [1, 4, 4, 6]


def paused(gateway: Gateway, then: Callable[[], None]) -> None:
    """The gateway stands still until the requests' 1.5 s are over; `then` happens meanwhile."""

    def stand_still() -> None:
        then()
        threading.Event().wait(2)

    gateway.run(stand_still)


def test_suspects_that_are_too_late_reserve_no_replica(gateway: Gateway, new: NewReplica) -> None:
    only, first = new("only"), new("lost")
    for replica in (only, first):
        replica.backend.gate.clear()
    gateway.publish(arm("m", [first], max_size=2, max_delay_s=NEVER_S))
    batcher = gateway.batcher("m")
    with callers(gateway, 4) as late, callers(gateway, 2) as busy, gateway.connect() as other:
        send_all(late, [0, 1, 2, 3], parameters={"timeout": 1_500_000})
        gateway.until(lambda: batcher.in_flight == 4)
        gateway.publish(arm("m", [first, only]))
        for i, client in enumerate(busy):
            client.send(infer("m", 10 + i))
            gateway.until(lambda i=i: batcher.in_flight == 5 + i)
        gateway.publish(arm("m", [only]), ready=False)
        first.stop()
        gateway.until(lambda: batcher._links.reserved is not None)
        other.send(infer("m", 500))
        gateway.until(lambda: batcher.queue_depth == 5)
        paused(gateway, only.backend.gate.set)
        assert [client.reply().status for client in late] == [504] * 4
        assert [client.reply().status for client in busy] == [200, 200]
        assert other.reply().values == [1000, 1000]


def test_a_version_that_left_answers_a_batch_that_failed_after_a_pause(
    gateway: Gateway, new: NewReplica, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "BATCHES_IN_FLIGHT", 1)
    go = threading.Event()

    def answer(batch_id: int, rows: int, payload: bytes) -> bytes:
        assert go.wait(20)
        values = (np.frombuffer(payload, np.float32)[: rows * 2] * 2).tobytes()
        # Of two rows one comes back: each request is run again, alone.
        return result(batch_id, rows, values[:8], shape=(1, 2))

    rogue = Rogue(run_dir, answer)
    gateway.publish(arm("m", [rogue], max_size=2, max_delay_s=NEVER_S))
    batcher = gateway.batcher("m")
    with callers(gateway, 2) as clients, gateway.connect() as late:
        send_all(clients, [0, 1])
        gateway.until(lambda: batcher.in_flight == 2)
        gateway.publish(arm("m", [rogue], max_size=2))
        late.send(infer("m", 9, parameters={"timeout": 1_500_000}))
        gateway.until(lambda: batcher.queue_depth == 1)
        gateway.publish(arm("m", [new("second")], version="2"))
        paused(gateway, go.set)
        assert late.reply().status == 504
        assert sorted(answers(clients)) == [0.0, 2.0]
    rogue.stop()
