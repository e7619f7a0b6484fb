"""The live benchmark's figures: what a probe, an answer and a row of throughput are read as."""

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.rollouts import live, live_models, live_report, live_throughput
from benchmarks.rollouts.live_load import Answer, OpenLoad, body
from benchmarks.rollouts.live_scenarios import plan, seen, spans, weighted
from benchmarks.rollouts.live_throughput import MODES
from serving.rollout_plans import parse_plan


@contextmanager
def peer(*, delay_s: float = 0.0, hangs_up: bool = False) -> Iterator[int]:
    """A server that answers as a gateway does, after a delay, or not at all; its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if hangs_up:
                self.close_connection = True
                return
            time.sleep(delay_s)
            self.send_response(200)
            for name, value in (("X-Arm", "stable"), ("X-Request-Id", "gateway1-17")):
                self.send_header(name, value)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def probe(finished: float, arm: str, gateway: str = "g1") -> Answer:
    return Answer(finished - 0.001, finished, 0, 200, arm, gateway)


def answer(due: float, row: int, status: int = 200, *, arm: str = "stable", took: float = 0.002):
    return Answer(due, due + took, row, status, arm, "g1")


def test_weight_lasts_from_the_first_answer_of_the_canary_to_the_first_of_stable_again():
    probes = [probe(t, "stable") for t in (1.0, 2.0)]
    probes += [probe(t, "canary") for t in (3.0, 3.5, 4.0)]
    probes += [probe(t, "stable") for t in (4.5, 5.0)]
    assert weighted(probes) == {"g1": (3.0, 4.5)}


def test_an_answer_of_the_canary_that_comes_late_ends_the_weight_later():
    probes = [probe(t, a) for t, a in ((1, "canary"), (2, "stable"), (3, "canary"), (4, "stable"))]
    assert weighted(reversed(probes)) == {"g1": (1, 4)}


def test_errors_and_gateways_without_the_canary_say_nothing_of_weight():
    probes = [probe(1, "canary"), probe(2, ""), probe(3, "stable"), probe(1, "stable", "g2")]
    assert weighted(probes) == {"g1": (1, 3)}


def test_the_last_gateway_counts():
    found = spans({"g1": (10.0, 15.2), "g2": (10.1, 15.1)}, verdict=15.0)
    assert found["weight_s"] == pytest.approx(5.2)
    assert found["verdict_s"] == pytest.approx(5.0)
    assert found["zero_ms"] == pytest.approx(200)
    assert found["zero_ms_by_gateway"] == pytest.approx({"g1": 200, "g2": 100})


def test_failures_are_put_down_to_the_version_that_fails_the_body():
    answers = [
        answer(0.0, 0, 500, arm=""),  # before the rollout
        answer(1.0, 10, 500, arm=""),  # 10 of 2000: under 5 %
        answer(1.0, 1999, 500, arm=""),
        answer(1.0, 1000, 503, arm=""),
        answer(1.0, 1000, 0, arm=""),
        answer(1.0, 1000, arm="canary", took=0.5),
    ]
    found = seen(answers, 0.05, since=1.0)
    assert found["failed"] == {"canary": 1, "stable": 1, "neither": 1, "lost": 1}
    assert (found["requests"], found["canary_answers"]) == (5, 1)
    assert found["max_ms"] == pytest.approx(500)


def test_bodies_fail_as_often_as_the_versions_are_said_to():
    blamed = [live_models.blame(row, 0.05) for row in range(live_models.ROWS)]
    assert blamed.count("canary") == 0.05 * live_models.ROWS
    assert blamed.count("stable") == live_models.STABLE_FAILS * live_models.ROWS
    # What stable fails too is no fault of a canary that fails everything.
    everything = [live_models.blame(row, 1.0) for row in range(live_models.ROWS)]
    assert everything.count("stable") == blamed.count("stable")
    assert everything.count("neither") == 0


def test_versions_fail_the_bodies_that_are_blamed_on_them(tmp_path: Path):
    torch = pytest.importorskip("torch")
    with pytest.warns(DeprecationWarning, match="TorchScript|torch.jit"):
        version = torch.jit.load(str(live_models.write(tmp_path / "v.ts", fails_below=0.05)))
    for row in (0, 99, 100, 1000, 1997, 1998, 1999):
        x = torch.full((1, 4), float(live_models.first_values()[row]))
        if live_models.blame(row, 0.05) == "neither":
            assert torch.equal(version(x), 2 * x)
        else:
            with pytest.raises(torch.jit.Error):
                version(x)


def test_work_changes_no_answer(tmp_path: Path):
    torch = pytest.importorskip("torch")
    with pytest.warns(DeprecationWarning, match="TorchScript|torch.jit"):
        version = torch.jit.load(str(live_models.write(tmp_path / "v.ts", work=3)))
    x = torch.full((2, 4), 0.5)
    assert torch.equal(version(x), 2 * x)


def test_the_load_is_steady_and_counts_the_time_that_requests_waited_for_a_client():
    # Two clients and answers that take 50 ms: 40 a second at most, and 100 are due.
    with peer(delay_s=0.05) as port, OpenLoad(port, "/", [body(0)], rate=100, clients=2) as load:
        load.wait_for(20)
    answers = sorted(load.answers, key=lambda a: a.due)
    gaps = [b.due - a.due for a, b in pairwise(answers)]
    assert gaps == pytest.approx([0.01] * len(gaps), abs=1e-6)
    waited = [a.finished - a.due for a in answers]
    assert all(a.status == 200 and (a.arm, a.gateway) == ("stable", "gateway1") for a in answers)
    assert min(waited) > 0.045
    # It falls behind by 15 ms a request.
    assert waited[19] > waited[0] + 0.15


def test_a_connection_that_ends_is_an_answer_that_is_lost():
    with peer(hangs_up=True) as port, OpenLoad(port, "/", [body(0)], rate=50, clients=2) as load:
        load.wait_for(4)
    assert {a.status for a in load.answers} == {0}


def test_a_load_that_is_not_answered_is_reported():
    with (
        peer(delay_s=0.5) as port,
        OpenLoad(port, "/", [body(0)], rate=50, clients=1) as load,
        pytest.raises(BenchmarkError, match="5 requests did not end"),
    ):
        load.wait_for(5, timeout_s=0.1)


@pytest.mark.parametrize("mode", [mode for mode, held in MODES.items() if held])
def test_throughput_plans_differ_in_what_is_observed(mode: str):
    spec = parse_plan(dict(MODES[mode] or {}), source="test")
    kinds = {trigger.kind for trigger in spec.analysis.triggers}
    assert [step.weight for step in spec.steps] == [5]
    assert spec.shadow is None
    assert {"errors", "latency", "slo_burn", "breaker"} <= kinds
    assert ("drift" in kinds) == (mode != "split")
    assert (spec.feedback is not None) == (mode == "feedback")


def test_scenarios_leave_the_triggers_at_their_defaults():
    spec = parse_plan(plan(5, 50), source="test")
    assert spec.analysis.triggers == parse_plan("canary", source="test").analysis.triggers
    assert (spec.analysis.alpha, spec.analysis.min_units) == (0.01, 50)


def test_throughput_is_compared_within_a_round():
    rounds = [
        {"none": {"rps": none}, "split": {"rps": split}} for none, split in ((100, 98), (50, 50))
    ]
    assert live_throughput.ratios(rounds) == {"split": [0.98, 1.0]}
    assert live_throughput.beside([{"none": {}, "split": {"beside": [1, 0.9]}}] * 2) == {
        "split": [1, 0.9, 1, 0.9]
    }


def run(state: str, weight_s: float, **failed: int) -> dict[str, object]:
    return {
        "state": state,
        "reason": "errors: canary failed 3 of 60 requests",
        "weight_s": weight_s,
        "zero_ms": 10 * weight_s,
        "requests": 100,
        "canary_answers": 5,
        "arms": {arm: {"requests": 5, "failed": 3, "p50_s": 0.003} for arm in ("canary", "stable")},
        "failed": {"canary": 0, "stable": 0, "neither": 0, "lost": 0, **failed},
        "p50_ms": 2.0,
        "p99_ms": 4.0,
    }


def part(**body: object) -> dict[str, object]:
    machine = {"date": "d", "cpu": "c", "cores": 2, "kernel": "k", "python": "p", "commit": "x"}
    return {"machine": {**machine, "command": "python -m benchmarks.rollouts.live"}, **body}


def test_targets_are_held_against_every_run():
    runs = [run("rolled_back", 1.0), run("rolled_back", 3.0, stable=2), run("paused", 1.0, lost=1)]
    found = {
        t.name: (t.figure, t.met) for t in live_report.targets({"all-failing": part(runs=runs)})
    }
    assert found == {
        "all-failing: rolled back": (2, False),
        "all-failing: weight until zero, longest": (3.0, False),
        "all-failing: failed or lost for the canary's sake": (1, False),
    }


def test_results_say_what_was_measured_and_keep_what_was_not_measured_again(tmp_path: Path):
    figures = {"rps": 100.0, "p50_ms": 1.0, "p99_ms": 2.0, "cpu_us": {"g": 40}, "others_cpu": 0.01}
    accused = {"against": ["latency: longer than 2 ms took 9 of 10 canary answers"]}
    rounds = [
        {"none": figures, "split": {**figures, "rps": 96.0, "beside": [0.98], "rollout": accused}}
    ]
    parts = {"failing": part(runs=[run("rolled_back", 6.5)]), "throughput": part(rounds=rounds)}
    written = live_report.write(parts, tmp_path)
    text = written.read_text(encoding="utf-8")
    assert "rolled back 1" in text
    assert "6.50" in text
    assert "0.960" in text
    assert "against it in 1 of 1 rollouts (latency)" in text
    assert "MISSED" in text
    document = json.loads((tmp_path / "live.json").read_text(encoding="utf-8"))
    assert document["parts"] == parts
    assert [t["met"] for t in document["targets"]] == [True, True, True, False, True]


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        live.main(["--only", "failing,slow"])
    assert "slow: not in failing, all-failing" in capsys.readouterr().err


def test_times_are_unix_seconds():
    with peer() as port, OpenLoad(port, "/", [body(0)], rate=50, clients=2) as load:
        load.wait_for(2)
    assert math.isclose(load.answers[0].finished, time.time(), abs_tol=5)
