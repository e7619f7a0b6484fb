"""What is made of gateways' totals and replicas' announcements: rate, delay, busy replicas."""

from __future__ import annotations

import pytest

from serving.control.fleet import Replica
from serving.control.load import Load
from serving.control.totals import ArmTotals, Histogram
from serving.core.scaling import WINDOW_S

REFUSED_S = 2.0


def totals(*queue: int, waiting: int = 0, **refused: int) -> ArmTotals:
    """So many requests had waited up to 1, 10 and 100 ms."""
    histogram = Histogram((0.001, 0.01, 0.1), [*queue, 0])
    return ArmTotals({"success": sum(queue), **refused}, {"queue": histogram}, waiting=waiting)


def replica(name: str, heard_at: float, up_s: float, busy_s: float) -> Replica:
    usage = {"up_ns": up_s * 1e9, "answered_ns": busy_s * 0.5e9, "padding_ns": busy_s * 0.25e9}
    usage |= {"failed_ns": busy_s * 0.25e9, "warmup_ns": 0}
    info = {"app": "a", "replica": name, "node": "n", "state": "ready", "usage": usage}
    return Replica(info, heard_at)


def noted(*seconds: ArmTotals) -> Load:
    load = Load()
    for now, arm in enumerate(seconds):
        load.note(float(now), arm, ())
    return load


def test_what_was_before_the_window_is_forgotten() -> None:
    many = int(WINDOW_S) + 1
    load = noted(totals(0, 0, 900), *(totals(n * 100, 0, 900) for n in range(many)))
    assert load.rate == 100.0
    assert load.queue_delay_s(REFUSED_S) == pytest.approx(0.001, rel=0.1)


def test_requests_that_wait_are_estimated_by_how_fast_others_are_answered() -> None:
    load = noted(totals(0, 0, 0), totals(100, 0, 0, waiting=50))
    assert load.queue_delay_s(REFUSED_S) == pytest.approx(0.5)
    stuck = noted(totals(0, 0, 0), totals(0, 0, 0, waiting=1))
    assert stuck.queue_delay_s(REFUSED_S) == WINDOW_S


def test_what_is_refused_waited_too_long() -> None:
    load = noted(totals(10, 0, 0), totals(20, 0, 0, overloaded=5))
    assert load.queue_delay_s(REFUSED_S) == REFUSED_S
    assert load.rate == 15.0


def test_what_no_replica_could_have_answered_is_no_load() -> None:
    slugs = ("unauthenticated", "forbidden", "budget_spent", "invalid_request", "request_timeout")
    load = noted(totals(10, 0, 0), totals(10, 0, 0, **dict.fromkeys(slugs, 7)))
    assert load.rate == 0.0
    assert load.queue_delay_s(REFUSED_S) is None


@pytest.mark.parametrize("outcome", ["cancelled", "deadline_exceeded", "unavailable", "internal"])
def test_what_a_replica_could_have_answered_is_load(outcome: str) -> None:
    assert noted(totals(10, 0, 0), totals(10, 0, 0, **{outcome: 3})).rate == 3.0


def test_nobody_came() -> None:
    load = noted(totals(10, 0, 0), totals(10, 0, 0))
    assert load.queue_delay_s(REFUSED_S) is None
    assert load.rate == 0.0


def test_totals_that_went_backwards_begin_anew() -> None:
    load = noted(totals(1000, 0, 0), totals(10, 0, 0), totals(30, 0, 0))
    assert load.rate == 20.0


def test_busy_is_all_run_time_over_the_time_that_passed() -> None:
    load, arm = Load(), totals(0, 0, 0)
    load.note(0.0, arm, [replica("r1", 0.0, 10, 5), replica("r2", 0.5, 100, 0)])
    assert load.busy is None
    load.note(1.0, arm, [replica("r1", 2.0, 12, 6.5), replica("r2", 0.5, 100, 0)])
    assert load.busy is None, "one of them has not said it again"
    load.note(2.0, arm, [replica("r1", 2.0, 12, 6.5), replica("r2", 2.5, 102, 1)])
    assert load.busy == pytest.approx(0.75 + 0.5)


def test_a_replica_that_comes_shares_work_that_was_counted_before() -> None:
    load, arm = Load(), totals(0, 0, 0)
    for second in (0.0, 2.0, 4.0):
        load.note(second, arm, [replica("r1", second, second, second)])
    assert load.busy == pytest.approx(1.0)
    both = [replica("r1", 6.0, 6, 6), replica("r2", 6.0, 1, 0)]
    load.note(6.0, arm, both)
    assert load.busy is None
    load.note(8.0, arm, [replica("r1", 8.0, 8, 7), replica("r2", 8.0, 3, 1)])
    assert load.busy == pytest.approx(0.5 + 0.5)


def test_a_replica_restarted_under_its_name_counts_from_nothing() -> None:
    load, arm = Load(), totals(0, 0, 0)
    load.note(0.0, arm, [replica("r1", 0.0, 50, 25)])
    load.note(2.0, arm, [replica("r1", 2.0, 1, 0.5)])
    assert load.busy is None
    load.note(4.0, arm, [replica("r1", 4.0, 3, 0.5)])
    assert load.busy == 0.0
