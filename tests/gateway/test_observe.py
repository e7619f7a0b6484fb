"""What the arms predict: counted for drift, and joined with the labels that come later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.client import Client, Reply, body, infer, post
from tests.gateway.harness import Gateway, Replica, eventually
from tests.gateway.models import RAISES, ScriptedBackend, signature
from tests.gateway.rollouts import Rollout, answered_by
from tests.gateway.test_batches import callers

SCORES = signature({"x": ("FP32", (-1, 4))}, {"p": ("FP32", (-1, 4))})
NUMBER = signature({"x": ("FP32", (-1, 1))}, {"y": ("FP32", (-1, 1))})
FEEDBACK = {"window_s": 600.0}


@pytest.fixture
def scored(gateway: Gateway, run_dir: Path) -> Iterator[Rollout]:
    """Two versions of a model with four classes, of which the largest input is chosen."""
    replicas = [Replica(ScriptedBackend(SCORES), run_dir, n) for n in ("stable-1", "canary-1")]
    yield Rollout(gateway, *replicas)
    for replica in replicas:
        replica.backend.gate.set()
        replica.stop()


def of_class(*classes: int) -> bytes:
    """The body of a request with a row for each of these classes."""
    return body(*[[1.0 if i == chosen else 0.0 for i in range(4)] for chosen in classes])


def ask(client: Client, *classes: int, request_id: str = "") -> Reply:
    headers = [f"X-Request-Id: {request_id}"] if request_id else []
    reply = client.ask(post("/v2/models/m/infer", of_class(*classes), *headers))
    answered_by(reply)
    return reply


class TestPredictions:
    def test_classes_are_counted_by_arm_and_epoch(self, scored: Rollout) -> None:
        with scored.gateway.connect() as client:
            scored.begin(0.0, epoch=1, observe=True)
            for chosen in (0, 1, 1, 3):
                ask(client, chosen)
            scored.begin(1.0, epoch=2, observe=True)
            ask(client, 2, 2, 0)
        assert scored.stable_counts(1).predictions == {"0": 1, "1": 2, "3": 1}
        assert scored.canary_counts(2).predictions == {"0": 1, "2": 2}

    def test_members_of_a_batch(self, scored: Rollout) -> None:
        scored.limits = {"max_size": 8, "max_delay_s": 60.0}
        scored.begin(1.0, observe=True)
        with callers(scored.gateway, 4) as clients:
            for i, client in enumerate(clients):
                client.send(post("/v2/models/m/infer", of_class(i, 3)))
            assert [answered_by(c.reply()) for c in clients] == ["canary"] * 4
        counts = scored.canary_counts()
        assert counts.predictions == {"0": 1, "1": 1, "2": 1, "3": 5}
        assert (counts.requests, counts.batches) == (4, 1)

    def test_who_is_not_analysed_is_not_counted(self, scored: Rollout) -> None:
        scored.limits = {"max_size": 4, "max_delay_s": 60.0}
        scored.begin(1.0, observe=True, overrides=(("x-arm", "canary", "canary"),))
        with callers(scored.gateway, 4) as clients:
            for i, client in enumerate(clients):
                headers = ["X-Arm: canary"] if i in (0, 2) else []
                client.send(post("/v2/models/m/infer", of_class(i), *headers))
            assert [answered_by(c.reply()) for c in clients] == ["canary"] * 4
        assert scored.canary_counts().predictions == {"1": 1, "3": 1}

    def test_what_failed_is_not_counted(self, scored: Rollout) -> None:
        scored.begin(1.0, observe=True, shield=False)
        with scored.gateway.connect() as client:
            failing = post("/v2/models/m/infer", body([RAISES, 0.0, 0.0, 0.0]))
            assert client.ask(failing).status == 500
            ask(client, 1)
        assert scored.canary_counts().predictions == {"1": 1}

    def test_numbers_are_counted_in_bins(self, gateway: Gateway, run_dir: Path) -> None:
        replicas = [Replica(ScriptedBackend(NUMBER), run_dir, n) for n in ("s", "c")]
        rollout = Rollout(gateway, *replicas)
        rollout.begin(1.0, observe=True)
        with gateway.connect() as client:
            for value in (0.11, 0.12, 2.0):
                client.ask(infer("m", [value]))
        assert rollout.canary_counts().predictions == {"0.2": 2, "4": 1}
        for replica in replicas:
            replica.stop()

    def test_nothing_is_counted_unasked(self, scored: Rollout) -> None:
        scored.begin(1.0)
        with scored.gateway.connect() as client:
            ask(client, 1)
        assert scored.canary_counts().predictions == {}

    def test_an_output_that_does_not_exist_is_said(
        self, scored: Rollout, caplog: pytest.LogCaptureFixture
    ) -> None:
        scored.begin(1.0, observe=True, feedback={**FEEDBACK, "output": "q"})
        with scored.gateway.connect() as client:
            ask(client, 1)
        assert "rollout-1: predictions are not observed: the model has no output 'q'" in caplog.text
        assert scored.canary_counts().requests == 1


class TestFeedback:
    def join(self, rollout: Rollout, *items: tuple[str, Any]) -> list[str]:
        labels = [{"request_id": request_id, "label": label} for request_id, label in items]
        return rollout.gateway.run(lambda: rollout.gateway.server.routes.feedback(labels))

    def test_labels_are_counted_where_the_request_was_served(self, scored: Rollout) -> None:
        with scored.gateway.connect() as client:
            scored.begin(0.0, epoch=1, feedback=FEEDBACK)
            ids = [ask(client, c).headers["x-request-id"] for c in (0, 1, 2)]
            scored.begin(1.0, epoch=2, feedback=FEEDBACK)
            ask(client, 3, request_id="mine")
        known = self.join(scored, (ids[0], 0), (ids[1], 2), (ids[2], "2"), ("mine", 0), ("no", 1))
        assert known == [*ids, "mine"]
        assert scored.stable_counts(1).labels == (3, 1)
        assert scored.canary_counts(2).labels == (1, 1)
        # No predictions were asked for.
        assert scored.canary_counts(2).predictions == {}

    def test_a_label_that_comes_again_counts_once(self, scored: Rollout) -> None:
        scored.begin(1.0, feedback=FEEDBACK)
        with scored.gateway.connect() as client:
            ask(client, 1, request_id="a")
        for _ in range(3):
            assert self.join(scored, ("a", 2), ("a", 1)) == ["a", "a"]
        assert scored.canary_counts().labels == (1, 1)

    def test_one_row_of_a_request_is_judged(self, scored: Rollout) -> None:
        scored.begin(1.0, feedback=FEEDBACK)
        ids = [f"id-{i}" for i in range(40)]
        with scored.gateway.connect() as client:
            for request_id in ids:
                ask(client, 0, 1, request_id=request_id)
        assert self.join(scored, *((i, [0, 3]) for i in ids)) == ids
        known, wrong = scored.canary_counts().labels
        assert known == 40
        # Half of the rows are wrong; five standard deviations.
        assert 4 < wrong < 36

    @pytest.mark.parametrize("label", ["cat", None, [1, 2], {"class": 1}, 0.5, []])
    def test_a_label_that_does_not_fit_is_left_out_and_said(
        self, scored: Rollout, label: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        scored.begin(1.0, feedback=FEEDBACK)
        with scored.gateway.connect() as client:
            ask(client, 1, request_id="a")
        assert self.join(scored, ("a", label)) == ["a"]
        assert scored.canary_counts().labels == (0, 0)
        assert "the label of request a is left out" in caplog.text

    def test_only_the_latest_are_remembered(self, scored: Rollout) -> None:
        scored.begin(1.0, feedback={**FEEDBACK, "max_entries": 3})
        with scored.gateway.connect() as client:
            for i in range(5):
                ask(client, 1, request_id=f"id-{i}")
        known = self.join(scored, *((f"id-{i}", 1) for i in range(5)))
        assert known == ["id-2", "id-3", "id-4"]
        assert scored.summary()["forgotten"] == 2

    def test_old_answers_are_forgotten(self, scored: Rollout) -> None:
        scored.begin(1.0, feedback=FEEDBACK)
        with scored.gateway.connect() as client:
            ask(client, 1, request_id="old")
            scored.begin(1.0, feedback={"window_s": 0.001})
            eventually(lambda: self.join(scored, ("old", 1)) == [])

    def test_what_stable_answered_for_the_canary_is_not_joined(self, scored: Rollout) -> None:
        scored.begin(1.0, feedback=FEEDBACK)
        scored.canary.backend.failure = RuntimeError("a bad version")
        with scored.gateway.connect() as client:
            ask(client, 1, request_id="a")
        assert self.join(scored, ("a", 1)) == []

    def test_a_compressed_reply(self, gateway: Gateway, run_dir: Path) -> None:
        """Its id is written when a thread has compressed it."""
        wide = signature({"x": ("FP32", (-1, -1))}, {"p": ("FP32", (-1, -1))})
        replicas = [Replica(ScriptedBackend(wide), run_dir, n) for n in ("s", "c")]
        rollout = Rollout(gateway, *replicas)
        rollout.begin(1.0, feedback=FEEDBACK)
        with gateway.connect() as client:
            request = body([0.5] * 9 + [1.0] + [0.0] * 40_000)
            reply = client.ask(post("/v2/models/m/infer", request, "Accept-Encoding: gzip"))
            assert reply.headers["content-encoding"] == "gzip"
        assert self.join(rollout, (reply.headers["x-request-id"], 9)) != []
        assert rollout.canary_counts().labels == (1, 0)
        for replica in replicas:
            replica.stop()

    def test_the_controller_sends_labels_and_hears_which_were_joined(
        self, scored: Rollout, caplog: pytest.LogCaptureFixture
    ) -> None:
        gateway = scored.gateway
        controller, server = gateway.controller, gateway.server
        scored.begin(1.0, feedback=FEEDBACK)
        with gateway.connect() as client:
            ask(client, 1, request_id="a")
        for answer in ({}, {"feedback": None}, None):
            controller.answer = answer
            self.report(gateway)
        assert controller.reports[-1]["feedback_joined"] == []
        controller.answer = {
            "feedback": [{"request_id": "a", "label": 1}, {"request_id": "b", "label": 1}]
        }
        self.report(gateway)
        controller.answer = None
        controller.away = True
        gateway.run(server._report_now.set)
        eventually(lambda: "report: the controller is away" in caplog.text)
        controller.away = False
        self.report(gateway)
        assert controller.reports[-1]["feedback_joined"] == ["a"]
        self.report(gateway)
        assert controller.reports[-1]["feedback_joined"] == []
        assert scored.canary_counts().labels == (1, 0)

    def report(self, gateway: Gateway) -> None:
        reports = gateway.controller.reports
        before = len(reports)
        gateway.run(gateway.server._report_now.set)
        eventually(lambda: len(reports) > before)
