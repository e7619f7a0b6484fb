import shutil
from pathlib import Path

import pytest

from benchmarks import wrk
from benchmarks.errors import BenchmarkError

OUTPUT = """\
Running 5s test @ http://127.0.0.1:18010/v2/models/mlp/infer
  1 threads and 64 connections
  60480 requests in 5.00s, 18.71MB read
RESULT {"requests": 60480, "duration_us": 5000000, "bytes": 1, "p50_us": 899, "p90_us": 1909, \
"p99_us": 3538, "max_us": 14674, "errors": {"connect": 0, "read": 2, "write": 0, "status": 7, \
"timeout": 0}}
"""


def test_figures_come_in_requests_per_second_and_milliseconds():
    result = wrk.parse(OUTPUT)
    assert result.rps == 12096
    assert (result.p50_ms, result.p99_ms, result.max_ms) == (0.899, 3.538, 14.674)


def test_every_kind_of_error_is_kept():
    assert wrk.parse(OUTPUT).errors == {"read": 2, "status": 7}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("unable to connect to 127.0.0.1:1 Connection refused", "Connection refused"),
        (OUTPUT.replace("60480, ", "0, "), "no request was answered.*'status': 7"),
    ],
)
def test_a_run_without_an_answer_is_an_error(output: str, message: str):
    with pytest.raises(BenchmarkError, match=message):
        wrk.parse(output)


def test_a_missing_wrk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match="package wrk"):
        wrk.run(wrk.Load("http://127.0.0.1:1/", tmp_path / "body"), connections=1, seconds=1)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_a_server_that_is_not_there_is_an_error(tmp_path: Path):
    body = tmp_path / "body"
    body.write_bytes(b"{}")
    with pytest.raises(BenchmarkError, match="refused"):
        wrk.run(wrk.Load("http://127.0.0.1:1/", body), connections=1, seconds=1)
