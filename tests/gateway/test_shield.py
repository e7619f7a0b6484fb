"""What the canary fails is answered by stable, and counted against the canary; the breaker."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from serving.control.totals import ArmTotals
from serving.errors import InvalidRequest
from serving.gateway import breaker
from tests.gateway.client import infer
from tests.gateway.harness import Gateway, Replica, ReplicaProcess, eventually
from tests.gateway.models import GIVES_NAN, IS_BAD_INPUT, LOSES_A_ROW, RAISES, ScriptedBackend
from tests.gateway.rollouts import Rollout, answered_by, arm_of
from tests.gateway.test_batches import callers

NEVER_S = 60.0
BATCHES_OF_8 = {"max_size": 8, "max_delay_s": NEVER_S}


@pytest.fixture
def two_canaries(gateway: Gateway, run_dir: Path) -> Iterator[Rollout]:
    with ExitStack() as stack:
        replicas = []
        for name in ("stable-1", "canary-1", "canary-2"):
            replica = Replica(ScriptedBackend(), run_dir, name)
            stack.callback(replica.stop)
            stack.callback(replica.backend.gate.set)
            replicas.append(replica)
        yield Rollout(gateway, *replicas)


@pytest.fixture
def mortal(
    gateway: Gateway, run_dir: Path, processes: Callable[[str], ReplicaProcess]
) -> Iterator[Rollout]:
    """The canary's replica is a process of its own."""
    stable = Replica(ScriptedBackend(), run_dir, "stable-1")
    yield Rollout(gateway, stable, processes("canary-1"))
    stable.backend.gate.set()
    stable.stop()


def timeout(seconds: float) -> str:
    return f"X-Request-Timeout-Ms: {seconds * 1e3:g}"


def fails(rollout: Rollout) -> None:
    rollout.canary.backend.failure = RuntimeError("a bad version")


def ask_in_batches_of_8(rollout: Rollout, values: list[float]) -> list[str]:
    with callers(rollout.gateway, 8) as clients:
        for client, value in zip(clients, values, strict=True):
            client.send(infer("m", value))
        # The reruns of a batch do not fill one; nor does what stable takes over.
        return [answered_by(client.reply()) for client in clients]


def test_a_failure_of_the_canary_is_answered_by_stable(rollout: Rollout) -> None:
    rollout.begin(1.0)
    fails(rollout)
    with rollout.gateway.connect() as client:
        reply = client.ask(infer("m", 3))
        assert answered_by(reply) == "stable"
        assert reply.values == [6, 6]
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed) == (1, 1)
    assert (canary.batches, canary.failed_batches) == (1, 1)
    # What stable answered for the canary was not assigned to it.
    assert rollout.counts().stable == {}
    assert rollout.summary()["shielded"] == 1
    assert rollout.gateway.outcomes("m", "1") == {"success": 1}
    assert rollout.gateway.outcomes("m", "2") == {"shielded": 1}
    # One request, one answer, no error: the failure is in the canary's evidence alone.
    arms = [ArmTotals(requests=rollout.gateway.outcomes("m", v)) for v in ("1", "2")]
    assert [arm.total for arm in arms] == [1, 0]
    assert [arm.errors for arm in arms] == [0, 0]


def test_without_a_shield_the_client_meets_the_failure(rollout: Rollout) -> None:
    rollout.begin(1.0, shield=False)
    fails(rollout)
    with rollout.gateway.connect() as client:
        reply = client.ask(infer("m", 3))
        assert reply.status == 500
        assert (reply.headers["x-arm"], reply.headers["x-model-version"]) == ("canary", "2")
    assert rollout.canary_counts().failed == 1
    assert rollout.summary()["shielded"] == 0
    assert rollout.gateway.outcomes("m", "2") == {"model_failed": 1}


@pytest.mark.parametrize("arm", ["stable", "canary"])
def test_without_a_shield_an_input_that_is_refused_is_a_failure_of_either_arm(
    rollout: Rollout, arm: str
) -> None:
    """Nobody asks the other version whose fault it is: the comparison of both tells."""
    rollout.begin(1.0 - 1e-9 if arm == "canary" else 1e-9, shield=False, breaker_failures=1)
    with rollout.gateway.connect() as client:
        assert client.ask(infer("m", IS_BAD_INPUT)).status == 400
        assert arm_of(client) == arm
    assert rollout.counts().arm(arm).failures == (2, 1, 2, 1)
    # It may be the client's, so it is no reason to send no more.
    assert rollout.summary()["opened"] == 0


def test_in_the_bake_nobody_tells_whose_fault_an_input_is(rollout: Rollout) -> None:
    rollout.begin(1.0, shield=False)
    with rollout.gateway.connect() as client:
        assert client.ask(infer("m", IS_BAD_INPUT)).status == 400
        assert client.ask(infer("m", 1.0)).status == 200
    assert rollout.canary_counts().failures == (1, 0, 1, 0)


def test_where_both_fail_the_client_gets_the_error_of_stable(rollout: Rollout) -> None:
    rollout.begin(1.0)
    with rollout.gateway.connect() as client:
        reply = client.ask(infer("m", RAISES))
        assert reply.status == 500
        assert reply.headers["x-arm"] == "stable"
        assert "version 1" in reply.error
    assert rollout.canary_counts().failed == 1
    assert rollout.counts().stable == {}
    assert rollout.gateway.outcomes("m", "1") == {"model_failed": 1}


def test_a_failure_of_stable_is_not_shielded(rollout: Rollout) -> None:
    rollout.begin(0.0)
    with rollout.gateway.connect() as client:
        assert client.ask(infer("m", RAISES)).status == 500
        assert client.ask(infer("m", IS_BAD_INPUT)).status == 400
        assert client.ask(infer("m", 1)).status == 200
    stable = rollout.stable_counts()
    # What the client did wrong is in no count.
    assert (stable.requests, stable.failed) == (2, 1)
    assert (stable.batches, stable.failed_batches) == (2, 1)


def test_an_input_that_only_the_canary_refuses_is_its_failure(rollout: Rollout) -> None:
    rollout.begin(1.0)
    with rollout.gateway.connect() as client:
        reply = client.ask(infer("m", IS_BAD_INPUT))
        assert reply.status == 400
        assert "version 1" in reply.error
        assert rollout.report()["trials"] == []
        rollout.canary.backend.failure = InvalidRequest("I do not like this")
        assert arm_of(client) == "stable"
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed, canary.failed_batches) == (1, 1, 1)


def test_an_answer_without_json_form_is_a_failure_if_stable_has_one(rollout: Rollout) -> None:
    rollout.limits = BATCHES_OF_8
    rollout.begin(1.0)
    rollout.canary.backend.factor = float("nan")
    # Stable's batches leave with eight rows, too.
    assert ask_in_batches_of_8(rollout, [float(i) for i in range(8)]) == ["stable"] * 8
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed) == (8, 8)
    assert (canary.batches, canary.failed_batches) == (1, 1)


@pytest.mark.parametrize("marker", [RAISES, LOSES_A_ROW])
def test_a_failed_batch_is_one_failed_batch(rollout: Rollout, marker: float) -> None:
    rollout.limits = BATCHES_OF_8
    rollout.begin(1.0, shield=False)
    with callers(rollout.gateway, 8) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", marker if i == 3 else i))
        assert sorted(c.reply().status for c in clients) == [200] * 7 + [500]
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed) == (8, 1)
    # One run and its eight reruns, each alone.
    assert (canary.batches, canary.failed_batches) == (1, 1)
    assert (canary.latency.total, canary.batch_latency.total) == (7, 1)


def test_a_batch_that_fails_whole_is_one_failed_batch(rollout: Rollout) -> None:
    rollout.limits = BATCHES_OF_8
    rollout.begin(1.0, breaker_failures=2)
    fails(rollout)
    assert ask_in_batches_of_8(rollout, [float(i) for i in range(8)]) == ["stable"] * 8
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed) == (8, 8)
    assert (canary.batches, canary.failed_batches) == (1, 1)
    assert rollout.summary()["breaker"] == "closed"


def test_one_answer_of_a_batch_that_cannot_be_written(rollout: Rollout) -> None:
    rollout.limits = BATCHES_OF_8
    rollout.begin(1.0, shield=False)
    with callers(rollout.gateway, 8) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", GIVES_NAN if i == 3 else i))
        assert sorted(c.reply().status for c in clients) == [200] * 7 + [400]
    canary = rollout.canary_counts()
    assert canary.failures == (7, 0, 1, 0)


def test_a_canary_that_hangs(rollout: Rollout) -> None:
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    with callers(rollout.gateway, 3) as clients:
        started = time.monotonic()
        for client in clients:
            client.send(infer("m", 3, headers=[timeout(0.6)]))
        assert [answered_by(c.reply()) for c in clients] == ["stable"] * 3
        assert 0.29 < time.monotonic() - started < 0.6
        # It is given as long as stable would be, before it is counted.
        assert rollout.canary_counts().failed == 0
        rollout.gateway.until(lambda: not list(rollout.gateway.batcher("m", "2").outstanding()))
        canary = rollout.canary_counts()
        assert (canary.requests, canary.failed) == (3, 3)
        # They were in one batch, or waited for it.
        assert canary.failed_batches == canary.batches
        assert canary.batches <= 2
        assert {row["replica"] for row in rollout.report()["trials"]} == {"canary-1"}
    assert rollout.gateway.outcomes("m", "2") == {"shielded": 3}
    assert rollout.gateway.outcomes("m", "1") == {"success": 3}


def test_a_batch_that_hangs_is_one_failed_batch(rollout: Rollout) -> None:
    rollout.limits = BATCHES_OF_8
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    with callers(rollout.gateway, 8) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i, headers=[timeout(1.0)]))
        assert [answered_by(c.reply()) for c in clients] == ["stable"] * 8
        rollout.gateway.until(lambda: not list(rollout.gateway.batcher("m", "2").outstanding()))
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed) == (8, 8)
    assert (canary.batches, canary.failed_batches) == (1, 1)


def test_a_canary_that_answers_after_stable_did_has_not_failed(rollout: Rollout) -> None:
    """Its part of the time is the shield's, and no measure: stable has all of it."""
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    with rollout.gateway.connect() as client:
        assert arm_of(client, timeout(1.0)) == "stable"
        rollout.canary.backend.gate.set()
        eventually(lambda: rollout.canary_counts().requests)
        canary = rollout.canary_counts()
        assert (canary.requests, canary.failed, canary.batches) == (1, 0, 1)
        assert canary.latency.total == 1
    # The client saw one answer.
    assert rollout.gateway.outcomes("m", "2") == {"shielded": 1}
    assert rollout.gateway.outcomes("m", "1") == {"success": 1}


def test_where_stable_has_no_room_the_canary_has_all_the_time(rollout: Rollout) -> None:
    rollout.limits = {"queue_max_rows": 1}
    rollout.begin(1.0, overrides=(("x-arm", "stable", "stable"),))
    gateway = rollout.gateway
    stable = gateway.batcher("m", "1")
    rollout.stable.backend.gate.clear()
    rollout.canary.backend.gate.clear()
    with callers(gateway, 3) as others, gateway.connect() as client:
        for i, other in enumerate(others):
            other.send(infer("m", i, headers=["X-Arm: stable"]))
            gateway.until(lambda n=i + 1: stable.in_flight + stable.queue_depth == n)
        client.send(infer("m", 3, headers=[timeout(1.0)]))
        gateway.until(lambda: [c for c in gateway.batcher("m", "2").outstanding() if c.sent])
        (call,) = gateway.run(lambda: list(gateway.batcher("m", "2").outstanding()))
        gateway.until(lambda: not call.final_deadline, "half of its time is over")
        rollout.canary.backend.gate.set()
        assert answered_by(client.reply()) == "canary"
        rollout.stable.backend.gate.set()
        assert [answered_by(o.reply()) for o in others] == ["stable"] * 3
    assert rollout.summary()["shielded"] == 0
    assert gateway.outcomes("m", "1") == {"success": 3}


def test_a_deadline_that_neither_keeps(rollout: Rollout) -> None:
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    rollout.stable.backend.gate.clear()
    with rollout.gateway.connect() as client:
        started = time.monotonic()
        reply = client.ask(infer("m", 3, headers=[timeout(0.3)]))
        assert reply.status == 504
        assert "version 1" in reply.error
        assert time.monotonic() - started > 0.29
    canary = rollout.canary_counts()
    assert (canary.requests, canary.failed) == (1, 1)
    assert rollout.counts().stable == {}


def test_a_client_that_leaves_while_stable_answers_for_the_canary(rollout: Rollout) -> None:
    rollout.begin(1.0)
    fails(rollout)
    rollout.stable.backend.gate.clear()
    with rollout.gateway.connect() as client:
        client.send(infer("m", 3))
        eventually(lambda: rollout.stable.backend.running)
        client.reset()
        eventually(lambda: rollout.gateway.outcomes("m", "1") == {"cancelled": 1})
    assert rollout.canary_counts().failed == 1


def test_a_killed_canary(mortal: Rollout) -> None:
    canary = mortal.canary
    mortal.limits = {"queue_hold_s": 0.3}
    mortal.begin(1.0)
    canary.command("shut")
    with callers(mortal.gateway, 2) as clients, mortal.gateway.connect() as other:
        for client in clients:
            client.send(infer("m", 3, headers=[timeout(16.0)]))
        mortal.gateway.until(
            lambda: mortal.gateway.batcher("m", "2").in_flight == 2, "they are there"
        )
        canary.signal(signal.SIGKILL)
        started = time.monotonic()
        assert [answered_by(c.reply()) for c in clients] == ["stable"] * 2
        # Not after half of their time: when the replica was lost.
        assert time.monotonic() - started < 7.0
        assert arm_of(other) == "stable"
        mortal.gateway.until(lambda: not list(mortal.gateway.batcher("m", "2").outstanding()))
    counts = mortal.canary_counts()
    assert (counts.requests, counts.failed) == (2, 2)
    assert counts.batches == counts.failed_batches <= 2
    assert set(mortal.counts().canary) == {"canary-1"}


def test_a_lost_connection_is_no_failure(mortal: Rollout) -> None:
    """Stable's requests would wait for it, too."""
    canary = mortal.canary
    mortal.begin(1.0)
    canary.command("shut")
    with mortal.gateway.connect() as client:
        client.send(infer("m", 3))
        batcher = mortal.gateway.batcher("m", "2")
        mortal.gateway.until(lambda: batcher.in_flight == 1, "it is there")
        (link,) = batcher.links.values()
        mortal.gateway.run(link.lost)
        assert answered_by(client.reply()) == "stable"
        canary.command("open")
        eventually(lambda: mortal.canary_counts().requests)
    counts = mortal.canary_counts()
    assert (counts.requests, counts.failed, counts.batches) == (1, 0, 1)


def test_requests_of_a_lost_replica_that_another_answers(two_canaries: Rollout) -> None:
    rollout = two_canaries
    rollout.begin(1.0)
    first, second = rollout.canaries
    for replica in rollout.canaries:
        replica.backend.gate.clear()
    with callers(rollout.gateway, 2) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
            eventually(lambda n=i + 1: first.backend.running + second.backend.running == n)
        first.stop()
        second.backend.gate.set()
        assert [answered_by(c.reply()) for c in clients] == ["canary"] * 2
    counts = rollout.counts()
    assert (counts.arm("canary").requests, counts.arm("canary").failed) == (2, 0)
    assert set(counts.canary) == {"canary-2"}


def test_failures_are_counted_for_the_replica_that_failed(two_canaries: Rollout) -> None:
    rollout = two_canaries
    rollout.begin(1.0)
    rollout.canaries[1].backend.failure = RuntimeError("one bad GPU")
    with rollout.gateway.connect() as client:
        for _ in range(8):
            client.ask(infer("m", 1))
    counts = rollout.counts().canary
    assert counts["canary-1"].failed == 0
    assert counts["canary-2"].failed == counts["canary-2"].requests == 4


class TestBreaker:
    """A canary that fails one batch after the other is cut off before the controller knows."""

    @pytest.fixture
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(breaker, "RETRY_S", 0.3)

    def test_it_opens_and_the_controller_hears_at_once(self, rollout: Rollout) -> None:
        rollout.begin(1.0, breaker_failures=3)
        fails(rollout)
        reports = rollout.gateway.controller.reports
        with rollout.gateway.connect() as client:
            for i in range(6):
                assert arm_of(client) == "stable"
                assert len(rollout.canary.backend.runs) == min(i + 1, 3)
        summary = rollout.summary()
        assert (summary["breaker"], summary["opened"], summary["diverted"]) == ("open", 1, 3)
        counts = rollout.canary_counts()
        assert (counts.requests, counts.failed, counts.failed_batches) == (3, 3, 3)
        # The ticks of this gateway are an hour apart.
        eventually(
            lambda: any(
                row["breaker"] == "open" for r in reports for row in r["rollouts"]["splits"]
            )
        )

    def test_it_lets_one_through_after_a_while(self, rollout: Rollout, soon: None) -> None:
        rollout.begin(1.0, breaker_failures=2)
        fails(rollout)
        runs = rollout.canary.backend.runs
        with rollout.gateway.connect() as client:
            for _ in range(3):
                arm_of(client)
            eventually(lambda: arm_of(client) and len(runs) == 3)
            for _ in range(3):
                arm_of(client)
            assert len(runs) == 3
            rollout.canary.backend.failure = None
            eventually(lambda: arm_of(client) == "canary")
            assert [arm_of(client) for _ in range(3)] == ["canary"] * 3
        assert (rollout.summary()["breaker"], rollout.summary()["opened"]) == ("closed", 1)

    def test_an_answer_from_before_it_opened_does_not_close_it(self, two_canaries: Rollout) -> None:
        rollout = two_canaries
        rollout.limits = {"max_size": 1}
        rollout.begin(1.0, breaker_failures=3)
        first, second = (replica.backend for replica in rollout.canaries)
        first.gate.clear()
        second.gate.clear()
        batcher = rollout.gateway.batcher("m", "2")
        with callers(rollout.gateway, 2) as clients, rollout.gateway.connect() as other:
            for i, client in enumerate(clients):
                client.send(infer("m", i))
                eventually(lambda n=i + 1: first.running + second.running == n)
            # One hangs with a good answer, the other fails whatever comes.
            first.failure = RuntimeError("a bad version")
            first.gate.set()
            eventually(lambda: arm_of(other) and rollout.summary()["breaker"] == "open")
            second.gate.set()
            assert {answered_by(client.reply()) for client in clients} == {"canary", "stable"}
            rollout.gateway.until(lambda: not list(batcher.outstanding()))
        assert (rollout.summary()["breaker"], rollout.summary()["opened"]) == ("open", 1)

    def test_an_answer_in_between_keeps_it_closed(self, rollout: Rollout) -> None:
        rollout.begin(1.0, breaker_failures=2)
        with rollout.gateway.connect() as client:
            for value in (RAISES, 1, RAISES, 1, RAISES):
                client.ask(infer("m", value))
        assert rollout.summary()["opened"] == 0

    def test_requests_that_wait_in_vain_open_it(self, rollout: Rollout) -> None:
        # One of those that wait, or that runs, tells of each run; the others that wait add to them.
        rollout.begin(1.0, breaker_failures=5)
        rollout.canary.backend.gate.clear()
        batcher = rollout.gateway.batcher("m", "2")
        with callers(rollout.gateway, 6) as clients:
            for i, client in enumerate(clients):
                client.send(infer("m", i, headers=[timeout(1.0)]))
                rollout.gateway.until(lambda n=i + 1: batcher.in_flight + batcher.queue_depth == n)
            assert batcher.in_flight == 2
            assert [answered_by(c.reply()) for c in clients] == ["stable"] * 6
        eventually(lambda: rollout.summary()["breaker"] == "open")
        # For the evidence they are as many as the runs that they waited for.
        assert rollout.canary_counts().failed_batches == 2

    @pytest.mark.parametrize("unit", ["header:x-user", "request"])
    def test_one_who_comes_again_does_not_open_it(self, rollout: Rollout, unit: str) -> None:
        """It may be the input, which stable would fail as well."""
        rollout.begin(1.0, unit=unit, breaker_failures=5)
        fails(rollout)
        header = "X-User" if unit != "request" else "X-Request-Id"
        with rollout.gateway.connect() as client:
            for _ in range(8):
                assert arm_of(client, f"{header}: somebody") == "stable"
            assert rollout.summary()["breaker"] == "closed"
            for other in range(4):
                assert arm_of(client, f"{header}: other-{other}") == "stable"
        assert rollout.summary()["breaker"] == "open"
        assert rollout.canary_counts().failed == 5

    def test_where_stable_is_gone_it_keeps_nothing_from_the_canary(self, rollout: Rollout) -> None:
        rollout.limits = {"queue_hold_s": 0.0}
        rollout.begin(1.0, breaker_failures=3)
        fails(rollout)
        gateway = rollout.gateway
        with gateway.connect() as client:
            assert [arm_of(client) for _ in range(3)] == ["stable"] * 3
            assert rollout.summary()["breaker"] == "open"
            rollout.canary.backend.failure = None
            rollout.stable.stop()
            gateway.until(lambda: not gateway.batcher("m", "1").ready)
            assert [arm_of(client) for _ in range(3)] == ["canary"] * 3
        # It was well: the breaker heard, the controller did not.
        assert rollout.summary()["breaker"] == "closed"
        assert rollout.canary_counts().requests == 3

    def test_what_clients_do_wrong_does_not_open_it(self, rollout: Rollout) -> None:
        rollout.begin(1.0, breaker_failures=1)
        with rollout.gateway.connect() as client:
            assert client.ask(infer("m", IS_BAD_INPUT)).status == 400
            assert arm_of(client) == "canary"
        assert rollout.summary()["opened"] == 0


def test_the_end_of_the_gateway_is_nobodys_failure(run_dir: Path) -> None:
    replicas = [Replica(ScriptedBackend(), run_dir, name) for name in ("stable-1", "canary-1")]
    with Gateway(drain_s=0.2) as gateway, gateway.connect() as client:
        rollout = Rollout(gateway, *replicas)
        rollout.begin(1.0)
        rollout.canary.backend.gate.clear()
        client.send(infer("m", 1))
        eventually(lambda: rollout.canary.backend.running)
        gateway.stop()
        assert client.reply().status == 503
        last = gateway.controller.reports[-1]["rollouts"]
    assert last["trials"] == []
    assert last["splits"][0]["shielded"] == 0
    for replica in replicas:
        replica.backend.gate.set()
        replica.stop()
