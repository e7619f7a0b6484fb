"""How `tune` deals with children that fail, die, hang or leave others behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.core.tuning import AS_EXPORTED
from serving.errors import ArtifactError
from serving.replica import tuning
from serving.replica.tuning import Space, Tuned, tune

CHILD = """
import json, os, signal, sys

def say(found):
    print(json.dumps(found), flush=True)

try:
    os.mkdir("first")
    first = True
except FileExistsError:
    first = False
with open("pids", "a") as file:
    file.write(f"{os.getpid()}\\n")

def special(size):
    return False

SPECIAL

for line in sys.stdin:
    asked = json.loads(line)
    size = asked["max_size"]
    if "bundle" in asked:
        say({"device": "cpu"})
    elif not special(size):
        rows = 1000 * size
        say({"requests": rows, "seconds": 1.0, "run_rows": rows, "latencies": [0.001]})
"""
Children = Callable[[str], None]


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    """Has `tune` start children with some special behaviour."""
    monkeypatch.chdir(tmp_path)

    def use(special: str) -> None:
        script = CHILD.replace("SPECIAL", textwrap.dedent(special))
        monkeypatch.setattr(tuning, "_COMMAND", (sys.executable, "-c", script))

    return use


def measured(sizes: tuple[int, ...], instances: int) -> Tuned:
    space = Space(Path("x"), "cpu", {}, {}, None, (AS_EXPORTED,), sizes, (instances,))
    return tune(space, 1.0, lambda device, count: None, lambda line: None)


def pids() -> list[int]:
    return [int(line) for line in Path("pids").read_text().split()]


def await_end(pid: int) -> None:
    """Returns once it has ended, reaped or not."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        if stat.rpartition(")")[2].split()[0] in "ZX":
            return
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} is alive")


def test_after_an_error_of_one_instance_the_others_answers_go_to_their_own_setting(
    children: Children,
) -> None:
    children(
        """
        def special(size):
            if first and size == 4:
                say({"error": "out of memory"})
                return True
        """
    )
    tuned = measured((1, 4, 8), 2)
    together = [m for m in tuned.found if m.setting.concurrency > 1]
    assert {m.setting.max_size for m in together} == {1, 8}
    assert all(m.throughput == 2000 * m.setting.max_size for m in together)
    assert tuned.left_out
    assert all("max_size 4" in why and "out of memory" in why for why in tuned.left_out)


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("""sys.stdout.write('{"requests": 10, "lat')""", "ended with status 7"),
        ("pass", "ended with status 7"),
        ("print('{]')", "gave no proper answer"),
        ("print('3')", "gave no proper answer"),
    ],
)
def test_an_answer_that_is_cut_off_is_the_end_of_the_child(
    children: Children, ending: str, words: str
) -> None:
    children(
        f"""
        def special(size):
            if size == 4:
                {ending}
                sys.stdout.flush()
                os._exit(7)
        """
    )
    tuned = measured((1, 4), 1)
    assert {m.setting.max_size for m in tuned.found} == {1}
    assert f"max_size 4, 4 in flight: the process of an instance {words}" in tuned.left_out[0]


FORK = """
ready, told = os.pipe()
pid = os.fork()
if pid == 0:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.write(told, b"x")
    signal.pause()
os.read(ready, 1)
with open("pids", "a") as file:
    file.write(f"{pid}\\n")
"""


def test_processes_that_a_child_started_are_ended_too(children: Children) -> None:
    children(FORK)
    assert measured((1,), 1).found
    assert len(pids()) == 2
    for pid in pids():
        await_end(pid)


def test_a_child_that_dies_is_noticed_though_another_has_its_pipe(children: Children) -> None:
    children(FORK + "sys.exit(3)\n")
    with pytest.raises(ArtifactError, match="ended with status 3"):
        measured((1,), 1)
    for pid in pids():
        await_end(pid)


def test_a_child_that_hangs_is_killed_in_time(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_LOAD_TIMEOUT_S", 5.0)
    children("signal.pause()")
    with pytest.raises(ArtifactError, match=r"took longer than 5 s"):
        measured((1,), 1)
    for pid in pids():
        await_end(pid)


TUNES = """
import signal
import sys
from pathlib import Path
from serving.core.tuning import AS_EXPORTED
from serving.replica import tuning

# Under nohup it would be ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
tuning._COMMAND = (sys.executable, "-c", sys.argv[1])
space = tuning.Space(Path("x"), "cpu", {}, {}, None, (AS_EXPORTED,), (1,), (1,))
tuning.tune(space, 1.0, lambda device, count: None, lambda line: None)
"""
DIES_WITH = """
import sys
from serving.replica.load_run import _die_with
_die_with(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("number", "status", "child"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, ""),
        (signal.SIGHUP, 128 + signal.SIGHUP, ""),
        (signal.SIGKILL, -signal.SIGKILL, DIES_WITH),
    ],
    ids=["SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_a_child_that_hangs_ends_with_the_command(
    tmp_path: Path, number: signal.Signals, status: int, child: str
) -> None:
    fifo = tmp_path / "told"
    os.mkfifo(fifo)
    hangs = f"""
import os, signal
with open({str(fifo)!r}, "w") as told:
    told.write(str(os.getpid()))
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", TUNES, child + hangs]) as process:
        pid = int(fifo.read_text())
        process.send_signal(number)
        assert process.wait(30) == status
    await_end(pid)
