"""What the benchmark on a GPU leaves behind: after every figure, after a failure, and rendered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import deployments
from benchmarks.deployments import System
from benchmarks.gpu import report, rounds
from benchmarks.gpu.record import Record
from benchmarks.machine import ROOT
from serving.cli.preflight import free_port

FACTS = {
    "machine": {
        "cpu": "Some CPU",
        "cores": 2,
        "kernel": "6",
        "python": "3",
        "wrk": "none",
        "commit": "c",
        "command": "python -m benchmarks.gpu",
    },
    "gpu": "Some GPU",
    "driver": "580.1",
    "settings": {"rounds": 3, "seconds": 1.0},
    "what": "a model",
    "request_rows": 8,
}
BARE = {n: {"rows_per_s": 100.0 * n, "run_ms": 10.0} for n in (1, 2)}

# Answers every request as the bare loop did: with one row of four noughts.
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,4],"data":[0,0,0,0]}]}'
        self.send_response(200)
        self.send_header("Server-Timing", "compute;dur=1.5")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
try:
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
except KeyboardInterrupt:
    pass
"""


def served(rate: float) -> dict[str, float]:
    return {"rows_per_s": rate, "p50_ms": 5.0, "p99_ms": 9.0}


def a_round(record: Record, rate: float) -> None:
    record.bare(BARE)
    record.served(1, served(rate / 2))
    record.served(4, served(rate))
    record.end_round()


def test_each_figure_is_on_disk_as_soon_as_it_is_there(tmp_path: Path) -> None:
    record = Record("transformer", FACTS, tmp_path)
    assert not list(tmp_path.iterdir())
    record.bare(BARE)
    assert json.loads(record.path.read_text())["unfinished_round"]["bare"]["2"]["run_ms"] == 10.0
    record.served(1, served(90.0))
    found = json.loads(record.path.read_text())
    assert found["unfinished_round"]["gateway"]["1"] == served(90.0)
    assert (found["rounds"], found["targets"]) == ([], [])
    record.served(4, served(180.0))
    assert record.end_round() == (200.0, 180.0)
    found = json.loads(record.path.read_text())
    assert found["rounds"][0]["ratio"] == 0.9
    assert found["unfinished_round"] == {}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_the_report_has_the_ratio_and_a_picture(tmp_path: Path) -> None:
    record = Record("transformer", FACTS, tmp_path)
    for rate in (160.0, 190.0, 182.0):
        a_round(record, rate)
    (target,) = json.loads(record.path.read_text())["targets"]
    assert (target["figure"], target["bound"], target["met"]) == (0.91, 0.9, True)
    assert report.main([str(record.path)]) == 0
    assert record.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = record.path.with_suffix(".md").read_text()
    assert "a model, on Some GPU, driver 580.1; 8 rows a request. Failed requests: 0." in text
    assert "| 4           | 182    |" in text


def test_a_result_that_was_cut_short_is_rendered_as_far_as_it_goes(tmp_path: Path) -> None:
    record = Record("transformer", FACTS, tmp_path)
    record.bare(BARE)
    assert report.render(record.path)
    assert "Cut short: 0 of 3 rounds." in record.path.with_suffix(".md").read_text()
    record.fail("transformer 1/3: the gateway did not start")
    assert report.render(record.path)
    text = record.path.with_suffix(".md").read_text()
    assert "0 of 3 rounds, then it failed: transformer 1/3: the gateway did not start" in text
    assert record.path.with_suffix(".png").exists()


def test_a_picture_that_cannot_be_drawn_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record("transformer", FACTS, tmp_path)
    a_round(record, 180.0)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.plots", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not report.render(record.path)
    assert "bench: no picture: " in capsys.readouterr().err
    assert "Some GPU" in record.path.with_suffix(".md").read_text()


@pytest.mark.parametrize("text", ["{}", "{", '{"benchmark": "mlp", "summary": {}}', "[]"])
def test_another_file_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert report.main([str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench: {path} is no result of benchmarks.gpu: ")


def test_a_failure_before_any_figure_leaves_an_earlier_result(tmp_path: Path) -> None:
    earlier = Record("transformer", FACTS, tmp_path)
    a_round(earlier, 180.0)
    before = earlier.path.read_bytes()
    Record("transformer", FACTS, tmp_path).fail("no GPU")
    assert earlier.path.read_bytes() == before


@pytest.fixture
def served_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare loops are canned. ResNet-50's gateway dies at once; the transformer's is a stub."""
    (tmp_path / "server.py").write_text(SERVER)
    port = free_port()
    commands = {
        "resnet50": [sys.executable, "-c", "exit('the provider did not start')"],
        "transformer": [sys.executable, str(tmp_path / "server.py"), str(port)],
    }

    def gateway(config: Path, home: Path, registered: dict[str, Path]) -> System:
        return System("gateway", "", commands[next(iter(registered))], "")

    def bare(trial: rounds.Trial, answer: Path) -> dict[int, dict[str, float]]:
        np.save(answer, np.zeros((1, 4), np.float32))
        return BARE

    def build(name: str, directory: Path) -> Path:
        directory.mkdir(parents=True)
        return directory / "model"

    monkeypatch.setattr(rounds.catalogue, "build", build)
    monkeypatch.setattr(deployments, "gateway", gateway)
    monkeypatch.setattr(deployments, "infer_url", lambda *_: f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr(rounds.Trial, "_bare", bare)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/gpu/__main__.py")])


@pytest.mark.usefixtures("served_by")
def test_a_model_that_fails_ends_neither_the_other_nor_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, out = rounds.Settings(2, 0.2, "cpu", (1, 2)), tmp_path / "out"
    assert rounds.measure(["resnet50", "transformer"], settings, out) == ["resnet50"]
    printed = capsys.readouterr()
    failure = "resnet50 1/2: gateway did not start: the provider did not start"
    assert [line for line in printed.err.splitlines() if line.startswith("bench:")] == [
        f"bench: {failure}"
    ]
    assert "transformer 2/2: bare 200 rows/s, gateway " in printed.out
    found = {
        json.loads(path.read_text())["benchmark"]: json.loads(path.read_text())
        for path in out.glob("*.json")
    }
    assert found["gpu-resnet50"]["failure"] == failure
    assert found["gpu-resnet50"]["unfinished_round"]["bare"]["1"] == BARE[1]
    assert len(found["gpu-transformer"]["rounds"]) == 2
    (log,) = out.glob("*.log")
    assert log.name.endswith("gpu-resnet50.log")
    assert log.read_text() == "the provider did not start\n"
    assert len(list(out.glob("*.png"))) == len(list(out.glob("*.md"))) == 2


@pytest.mark.usefixtures("served_by")
def test_what_nobody_foresaw_ends_one_model_with_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("torch has no export")

    monkeypatch.setattr(rounds.catalogue, "build", broken)
    assert rounds.measure(["transformer"], rounds.Settings(1, 0.1, "cpu"), tmp_path) == [
        "transformer"
    ]
    assert capsys.readouterr().err == (
        "bench: transformer 1/1: AttributeError('torch has no export')\n"
    )
    (log,) = tmp_path.glob("*.log")
    assert "in broken" in log.read_text()
