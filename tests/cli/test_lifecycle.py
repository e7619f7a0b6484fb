"""`serving up` ends when it is told to, in whatever state it is, and leaves no process behind."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from serving.config import load_config
from tests.e2e.deployment import SERVING, Deployment, eventually, free_port, serving
from tests.e2e.load import Load
from tests.e2e.test_faults import MLP, mlp_body

pytestmark = [pytest.mark.cluster]


class Terminal:
    """`serving up` on a terminal of its own, so that Ctrl-C reaches the whole process group."""

    def __init__(self, home: Path, file: Path) -> None:
        self.output = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "SERVING_HOME": str(home), "TERM": "xterm"}
            os.execve(SERVING[0], [*SERVING, "up", "-f", str(file)], environment)

    def wait_for(self, text: bytes, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            self._read(max(0.0, deadline - time.monotonic()), text)

    def _read(self, timeout_s: float, text: bytes) -> None:
        readable, _, _ = select.select([self._fd], [], [], timeout_s)
        assert readable, f"no {text!r} in\n{self.output.decode(errors='replace')}"
        try:
            self.output += os.read(self._fd, 65536)
        except OSError:
            raise AssertionError(f"ended: {self.output.decode(errors='replace')}") from None

    def press_ctrl_c(self) -> None:
        os.write(self._fd, b"\x03")

    def terminate_group(self) -> None:
        """SIGTERM for whatever runs in its process group, as timeout(1) sends it."""
        os.killpg(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Read to the end; the exit status."""
        while True:
            try:
                chunk = os.read(self._fd, 65536)
            except OSError:  # how a closed terminal looks on Linux
                break
            if not chunk:
                break
            self.output += chunk
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


@contextmanager
def no_process_left(pid: int) -> Iterator[None]:
    """Whatever `pid` has started by the time the block begins or ends is gone afterwards."""
    family = psutil.Process(pid).children(recursive=True)
    yield
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def configure(home: Path, text: str = "models: {mlp: {version: '1'}}\n") -> Path:
    file = home / "serving.yaml"
    ports = f"gateway: {{port: {free_port()}}}\ncontrol: {{port: {free_port()}}}\n"
    file.write_text(ports + text)
    return file


def ray_dir(output: str) -> Path:
    """Where `serving up` said that its logs are, less what Ray adds."""
    found = re.search(r"logs in (\S+)", output)
    assert found, output
    return Path(found[1]).parents[1]


def test_a_signal_to_its_whole_group_answers_what_was_admitted_and_stops(home: Path) -> None:
    file = configure(home)
    terminal = Terminal(home, file)
    terminal.wait_for(b"ready: ")
    terminal.wait_for(b"mlp")
    port = load_config(file).gateway.port
    with no_process_left(terminal.pid), Load(port, MLP, [mlp_body(1)]) as load:
        load.wait_for(1_000)
        terminal.terminate_group()
        assert terminal.wait() == 0, terminal.output.decode(errors="replace")
        eventually(lambda: load.broken, "connections are refused")
    assert b"stopping gateway" in terminal.output
    assert terminal.output.rstrip().endswith(b"stopped")
    assert b"Traceback" not in terminal.output
    assert not ray_dir(terminal.output.decode()).exists()
    assert load.failed == {}, load.failures
    # Who was connected got an answer; the others were not let in. The listener's own queue is the
    # exception: a connection that the gateway has not accepted ends with its listener.
    unanswered = [b for b in load.broken if not b.startswith("connect")]
    assert len(unanswered) <= 8, unanswered
    assert len(unanswered) < len(load.broken)


def test_ctrl_c_during_the_start_leaves_nothing(home: Path) -> None:
    terminal = Terminal(home, configure(home))
    terminal.wait_for(b"starting Ray")
    eventually(
        lambda: [p for p in psutil.Process(terminal.pid).children(True) if "gcs" in p.name()],
        "Ray has begun to start",
    )
    with no_process_left(terminal.pid):
        terminal.press_ctrl_c()
        assert terminal.wait() == 0, terminal.output.decode(errors="replace")
    assert b"Traceback" not in terminal.output


def test_a_second_ctrl_c_ends_it_at_once(home: Path) -> None:
    terminal = Terminal(home, configure(home))
    terminal.wait_for(b"ready: ")
    with no_process_left(terminal.pid):
        terminal.press_ctrl_c()
        terminal.wait_for(b"stopping gateway")
        terminal.press_ctrl_c()
        assert terminal.wait() == 128 + signal.SIGINT
    assert b"Traceback" not in terminal.output
    assert not ray_dir(terminal.output.decode()).exists(), "nothing stays in /tmp"


def test_down_stops_it_and_then_finds_nothing(home: Path) -> None:
    with Deployment(home, {"mlp": {"version": "1"}}) as deployment:
        with no_process_left(deployment.process.pid):
            done = serving("down", "-f", deployment.file, home=home)
            assert done.returncode == 0, done.stderr
            assert deployment.process.wait(10) == 0
        assert not ray_dir(deployment.log.read_text()).exists(), "nothing stays in /tmp"
        again = serving("down", "-f", deployment.file, home=home)
        assert again.returncode == 1
        assert "nothing runs" in again.stderr


def test_a_killed_up_takes_what_serves_with_it(home: Path) -> None:
    """SIGKILL. (Two helpers of Ray itself notice only a minute later.)"""
    with Deployment(home, {"mlp": {"version": "1"}}) as deployment:
        family = psutil.Process(deployment.process.pid).children(recursive=True)
        serve = [p for p in family if "Serve" in p.name()]
        assert len(serve) == 4, "Serve's own controller, ours, a gateway and a replica"
        deployment.process.kill()
        _, alive = psutil.wait_procs(serve, timeout=20)
        assert alive == []
        again = serving("down", "-f", deployment.file, home=home)
        assert again.returncode == 1, "its lock went with it"
        shutil.rmtree(ray_dir(deployment.log.read_text()), ignore_errors=True)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("models: {mlp: {version: '1', onnx: {providers: [cuda]}}}\n", "mlp version 1"),
        ("models: {tampered: {version: '1'}}\n", "model.onnx"),
    ],
)
def test_a_model_that_cannot_start_ends_up_with_one_line(
    home: Path, registered: Path, tmp_path: Path, models: str, words: str
) -> None:
    if "tampered" in models:
        _register_and_tamper(home, registered, tmp_path)
    done = serving("up", "-f", configure(home, models), home=home)
    assert done.returncode == 1
    assert words in done.stderr
    if "tampered" in models:
        assert done.stdout == "", "found before Ray is started"
    else:
        logs = ray_dir(done.stdout)
        assert list((logs / "session_latest" / "logs").iterdir()), "they say what went wrong"
        shutil.rmtree(logs)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if _belongs(p, home)]


def _register_and_tamper(home: Path, registered: Path, tmp_path: Path) -> None:
    from models.zoo.catalogue import build

    model = build("mlp", tmp_path / "zoo")
    done = serving("register", "tampered", model, home=home)
    assert done.returncode == 0, done.stderr
    (stored,) = (home / "registry.db.artifacts" / "tampered").rglob("model.onnx")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(content)


def _belongs(process: psutil.Process, home: Path) -> bool:
    return any(str(home) in part for part in process.info["cmdline"] or ())
