"""Directories of embedded Rays, for logs and sockets: made, named where one failed, removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from serving.errors import ClusterError, OperatorError

_PREFIX: Final = "serving-ray-"
_RANDOM: Final = 8
# 107 less "/", 42 characters of session name and "/sockets/plasma_store".
_MOST: Final = 43
_SHORT_TEMP: Final = Path("/tmp")
_LOCK: Final = "serving-up.lock"
_FAILED: Final = "serving-up.failed"
_KEPT_S: Final = 86_400.0
# Longer than it takes to lock a directory that was just made.
_NEW_S: Final = 5.0


@contextlib.contextmanager
def held() -> Iterator[Path]:
    """A new directory in RAY_TMPDIR or TMPDIR; where that is too long for a socket's path, in /tmp.

    It is removed in the end, but kept for its logs where something failed: an `OperatorError` says
    where they are. First those of others are removed, see `remove_old`. Raises `ClusterError`.
    """
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(str(parent / _PREFIX)) + _RANDOM > _MOST:
        parent = _SHORT_TEMP
    remove_old(parent, time.time())
    try:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise ClusterError(
            f"no directory for Ray can be made in {parent}: {error.strerror or error}"
        ) from error
    logs = directory / "session_latest" / "logs"
    with (directory / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield directory
        except OperatorError as error:
            if logs.is_dir():
                (directory / _FAILED).touch()
                raise type(error)(f"{error}; logs in {logs}") from error
            shutil.rmtree(directory, ignore_errors=True)
            raise
    shutil.rmtree(directory, ignore_errors=True)


def remove_old(parent: Path, now: float) -> None:
    """Remove this user's directories in `parent` that nobody holds and whose Ray is gone.

    Logs of a failure stay until they are unchanged for a day. `now` is Unix seconds. What `held`
    has not made, or cannot be removed, stays.
    """
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with (directory / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if now - _youngest(directory) > _kept_s(directory) and not _is_used(directory):
                    shutil.rmtree(directory, ignore_errors=True)


def _youngest(directory: Path) -> float:
    # A lock is as old as its `serving up`, logs are as young as their last line.
    return max(path.lstat().st_mtime for path in directory.rglob("*"))


def _kept_s(directory: Path) -> float:
    return _KEPT_S if (directory / _FAILED).exists() else _NEW_S


def _is_used(directory: Path) -> bool:
    """Whether a process of its Ray runs: where `serving up` was killed, some outlive it shortly."""
    import psutil

    return any(
        str(directory) in part
        for process in psutil.process_iter(["cmdline"])
        for part in process.info["cmdline"] or ()
    )
