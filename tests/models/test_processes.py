"""The processes of a session."""

from __future__ import annotations

import subprocess
import time

from models.processes import session


def test_session_finds_an_orphan() -> None:
    # The leader ends at once and leaves a child that has another parent by then.
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 60 & exit"], start_new_session=True, stdin=subprocess.DEVNULL
    )
    leader.wait()
    [orphan] = session(leader.pid)
    assert orphan.ppid() != leader.pid
    orphan.kill()
    deadline = time.monotonic() + 10
    while session(leader.pid):
        assert time.monotonic() < deadline
