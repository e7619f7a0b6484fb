"""`make demo` for real: trains, registers, serves, posts, prints, and leaves nothing running."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.cluster


@pytest.fixture
def directory() -> Iterator[Path]:
    # Short: Ray puts unix sockets in TMPDIR, whose paths end at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as name:
        yield Path(name)


# The demo with its first version only: training the others takes the most time.
SHORT = """
from models.digits import demo
demo._VERSIONS = demo._VERSIONS[:1]
raise SystemExit(demo.main())
"""


@contextmanager
def demo(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(directory)},
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def marked(directory: Path) -> list[psutil.Process]:
    """What runs with `directory` as its place for temporary files."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(directory):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_better_version_is_promoted_a_bad_one_taken_back_and_nothing_is_left(directory):
    with demo(directory, "-m", "models.digits.demo") as process:
        output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    rows = {
        version: (digest, runtime, accuracy)
        for version, digest, runtime, accuracy in re.findall(
            r"^ *([12]) +([0-9a-f]{8}) +(\w+) +cpu +[\d,]+ +([\d.]+)%", output, re.MULTILINE
        )
    }
    assert set(rows) == {"1", "2"}, output
    assert (rows["1"][1], rows["2"][1]) == ("onnx", "torch")
    assert 90 < float(rows["1"][2]) < float(rows["2"][2]) <= 100
    assert re.search(r"^✓ version 2: succeeded: ", output, re.MULTILINE), output
    assert re.search(r"^✓ version 3: rolled back: disagreement: ", output, re.MULTILINE), output
    assert marked(directory) == []
    assert list(directory.glob("serving-demo-*")) == []


def test_interrupted_at_the_start_of_the_gateway_it_leaves_nothing(directory):
    with demo(directory, "-c", SHORT) as process:
        for line in process.stdout:
            if "version 1 trained and registered" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "demo: interrupted; everything it started is stopped"
    assert marked(directory) == []
    assert list(directory.glob("serving-demo-*")) == []
