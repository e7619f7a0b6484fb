"""What a gateway tells of the device time behind its answers."""

from __future__ import annotations

from serving.gateway.usage import UsageMeter
from tests.gateway.client import infer
from tests.gateway.harness import Gateway, Replica, arm
from tests.gateway.models import GIVES_NAN, RAISES


def test_totals_by_replica_tenant_and_kind() -> None:
    meter = UsageMeter()
    meter.add("a", "default", "direct", 100, 2)
    meter.add("a", "default", "direct", 50, 1)
    meter.add("a", "", "shadow", 7, 1)
    meter.add("b", "default", "failed", 1, 1)
    assert {row["replica"]: row["rows"] for row in meter.report()} == {
        "a": [["default", "direct", 150, 3], ["", "shadow", 7, 1]],
        "b": [["default", "failed", 1, 1]],
    }


def test_a_replica_that_left_is_told_of_for_a_minute() -> None:
    clock = [0.0]
    meter = UsageMeter(monotonic=lambda: clock[0])
    meter.add("a", "default", "direct", 100, 2)
    began = meter.report()[0]["began"]
    for clock[0] in (10.0, 65.0):
        meter.forget([])
        assert len(meter.report()) == 1
    meter.forget(["a"])
    clock[0] = 130.0
    meter.forget([])
    assert len(meter.report()) == 1, "it was back meanwhile"
    clock[0] = 200.0
    meter.forget([])
    assert meter.report() == []
    # If it comes back after all, its totals begin anew, and say so.
    meter.add("a", "default", "direct", 1, 1)
    assert meter.report()[0]["began"] > began


def test_every_run_is_charged_once(gateway: Gateway, replica: Replica) -> None:
    """What gateways tell and what the replica counts is the same, to the nanosecond."""
    gateway.publish(arm("m", [replica]))
    with gateway.connect() as client:
        for request in [infer("m", 1), infer("m", 1, 2), infer("m", GIVES_NAN), infer("m", RAISES)]:
            assert client.ask(request).status
    [entry] = gateway.run(gateway.server.report)["usage"]
    assert entry["replica"] == replica.endpoint.replica
    totals = {(tenant, kind): (ns, requests) for tenant, kind, ns, requests in entry["rows"]}
    assert {source: requests for source, (_, requests) in totals.items()} == {
        ("default", "direct"): 2,
        # It ran, but its answer cannot be written as JSON.
        ("default", "failed"): 1,
    }
    usage = replica.server.engine.usage
    assert sum(ns for ns, _ in totals.values()) == usage.answered_ns > 0
    assert usage.failed_ns > 0
    assert usage.padding_ns == 0
