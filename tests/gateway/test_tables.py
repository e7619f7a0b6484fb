"""Route tables that change under load: versions and replicas that come, leave and come back."""

from __future__ import annotations

import threading

from tests.gateway.client import Client, get, infer
from tests.gateway.harness import Gateway, NewReplica, Replica, arm, eventually
from tests.gateway.models import RAISES
from tests.gateway.test_batches import callers, plugged
from tests.gateway.test_processes import Load

V2 = "sha256:" + "2" * 64


def holds(gateway: Gateway, client: Client, replica: Replica, value: float = 1) -> None:
    """`client` has a request at the model of `replica`, which is shut."""
    replica.backend.gate.clear()
    client.send(infer("m", value))
    eventually(lambda: replica.backend.running)


def test_a_new_version_takes_over_without_a_failure(gateway: Gateway, new: NewReplica) -> None:
    arms = [arm("m", [new(f"v{v}")], version=str(v)) for v in (1, 2)]
    gateway.publish(arms[0])
    with Load(gateway) as load:
        for _ in range(3):
            load.more(100)
            gateway.publish(*arms)
            load.more(50)
            gateway.publish(*arms, default={"m": "2"})
            load.more(50)
            gateway.publish(arms[1])
            load.more(100)
            gateway.publish(*arms)
            gateway.publish(arms[0])
    assert load.wrong == []


def test_a_version_that_leaves_finishes_what_it_has(gateway: Gateway, new: NewReplica) -> None:
    first, second = new("v1"), new("v2")
    old, young = arm("m", [first], version="1"), arm("m", [second], version="2")
    gateway.publish(old)
    batcher = gateway.batcher("m")
    with callers(gateway, 5) as clients:
        holds(gateway, clients[0], first)
        for i, client in enumerate(clients[1:]):
            client.send(infer("m", 10 + i))
        gateway.until(lambda: batcher.queue_depth + batcher.in_flight == 5)
        gateway.publish(young)
        with gateway.connect() as client:
            assert client.ask(infer("m", 5)).headers["x-model-version"] == "2"
            assert client.ask(get("/v2/models/m/versions/1")).status == 404
        assert not batcher.closed
        first.backend.gate.set()
        assert [c.reply().values[0] for c in clients] == [2, 20, 22, 24, 26]
        gateway.until(lambda: batcher.closed)
        assert gateway.run(lambda: batcher.links) == {}
    eventually(lambda: not first.server._connections, "the replica has no connections left")
    # The next table forgets it.
    gateway.publish(young)
    assert batcher not in gateway.run(lambda: list(gateway.server.routes.batchers()))


def test_a_failed_batch_of_a_leaving_version_is_run_again(
    gateway: Gateway, new: NewReplica
) -> None:
    first, second = new("v1"), new("v2")
    gateway.publish(arm("m", [first], max_size=4, max_delay_s=60))
    batcher = gateway.batcher("m")
    first.backend.gate.clear()
    with callers(gateway, 4) as clients:
        for client, value in zip(clients, (1, 2, RAISES, 4), strict=True):
            client.send(infer("m", value))
        gateway.until(lambda: batcher.in_flight == 4)
        gateway.publish(arm("m", [second], version="2"))
        first.backend.gate.set()
        assert [c.reply().status for c in clients] == [200, 200, 500, 200]
    gateway.until(lambda: batcher.closed)


def test_a_leaving_version_that_lost_its_replicas(gateway: Gateway, new: NewReplica) -> None:
    """What waits is answered in the end, and then nothing of the version is left."""
    first, second = new("v1"), new("v2")
    gateway.publish(arm("m", [first], queue_hold_s=1.5))
    batcher = gateway.batcher("m")
    first.stop()
    gateway.until(lambda: not batcher.ready)
    with callers(gateway, 2) as clients:
        # Those that name no version would be handed to the next one.
        clients[0].send(infer("m/versions/1", 1))
        clients[1].send(infer("m/versions/1", 1, parameters={"timeout": 400_000}))
        gateway.until(lambda: batcher.queue_depth == 2)
        gateway.publish(arm("m", [second], version="2"))
        assert clients[1].reply().status == 504
        assert clients[0].reply().status == 503
    gateway.until(lambda: batcher.closed)


def test_a_replica_that_leaves_finishes_its_batch(gateway: Gateway, new: NewReplica) -> None:
    first, second = new("a"), new("b")
    gateway.publish(arm("m", [first]))
    batcher = gateway.batcher("m")
    with gateway.connect() as client, gateway.connect() as other:
        holds(gateway, client, first)
        gateway.publish(arm("m", [second]))
        assert other.ask(infer("m", 3)).values == [6, 6]
        assert second.backend.seen == [3]
        assert gateway.run(lambda: len(batcher.links)) == 2
        first.backend.gate.set()
        assert client.reply().values == [2, 2]
        gateway.until(lambda: len(batcher.links) == 1)


def test_a_replica_that_leaves_and_comes_back_while_it_drains(
    gateway: Gateway, new: NewReplica
) -> None:
    only = new("a")
    gateway.publish(arm("m", [only]))
    batcher = gateway.batcher("m")
    (link,) = gateway.run(lambda: list(batcher.links.values()))
    with gateway.connect() as client, gateway.connect() as other:
        holds(gateway, client, only)
        gateway.publish(arm("m", [], of=only.signature))
        other.send(infer("m", 3))
        gateway.until(lambda: batcher.queue_depth == 1)
        gateway.publish(arm("m", [only]))
        only.backend.gate.set()
        assert client.reply().values == [2, 2]
        assert other.reply().values == [6, 6]
        assert gateway.run(lambda: list(batcher.links.values())) == [link]
        assert link.up


def test_a_replica_that_comes_back_in_the_turn_in_which_it_drained(
    gateway: Gateway, new: NewReplica
) -> None:
    only = new("a")
    gateway.publish(arm("m", [only]))
    batcher = gateway.batcher("m")
    (link,) = gateway.run(lambda: list(batcher.links.values()))
    with gateway.connect() as client:
        holds(gateway, client, only)
        gateway.run(link.drain)
        ended = threading.Event()
        done = batcher.batch_done

        def undrain_after(*args: object) -> None:
            done(*args)
            link.undrain()
            ended.set()

        batcher.batch_done = undrain_after  # type: ignore[method-assign]
        only.backend.gate.set()
        assert client.reply().values == [2, 2]
        assert ended.wait(10)
        assert client.ask(infer("m", 2)).values == [4, 4]
        assert link.up


def test_replaced_replicas_serve_until_one_of_the_new_is_connected(
    gateway: Gateway, new: NewReplica
) -> None:
    """The moment between the new table and the new connections is nobody's outage."""
    old, young = new("old"), new("young")
    young.stop()
    gateway.publish(arm("m", [old], max_size=4))
    batcher = gateway.batcher("m")
    gateway.publish(arm("m", [young], max_size=8), ready=False)
    with gateway.connect() as client:
        assert client.ask(get("/v2/health/ready")).status == 200
        assert client.ask(infer("m", 1)).values == [2, 2]
        # The old replica still takes batches of its own size only.
        refused = client.ask(infer("m", *range(5)))
        assert refused.status == 400
        assert "1 to 4" in refused.error
        again = new("young")
        gateway.until(lambda: list(batcher.links) == [again.endpoint], "the old link is gone")
        assert client.ask(infer("m", *range(5))).status == 200
    assert old.backend.seen == [1]
    assert len(again.backend.seen) == 5


def test_a_replaced_replica_that_ends_is_not_reconnected_to(
    gateway: Gateway, new: NewReplica
) -> None:
    old, young = new("old"), new("young")
    young.stop()
    gateway.publish(arm("m", [old]))
    batcher = gateway.batcher("m")
    gateway.publish(arm("m", [young]), ready=False)
    assert gateway.run(lambda: batcher.ready)
    old.stop()
    gateway.until(lambda: list(batcher.links) == [young.endpoint], "the old link is gone")
    assert not gateway.run(lambda: batcher.ready)
    new("old")
    with gateway.connect() as client:
        client.send(infer("m", 1))
        gateway.until(lambda: batcher.queue_depth == 1)
        again = new("young")
        assert client.reply().values == [2, 2]
    assert again.backend.seen == [1]


def test_a_replaced_replica_that_is_listed_again_stays(gateway: Gateway, new: NewReplica) -> None:
    old, young = new("old"), new("young")
    young.stop()
    gateway.publish(arm("m", [old]))
    batcher = gateway.batcher("m")
    (link,) = gateway.run(lambda: list(batcher.links.values()))
    gateway.publish(arm("m", [young]), ready=False)
    gateway.publish(arm("m", [old]))
    assert gateway.run(lambda: list(batcher.links.values())) == [link]
    with gateway.connect() as client:
        assert client.ask(infer("m", 1)).values == [2, 2]


def test_a_replica_removed_before_it_was_reached(gateway: Gateway, new: NewReplica) -> None:
    gone, there = new("a"), new("b")
    gone.stop()
    gateway.publish(arm("m", [gone, there]), ready=False)
    batcher = gateway.batcher("m")
    gateway.until(lambda: batcher.ready)
    gateway.publish(arm("m", [there]))
    assert gateway.run(lambda: len(batcher.links)) == 1


def test_a_replica_restarted_elsewhere_under_its_name(gateway: Gateway, new: NewReplica) -> None:
    first, second = new("a"), new("b")
    gateway.publish(arm("m", [first]))
    moved = type(second.endpoint)("a", second.endpoint.node, second.endpoint.unix)
    second.endpoint = moved
    first.stop()
    gateway.publish(arm("m", [second]))
    with gateway.connect() as client:
        assert client.ask(infer("m", 3)).values == [6, 6]
    assert second.backend.seen == [3]


def test_a_version_that_comes_back_goes_on_counting(gateway: Gateway, new: NewReplica) -> None:
    first, second = new("v1"), new("v2")
    old, young = arm("m", [first], version="1"), arm("m", [second], version="2")
    gateway.publish(old)
    with gateway.connect() as client:
        for _ in range(3):
            assert client.ask(infer("m", 1)).status == 200
        gateway.publish(young)
        assert client.ask(infer("m", 1)).status == 200
        # It is reported while it is away, too.
        report = gateway.run(gateway.server.report)
        counts = {m["version"]: m["requests"].get("success") for m in report["models"]}
        assert counts == {"1": 3, "2": 1}
        gateway.publish(old)
        assert client.ask(infer("m", 1)).status == 200
    report = gateway.run(gateway.server.report)
    (entry,) = (m for m in report["models"] if m["version"] == "1")
    assert entry["requests"] == {"success": 4}
    assert sum(entry["latency"]["counts"]) == 4
    assert entry["replicas_connected"] == 1
    assert entry["queue_depth"] == entry["in_flight"] == 0


def test_a_version_that_comes_back_while_it_drains(gateway: Gateway, new: NewReplica) -> None:
    first, second = new("v1"), new("v2")
    old, young = arm("m", [first], version="1"), arm("m", [second], version="2")
    gateway.publish(old)
    with gateway.connect() as client, gateway.connect() as other:
        holds(gateway, client, first)
        gateway.publish(young)
        gateway.publish(old)
        first.backend.gate.set()
        assert client.reply().values == [2, 2]
        assert other.ask(infer("m", 2)).values == [4, 4]
    assert gateway.outcomes("m") == {"success": 2}


def test_settings_that_change_in_place(gateway: Gateway, new: NewReplica) -> None:
    """Same version and digest: queue and connections stay."""
    only = new("a")
    gateway.publish(arm("m", [only]))
    batcher = gateway.batcher("m")
    with gateway.connect() as client:
        gateway.publish(arm("m", [only], max_size=2, role="canary"))
        assert gateway.batcher("m") is batcher
        assert client.ask(infer("m", 1)).headers["x-arm"] == "canary"
        assert client.ask(infer("m", 1, 2, 3)).status == 400
        gateway.publish(arm("m", [only], digest=V2), ready=False)
        assert gateway.batcher("m") is not batcher


def test_a_shorter_queue_holds_from_the_next_request_on(gateway: Gateway, new: NewReplica) -> None:
    only = new("a")
    gateway.publish(arm("m", [only]))
    batcher = gateway.batcher("m")
    with callers(gateway, 5) as clients:
        assert clients[0].ask(infer("m", 1)).status == 200
        gateway.publish(arm("m", [only], queue_max_rows=2))
        with plugged(gateway, only):
            for i, client in enumerate(clients[:2]):
                client.send(infer("m", 1))
                gateway.until(lambda n=i: batcher.queue_depth == n + 1)
            assert clients[2].ask(infer("m", 1)).status == 429
        assert [c.reply().status for c in clients[:2]] == [200, 200]


def test_an_older_table_is_ignored(gateway: Gateway, new: NewReplica) -> None:
    gateway.publish(arm("m", [new("a")]))
    table = gateway.server.routes.table
    gateway.publish(arm("n", [new("b")]))
    gateway.run(lambda: gateway.server.routes.apply(table))
    with gateway.connect() as client:
        assert client.ask(infer("n", 1)).status == 200
        assert client.ask(infer("m", 1)).status == 404


def test_without_a_controller_the_last_table_stays(gateway: Gateway, new: NewReplica) -> None:
    only = new("a")
    gateway.publish(arm("m", [only]))
    gateway.controller.away = True
    with gateway.connect() as client:
        # The poll that was under way still brings this one; the next poll fails.
        gateway.publish(arm("m", [only], role="last"))
        assert client.ask(infer("m", 1)).headers["x-arm"] == "last"
        assert gateway.server.alive
        gateway.controller.away = False
        gateway.publish(arm("m", [only], role="next"))
        assert client.ask(infer("m", 1)).headers["x-arm"] == "next"


def test_a_new_table_is_confirmed_at_once(gateway: Gateway) -> None:
    """By itself this gateway reports once an hour."""

    def confirmed() -> bool:
        reports = gateway.controller.reports
        return bool(reports) and reports[-1]["revision"] == gateway.server.routes.table.revision

    for _ in range(2):
        gateway.publish()
        eventually(confirmed, "a report of the new table")
