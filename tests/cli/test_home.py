"""One `serving up` a home: who has it is known at every instant, whoever else looks or tries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from serving.cli import down, home
from serving.config import ServingConfig, parse_config
from serving.errors import ConflictError


@pytest.fixture
def config(tmp_path: Path) -> ServingConfig:
    return parse_config({"home": str(tmp_path / "home")}, source="test")


@contextmanager
def meanwhile(*work: Callable[[], object]) -> Iterator[None]:
    """Each again and again, in a thread of its own."""
    over = threading.Event()

    def repeat(one: Callable[[], object]) -> None:
        while not over.is_set():
            one()

    threads = [threading.Thread(target=repeat, args=(one,)) for one in work]
    with ExitStack() as stack:
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(over.set)
        yield


@contextmanager
def home_user(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said its first line. It is killed in the end."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_to_look_stops_nobody_from_taking_a_free_home(config: ServingConfig) -> None:
    program = (
        "from pathlib import Path\n"
        "from serving.cli import home\n"
        "print('looking', flush=True)\n"
        f"while True: home.running(Path({str(config.home_dir)!r}))\n"
    )
    with home_user(program), home_user(program):
        for _ in range(1000):
            with home.hold(config):
                pass


def test_who_is_refused_learns_which_process_has_the_home(config: ServingConfig) -> None:
    """Also in the instant in which the other takes it."""
    refusals = []

    def take() -> None:
        try:
            with home.hold(config):
                pass
        except ConflictError as error:
            refusals.append(str(error))

    with meanwhile(take, take, take):
        while len(refusals) < 300:
            take()
    named = f"already runs on {config.home_dir} (process {os.getpid()})"
    assert [said for said in refusals if named not in said] == []


def test_it_is_free_again_when_its_process_is_killed(config: ServingConfig) -> None:
    program = (
        "import signal\n"
        "from serving.cli import home\n"
        "from serving.config import parse_config\n"
        f"with home.hold(parse_config({{'home': {str(config.home_dir)!r}}}, source='test')):\n"
        "    print('held', flush=True)\n"
        "    signal.pause()\n"
    )
    with home_user(program) as process:
        found = home.running(config.home_dir)
        assert found is not None
        assert found.pid == process.pid
        with pytest.raises(ConflictError, match=f"process {process.pid}"), home.hold(config):
            pass
    assert home.running(config.home_dir) is None
    with home.hold(config):
        pass


def test_to_look_leaves_no_file_behind(config: ServingConfig) -> None:
    assert home.running(config.home_dir) is None
    config.home_dir.mkdir()
    assert home.running(config.home_dir) is None
    assert list(config.home_dir.iterdir()) == []


def test_down_is_content_with_what_ended_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the look and the signal."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    looks = iter([home.Running(ended.pid, "", "")])
    monkeypatch.setattr(home, "running", lambda _: next(looks, None))
    monkeypatch.setenv("SERVING_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    down.run(None)
    assert capsys.readouterr().out == "stopped\n"
