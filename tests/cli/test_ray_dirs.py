"""Directories of embedded Rays: short enough, named where one failed, and not kept for ever."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from serving import compose
from serving.cli import ray_dirs
from serving.errors import ClusterError, ConflictError

DAY_S = 86_400
SOCKET_PATH = 107
SESSION = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SOCKET = "12345678/r-1234567890123456.sock"


@pytest.fixture
def long_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / ("long" * 20)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


def test_sockets_fit_where_the_temporary_directory_is_long(long_temp: Path) -> None:
    assert tempfile.gettempdir() == str(long_temp)
    with ray_dirs.held() as directory:
        assert len(str(directory / SESSION)) <= SOCKET_PATH
        assert directory.is_dir()
    assert not directory.exists()
    prefix = compose.run_prefix(long_temp / "home", embedded=True)
    assert len(prefix + SOCKET) <= SOCKET_PATH


def test_a_short_temporary_directory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="sg-", dir="/tmp") as parent:
        monkeypatch.setenv("RAY_TMPDIR", parent)
        with ray_dirs.held() as directory:
            assert directory.parent == Path(parent)
        monkeypatch.setenv("RAY_TMPDIR", f"{parent}/none")
        with (
            pytest.raises(ClusterError, match=f"{parent}/none: No such file"),
            ray_dirs.held(),
        ):
            pass


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where directories of Rays are made."""
    monkeypatch.setattr(ray_dirs, "_MOST", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


def failed() -> Path:
    """The logs that a Ray left."""
    made = []

    def fail() -> None:
        with ray_dirs.held() as directory:
            made.append(directory / "session_latest" / "logs")
            made[0].mkdir(parents=True)
            (made[0] / "raylet.out").touch()
            raise ConflictError("the port is taken")

    with pytest.raises(ConflictError) as caught:
        fail()
    assert str(caught.value) == f"the port is taken; logs in {made[0]}"
    assert (made[0] / "raylet.out").exists()
    return made[0]


def test_what_fails_before_there_are_logs_leaves_nothing(parent: Path) -> None:
    with pytest.raises(ClusterError, match=r"no Ray$"), ray_dirs.held():
        raise ClusterError("no Ray")
    assert list(parent.iterdir()) == []


def test_logs_of_a_failure_are_named_and_kept_for_a_day(parent: Path) -> None:
    logs = failed()
    ray_dirs.remove_old(parent, time.time() + DAY_S - 60)
    assert logs.exists()
    ray_dirs.remove_old(parent, time.time() + DAY_S + 60)
    assert list(parent.iterdir()) == []


def test_what_a_killed_one_leaves_is_removed_when_its_ray_is_gone(parent: Path) -> None:
    directory = parent / "serving-ray-12345678"
    directory.mkdir()
    (directory / "serving-up.lock").touch()
    helper_of_ray = ["bash", "-c", "read", "agent", f"--temp-dir={directory}"]
    with subprocess.Popen(helper_of_ray, stdin=subprocess.PIPE) as helper:
        ray_dirs.remove_old(parent, time.time() + 10)
        assert directory.exists(), "a process of its Ray still runs"
        helper.communicate()
    ray_dirs.remove_old(parent, time.time())
    assert directory.exists(), "it may be one that is about to be locked"
    ray_dirs.remove_old(parent, time.time() + 10)
    assert not directory.exists()


def test_a_day_counts_from_the_last_line_of_a_log(parent: Path) -> None:
    """Not from the start: it may have run for long."""
    logs, now = failed(), time.time()
    for path in (logs.parents[1], *logs.parents[1].rglob("*")):
        os.utime(path, (now - 9 * DAY_S, now - 9 * DAY_S))
    (logs / "raylet.out").write_text("the last word")
    ray_dirs.remove_old(parent, now)
    assert logs.exists()


def test_the_next_one_removes_only_what_we_left(parent: Path) -> None:
    held_by_nobody = failed().parents[1]
    strange = parent / "serving-ray-of-mine"
    strange.mkdir()
    (parent / "serving-ray-link").symlink_to(strange)
    old = time.time() - 2 * DAY_S
    with ray_dirs.held() as running:
        for path in (*parent.iterdir(), *held_by_nobody.rglob("*"), *running.rglob("*")):
            os.utime(path, (old, old), follow_symlinks=False)
        with ray_dirs.held() as second:
            assert {*parent.iterdir()} == {running, second, strange, parent / "serving-ray-link"}
