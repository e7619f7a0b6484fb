"""A peer is started, checked and stopped for real: the bare ASGI app."""

import os
import signal
import site
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import deployments, models, processes
from benchmarks.deployments import System
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from models.processes import session
from models.zoo import catalogue as zoo
from serving.cli.preflight import free_port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("mlp", tmp_path_factory.mktemp("mlp"))


def bare(model: Path) -> System:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.peers.bare_asgi", str(model), str(port)]
    return System("bare", "", command, f"http://127.0.0.1:{port}/v2/models/mlp/infer")


def test_a_started_system_answers_as_its_model_and_is_gone_afterwards(model: Path):
    system = bare(model)
    rows = models.mlp_rows(3)
    expected = models.cpu_session(model).run(None, {"x": rows})[0]
    body = models.json_body("x", rows)

    def check() -> None:
        deployments.check_answer(system.url, body, 0, expected)

    with deployments.started(system, check) as running:
        assert [p.role for p in processes.usage(running.pid)] == ["benchmarks.peers.bare_asgi"]
    assert not session(running.pid)


@pytest.mark.parametrize("again", [False, True], ids=["once", "again meanwhile"])
def test_a_benchmark_that_is_terminated_leaves_nothing_behind(
    model: Path, again: bool, monkeypatch: pytest.MonkeyPatch
):
    system = bare(model)
    stop = deployments._stop

    def check() -> None:
        deployments.check_answer(system.url, body, 0, expected)

    def stop_after_another(process: subprocess.Popen[bytes]) -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        return stop(process)

    rows = models.mlp_rows()
    body, expected = (
        models.json_body("x", rows),
        models.cpu_session(model).run(None, {"x": rows})[0],
    )
    if again:
        monkeypatch.setattr(deployments, "_stop", stop_after_another)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, deployments.started(system, check) as running:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not session(running.pid)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wrong_answer_stops_the_benchmark(model: Path):
    system = bare(model)
    body, wrong = models.json_body("x", models.mlp_rows()), models.mlp_rows()[:, :10]
    with (
        pytest.raises(BenchmarkError, match="right is"),
        deployments.started(system, lambda: deployments.check_answer(system.url, body, 0, wrong)),
    ):
        pytest.fail("it was measured in spite of its answer")


def test_a_system_that_ends_at_once_is_reported_with_its_words(model: Path):
    system = System("bare", "", [sys.executable, "-c", "exit('no such model')"], "http://x/")

    def check() -> None:
        raise ConnectionRefusedError

    with (
        pytest.raises(BenchmarkError, match="bare did not start: no such model"),
        deployments.started(system, check),
    ):
        pytest.fail("it was measured though it never ran")


def test_the_serving_command_needs_no_script_beside_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As where packages came with `pip --target`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *site.getsitepackages()]))
    bare_interpreter = tmp_path / "bin" / "python"
    bare_interpreter.parent.mkdir()
    bare_interpreter.symlink_to(Path(sys.executable).resolve())
    asked = [
        "-c",
        "from benchmarks import deployments; deployments.serving(['--help'], {}); print('ok')",
    ]
    done = subprocess.run(
        [bare_interpreter, *asked], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "ok\n", done.stderr


def test_binary_requests_carry_json_then_raw_rows():
    rows = models.images(2)
    body, json_bytes = models.binary_body("image", rows)
    assert len(body) == json_bytes + rows.nbytes
    assert body[json_bytes:] == rows.tobytes()
    assert b'"binary_data_size":%d' % rows.nbytes in body[:json_bytes]


def test_first_output_of_a_binary_answer_is_read():
    rows = models.mlp_rows(2)
    head = b'{"outputs":[{"name":"p","datatype":"FP32","shape":[2,64]}]}'
    found = models.read_output(head + rows.tobytes(), len(head))
    assert (found == rows).all()
