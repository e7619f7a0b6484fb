"""The benchmark on a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from benchmarks.errors import BenchmarkError
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import bare, load, preflight, rounds
from benchmarks.gpu.subjects import SUBJECTS
from benchmarks.machine import ROOT
from benchmarks.wrk import Load
from models.zoo import catalogue
from models.zoo.sizes import WIDTH
from serving.config import ServingConfig
from serving.replica.backends.cuda import missing_cuda


@pytest.mark.skipif(missing_cuda() is None, reason="there is a GPU here")
def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 1
    assert capsys.readouterr().err == (
        "bench: cannot run here: there is no CUDA GPU: no NVIDIA driver is installed here "
        "(libcuda.so.1 was not found)\n"
    )


@pytest.mark.skipif(missing_cuda() is None, reason="there is a GPU here")
def test_tests_that_require_a_gpu_say_once_that_there_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT,
        env={**os.environ, "SERVING_TEST_GPU_REQUIRED": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 4
    assert done.stderr == (
        "ERROR: SERVING_TEST_GPU_REQUIRED is set, and the tests cannot run here: there is no CUDA "
        "GPU: no NVIDIA driver is installed here (libcuda.so.1 was not found)\n\n"
    )
    assert "passed" not in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("from benchmarks.gpu.__main__ import main; sys.exit(main([]))", "psutil"),
        ("import tests", "pytest-timeout"),
    ],
    ids=["benchmark", "tests"],
)
def test_all_packages_that_are_absent_are_named_at_once(code: str, more: str) -> None:
    # -I -S: neither PYTHONPATH nor the environment's packages.
    bare_python = [Path(sys.executable).resolve(), "-I", "-S", "-c"]
    done = subprocess.run(
        [*bare_python, f"import sys; sys.path.append({str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    for name in ("ray", "torch", "onnxruntime-gpu", "onnx", more):
        assert re.search(rf"[ ,]{name}([,;]|$)", line), line


def test_a_runtime_without_cuda_is_named_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "_driver", list)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert preflight.problem() == (
        f"cannot run here: torch {torch.__version__} is built without CUDA; "
        f"onnxruntime {ort.__version__} has no CUDAExecutionProvider"
    )


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--rounds", "0"], "--rounds: '0' is not a whole number of at least 1"),
        (["--seconds", "nan"], "--seconds: 'nan' is not a number above 0"),
        (["--models", "vgg"], "--models: invalid choice: 'vgg'"),
        (["--out", "/proc/nowhere"], "--out: /proc/nowhere: No such file or directory"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert wrong in capsys.readouterr().err


def test_the_command_offers_the_models_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert f"{{{','.join(sorted(SUBJECTS))}}}" in capsys.readouterr().out


def test_the_bare_loop_does_not_import_torch_for_a_model_in_onnx() -> None:
    """It would load CUDA's libraries, which a replica of an ONNX model has to find by itself."""
    code = "import benchmarks.gpu.bare, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_the_bare_loop_measures_each_size_and_keeps_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(SUBJECTS["transformer"], max_size=2, request_rows=2)
    monkeypatch.setitem(SUBJECTS, "transformer", small)
    file = catalogue.build("transformer", tmp_path)
    bare.main("transformer", str(file), "0.01", str(tmp_path / "answer.npy"), "cpu")
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["1", "2"]
    assert all(each["rows_per_s"] > 0 and each["run_ms"] > 0 for each in figures.values())
    assert np.load(tmp_path / "answer.npy").shape == (2, WIDTH)


def test_what_a_replica_may_hold_is_no_estimate() -> None:
    (model,) = rounds.configuration(SUBJECTS["resnet50"], "cuda")["models"].values()
    assert model["gpu_memory_bytes"] == 16 << 30
    for device in ("cuda", "cpu"):
        ServingConfig.model_validate(rounds.configuration(SUBJECTS["resnet50"], device))


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
