"""What a gateway tells of epochs that are over, and until when."""

from __future__ import annotations

import pytest

from serving.errors import InvalidRequest
from serving.gateway import epochs
from tests.gateway.client import Client, infer
from tests.gateway.harness import eventually
from tests.gateway.rollouts import Rollout, answered_by, arm_of

FEEDBACK = {"window_s": 600.0}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over is told once more, and then no more."""
    monkeypatch.setattr(epochs, "KEEP_S", 0.0)


def hear(rollout: Rollout, reports: int = 2) -> None:
    """The controller has that many reports."""
    for _ in range(reports):
        rollout.gateway.run(rollout.gateway.server.routes.heard)


def told(rollout: Rollout) -> set[int]:
    report = rollout.report()
    return {row["epoch"] for row in (*report["trials"], *report["shadows"])}


def held(rollout: Rollout, client: Client) -> None:
    """A request runs at the canary until its gate opens."""
    rollout.canary.backend.gate.clear()
    client.send(infer("m", 1))
    eventually(lambda: rollout.canary.backend.running)


def test_an_epoch_is_told_until_the_controller_has_surely_saved_it(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs, "KEEP_S", 3600.0)
    with rollout.gateway.connect() as client:
        for epoch, weight in enumerate((0.0, 0.0, 1.0), 1):
            rollout.begin(weight, epoch, shadow=1.0 - weight, compare={"kind": "exact"})
            arm_of(client)
        rollout.gateway.until(lambda: not rollout.gateway.batcher("m", "2").in_flight)
        hear(rollout, 3)
        assert told(rollout) == {1, 2, 3}
        monkeypatch.setattr(epochs, "KEEP_S", 0.0)
        hear(rollout, 1)
        assert told(rollout) == {3}
        arm_of(client)
    assert rollout.canary_counts(3).requests == 2


def test_an_epoch_with_a_request_on_its_way_is_not_over(rollout: Rollout) -> None:
    with rollout.gateway.connect() as client:
        rollout.begin(1.0, 1)
        held(rollout, client)
        rollout.begin(0.5, 2)
        hear(rollout, 3)
        rollout.canary.backend.gate.set()
        assert answered_by(client.reply()) == "canary"
        assert rollout.canary_counts(1).requests == 1
        hear(rollout)
        assert told(rollout) == set()


def test_an_epoch_with_a_request_that_stable_is_asked_about_is_not_over(rollout: Rollout) -> None:
    with rollout.gateway.connect() as client:
        rollout.begin(1.0, 1)
        held(rollout, client)
        rollout.canary.backend.failure = InvalidRequest("I do not like this")
        rollout.stable.backend.gate.clear()
        rollout.canary.backend.gate.set()
        eventually(lambda: rollout.stable.backend.running)
        rollout.begin(0.5, 2)
        hear(rollout, 3)
        rollout.stable.backend.gate.set()
        assert answered_by(client.reply()) == "stable"
        assert rollout.canary_counts(1).failed == 1
        hear(rollout)
        assert told(rollout) == set()


def test_an_epoch_with_a_copy_on_its_way_is_not_over(rollout: Rollout) -> None:
    with rollout.gateway.connect() as client:
        rollout.begin(0.0, 1, shadow=1.0, compare={"kind": "exact"})
        rollout.canary.backend.gate.clear()
        assert arm_of(client) == "stable"
        eventually(lambda: rollout.canary.backend.running)
        rollout.begin(0.0, 2)
        hear(rollout, 3)
        rollout.canary.backend.gate.set()
        rollout.gateway.until(lambda: not rollout.gateway.batcher("m", "2").in_flight)
        assert rollout.counts(1).pairs == 1
        hear(rollout)
        assert told(rollout) == set()


def test_an_epoch_whose_labels_may_come_is_not_over(rollout: Rollout) -> None:
    with rollout.gateway.connect() as client:
        rollout.begin(1.0, 1, feedback=FEEDBACK)
        arm_of(client)
        rollout.begin(0.5, 2, feedback=FEEDBACK)
        hear(rollout, 3)
    assert told(rollout) == {1}
