"""A version that has no replica because nobody asked: requests wait for one, within bounds."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving.core.routing import Arm, Endpoint
from tests.gateway.client import get, infer
from tests.gateway.harness import NODE, Gateway, Replica, arm, eventually
from tests.gateway.test_deadlines import by_parameter


def sleeping(replica: Replica, **limits: Any) -> Arm:
    """The version of `replica`, which is not there yet. It would not wait for it by itself."""
    return arm("m", [], of=replica.signature, **{"wake_queue": 4, "queue_hold_s": 0.0, **limits})


def test_a_request_wakes_it_and_is_answered(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(sleeping(replica))
    gateway.until(lambda: gateway.controller.reports, "a first report")
    with gateway.connect() as client, ExitStack() as stack:
        for path in ("/v2/models/m/ready", "/v2/health/ready"):
            assert client.ask(get(path)).status == 200
        callers = [stack.enter_context(gateway.connect()) for _ in range(3)]
        gateway.run(gateway.controller.reports.clear)
        for number, caller in enumerate(callers):
            caller.send(infer("m", number))
        # The controller is told at once.
        row = eventually(
            lambda: next(
                (m for r in gateway.controller.reports for m in r["models"] if m["waiting"]), None
            )
        )
        assert (row["model"], row["version"], row["replicas_connected"]) == ("m", "1", 0)
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 3)
        gateway.publish(arm("m", [replica], wake_queue=4, queue_hold_s=0.0))
        assert [caller.reply().values for caller in callers] == [[0, 0], [2, 2], [4, 4]]
    assert gateway.outcomes("m") == {"success": 3}


def test_more_than_the_wake_up_queue_is_refused(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(sleeping(replica, wake_queue=2))
    with ExitStack() as stack:
        callers = [stack.enter_context(gateway.connect()) for _ in range(2)]
        for caller in callers:
            caller.send(infer("m", 1))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 2)
        with gateway.connect() as client:
            reply = client.ask(infer("m", 1))
        assert reply.status == 503
        assert "asleep" in reply.error
        assert "at most 2 requests" in reply.error
        assert int(reply.headers["retry-after"]) >= 1
        gateway.publish(arm("m", [replica], wake_queue=2))
        assert all(caller.reply().status == 200 for caller in callers)


def test_rows_are_bounded_too(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(sleeping(replica, queue_max_rows=1))
    with gateway.connect() as first, gateway.connect() as second:
        first.send(infer("m", 1))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 1)
        assert second.ask(infer("m", 1)).status == 503
        gateway.publish(arm("m", [replica], wake_queue=4))
        assert first.reply().status == 200


def test_nobody_waits_past_the_deadline(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(sleeping(replica))
    with gateway.connect() as client:
        assert client.ask(by_parameter(0.1)).status == 504
    assert gateway.run(lambda: gateway.batcher("m").waiting) == 0


def test_one_that_falls_asleep_and_wakes_again(gateway: Gateway, replica: Replica) -> None:
    awake = arm("m", [replica], wake_queue=4, queue_hold_s=0.0)
    gateway.publish(awake)
    with gateway.connect() as client:
        assert client.ask(infer("m", 1)).values == [2, 2]
        gateway.publish(sleeping(replica))
        gateway.until(lambda: not gateway.batcher("m").links, "its link is gone")
        client.send(infer("m", 2))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 1)
        gateway.publish(awake)
        assert client.reply().values == [4, 4]


def test_one_that_may_sleep_no_more_has_time_to_come(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(sleeping(replica))
    batcher = gateway.batcher("m")
    long_ago = time.monotonic() - 1000.0
    gateway.run(lambda: setattr(batcher, "_down_since", long_ago))
    # From now on it is to be there: what waits is held, as where all replicas are replaced.
    gateway.publish(sleeping(replica, wake_queue=0, queue_hold_s=15.0), ready=False)
    with gateway.connect() as client:
        client.send(infer("m", 1))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 1)
        gateway.publish(arm("m", [replica]))
        assert client.reply().status == 200


def test_a_version_that_is_replaced_hands_over_what_waits_for_it(
    gateway: Gateway, replica: Replica
) -> None:
    gateway.publish(sleeping(replica))
    first = gateway.batcher("m")
    with gateway.connect() as any_version, gateway.connect() as this_version:
        any_version.send(infer("m", 1))
        this_version.send(infer("m/versions/1", 1))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 2)
        gateway.publish(arm("m", [replica], version="2"))
        reply = any_version.reply()
        assert (reply.status, reply.headers["x-model-version"]) == (200, "2")
        assert reply.values == [2, 2]
        # Nobody will ever answer the other one.
        reply = this_version.reply()
        assert reply.status == 503
        assert "version 1: no replica is ready" in reply.error
    assert gateway.run(lambda: first.closed)
    assert gateway.outcomes("m", "2") == {"success": 1}


def test_no_request_is_handed_to_a_version_that_reads_it_otherwise(
    gateway: Gateway, replica: Replica
) -> None:
    signature = replica.signature
    renamed = replace(signature.inputs[0], name="another")
    other = replace(signature, inputs=(renamed, *signature.inputs[1:]))
    gateway.publish(sleeping(replica))
    with gateway.connect() as client:
        client.send(infer("m", 1))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 1)
        gateway.publish(replace(sleeping(replica, version="2"), signature=other))
        assert client.reply().status == 503


def test_one_that_leaves_while_it_wakes_is_waited_for_a_while(
    gateway: Gateway, replica: Replica, run_dir: Path
) -> None:
    nowhere = Endpoint("r9", NODE, unix=str(run_dir / "nowhere.sock"))
    waking = replace(sleeping(replica, queue_hold_s=0.05), endpoints=(nowhere,))
    gateway.publish(waking, ready=False)
    first = gateway.batcher("m")
    with gateway.connect() as client:
        client.send(infer("m/versions/1", 1))
        eventually(lambda: gateway.run(lambda: gateway.batcher("m").waiting) == 1)
        gateway.publish(arm("m", [replica], version="2"))
        assert client.reply().status == 503
    gateway.until(lambda: first.closed)
