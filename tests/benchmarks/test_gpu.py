"""The benchmark on a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from benchmarks import results
from benchmarks.errors import BenchmarkError
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import load
from benchmarks.gpu.subjects import SUBJECTS
from benchmarks.machine import ROOT
from benchmarks.wrk import Load
from serving.replica.backends.cuda import missing_cuda


@pytest.mark.skipif(missing_cuda() is None, reason="there is a GPU here")
def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 1
    assert capsys.readouterr().err == (
        "bench: this needs a CUDA GPU: no NVIDIA driver is installed here "
        "(libcuda.so.1 was not found)\n"
    )


def test_the_loop_ends_at_the_largest_run_of_a_replica() -> None:
    assert SUBJECTS["resnet50"].sizes() == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_a_request_holds_the_rows(name: str) -> None:
    subject = SUBJECTS[name]
    body, json_bytes = subject.body()
    (tensor,) = json.loads(body[:json_bytes])["inputs"]
    rows = subject.rows(subject.request_rows)
    sent = np.frombuffer(body[json_bytes:], rows.dtype).reshape(tensor["shape"])
    np.testing.assert_array_equal(sent, rows)
    assert len(body) - json_bytes == tensor["parameters"]["binary_data_size"]


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Server-Timing", "compute;dur=1.5")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 503])
def test_clients_in_processes_add_up_and_a_failure_is_none_of_the_figures(
    tmp_path: Path, status: int
) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"{}")
    handler = type("Handler", (_Server,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        posted = Load(f"http://127.0.0.1:{server.server_port}/x", body)
        try:
            if status == 200:
                found = load.measure(posted, 3, 0.3)
                assert found["requests_per_s"] > 0
                assert 0 < found["p50_ms"] <= found["p99_ms"]
            else:
                with pytest.raises(BenchmarkError, match="/x answers 503"):
                    load.measure(posted, 3, 0.3)
        finally:
            server.shutdown()


def test_the_report_has_the_ratio_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/gpu/__main__.py")])
    measured = [
        {
            "bare": {n: {"rows_per_s": 100.0 * n, "run_ms": 10.0} for n in (1, 2)},
            "gateway": {n: {"rows_per_s": 90.0, "p50_ms": 5.0, "p99_ms": 9.0} for n in (1, 4)},
            "ratio": ratio,
        }
        for ratio in (0.8, 0.95, 0.91)
    ]
    settings = benchmark.Settings(3, 1.0)
    path = benchmark.report(SUBJECTS["transformer"], measured, settings, "Some GPU")
    document = json.loads(path.read_text())
    assert document["gpu"] == "Some GPU"
    (target,) = document["targets"]
    assert (target["figure"], target["bound"], target["met"]) == (0.91, 0.9, True)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Some GPU" in path.with_suffix(".md").read_text()
