"""A GPU that breaks under a replica, in processes that really end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from serving.replica.leaving import EXIT_DEVICE

from .client import Client
from .fakes import BREAKS

_REPLICA = """
import asyncio, sys, threading
from serving.replica.engine import Engine
from serving.replica.leaving import LastWords
from serving.replica.rules import BatchRules
from serving.replica.server import ReplicaServer
from tests.replica.fakes import FakeGpu

_, path, words, controller = sys.argv

async def tell(error):
    if controller == "raises":
        raise RuntimeError("nobody listens")
    with open(words, "a") as file:
        file.write(f"{error}\\n")
    if controller == "hangs":
        await asyncio.sleep(3600)

loop = asyncio.new_event_loop()
engine = Engine(FakeGpu(), BatchRules(64))
server = ReplicaServer(engine, path, {"replica": "r"})
engine.on_fatal = LastWords(server.stop, tell, loop)
server.start()
if controller != "blocked":
    threading.Thread(target=loop.run_forever, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("controller", ["listens", "hangs", "raises", "blocked"])
def test_it_tells_closes_its_sockets_and_ends_within_a_second(
    run_dir: Path, tmp_path: Path, controller: str
) -> None:
    path, words = run_dir / "r.sock", tmp_path / "words"
    command = [sys.executable, "-c", _REPLICA, str(path), str(words), controller]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with Client.unix(str(path)) as client, Client.unix(str(path)) as other:
            np.testing.assert_array_equal(client.infer(np.ones((2, 3), np.float32))[0], 2)
            started = time.monotonic()
            client.send_infer(np.full((1, 3), BREAKS, np.float32))
            # Neither gets an answer: a gateway sends both batches to another replica.
            for one in (client, other):
                with contextlib.suppress(ConnectionResetError):
                    assert one.sock.recv(1) == b""
            closed_s = time.monotonic() - started
        assert child.wait(30) == EXIT_DEVICE
        ended_s = time.monotonic() - started
        assert child.stderr is not None
        log = child.stderr.read()
    assert closed_s < 1
    assert ended_s < 3
    reason = "cuda:0 can run nothing more in this process: an illegal access"
    if controller in ("listens", "hangs"):
        assert words.read_text() == f"{reason}\n"
    if controller in ("listens", "raises"):
        assert f"this replica exits: {reason}" in log
