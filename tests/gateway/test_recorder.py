from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.recorder import ROWS_BOUNDS, SECONDS_BOUNDS, ArmRecorder, Histogram
from tests.gateway.client import infer
from tests.gateway.harness import Gateway, Replica, arm
from tests.gateway.models import GIVES_NAN, IS_BAD_INPUT, RAISES

seconds = st.floats(0, 100) | st.sampled_from(SECONDS_BOUNDS)


@given(st.lists(seconds, max_size=50))
def test_many_observations_count_like_one_after_another(values: list[float]) -> None:
    one_by_one, together = Histogram(SECONDS_BOUNDS), Histogram(SECONDS_BOUNDS)
    for value in values:
        one_by_one.add(value)
    together.add_all(np.array(values, np.float64))
    assert together.counts == one_by_one.counts
    assert together.sum == pytest.approx(one_by_one.sum)


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    histogram = Histogram(ROWS_BOUNDS)
    for rows in (1, 2, 3, 4, 1024, 1025):
        histogram.add(rows)
    counts = histogram.to_dict()["counts"]
    assert counts[:3] == [1, 1, 2]
    assert counts[-2:] == [1, 1]
    assert histogram.to_dict()["sum"] == 2059


@pytest.mark.parametrize("count", [1, 1000, 20_000])
def test_every_answer_is_in_every_histogram(count: int) -> None:
    recorder = ArmRecorder()
    for i in range(count):
        recorder.answered([0.5], [0.125], 0.25)
        if i % 1000 == 0:
            assert sum(recorder.to_dict()["latency"]["counts"]) == i + 1
    totals = recorder.to_dict()
    assert totals["requests"] == {"success": count}
    parts = {"latency": 0.5, "queue": 0.125, "compute": 0.25, "gateway": 0.125}
    for part, value in parts.items():
        assert sum(totals[part]["counts"]) == count
        assert totals[part]["sum"] == pytest.approx(value * count)


def test_failures_have_a_latency_but_no_parts() -> None:
    recorder = ArmRecorder()
    recorder.refused("overloaded", 0.25)
    recorder.refused("cancelled", 0.25)
    totals = recorder.to_dict()
    assert totals["requests"] == {"overloaded": 1, "cancelled": 1}
    assert sum(totals["latency"]["counts"]) == 2
    assert sum(totals["queue"]["counts"]) == sum(totals["compute"]["counts"]) == 0


def test_each_request_is_counted_once(gateway: Gateway, replica: Replica) -> None:
    """Whatever becomes of it, and however often it was sent."""
    gateway.publish(arm("m", [replica]))
    sent = {
        "success": [infer("m", 1), infer("m", 1, 2)],
        "model_failed": [infer("m", RAISES)],
        "invalid_request": [
            infer("m", IS_BAD_INPUT),
            infer("m", GIVES_NAN),
            infer("m", 1, id=5),
            infer("m", 1, parameters={"priority": 77}),
            infer("m", 1, headers=["X-Request-Timeout-Ms: x"]),
        ],
        "unsupported": [infer("m", 1, parameters={"sequence_id": 5})],
        "unsupported_encoding": [infer("m", 1, headers=["Content-Encoding: br"])],
    }
    with gateway.connect() as client:
        for requests in sent.values():
            for request in requests:
                assert client.ask(request).status
    report = gateway.run(gateway.server.report)
    (entry,) = report["models"]
    assert entry["requests"] == {outcome: len(requests) for outcome, requests in sent.items()}
    assert sum(entry["latency"]["counts"]) == sum(map(len, sent.values()))
    # Runs that gave an answer, one of which could not be written.
    assert sum(entry["batch_size"]["counts"]) == 3
    assert report["unrouted"] == {}
