"""The processes of a `serving up` that was started as the leader of a session."""

from __future__ import annotations

import contextlib
import os

import psutil


def session(leader: int) -> list[psutil.Process]:
    """What runs of the session that `leader` began, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found
