"""The watchdog, in processes that it really ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from serving.replica.leaving import EXIT_STALLED

from .client import Client

_HANGING_REPLICA = """
import sys, threading, time
import numpy as np
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.engine import Engine
from serving.replica.rules import BatchRules
from serving.replica.server import ReplicaServer
from serving.replica.watchdog import Watchdog

class Sleeper:
    signature = Signature(
        (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), Batch.DYNAMIC
    )
    platform, device, precision = "test", "cpu", "FP32"

    def run(self, inputs):
        if inputs[0][0] > 60:
            print("hangs", flush=True)
        threading.Event().wait(float(inputs[0][0]))
        return list(inputs)

engine = Engine(Sleeper(), BatchRules(64))
server = ReplicaServer(engine, sys.argv[1], {"replica": "r"})
server.start()
Watchdog(engine, 2.0).start()
print("ready", flush=True)
sys.stdin.read()
"""


def start(path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _HANGING_REPLICA, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_run_that_hangs_ends_the_process_and_its_connections(run_dir: Path) -> None:
    path = run_dir / "r.sock"
    with start(path) as child:
        with Client.unix(str(path)) as client, Client.unix(str(path)) as waiting:
            # A run shorter than the timeout is none of the watchdog's business.
            assert client.infer(np.full(1, 0.1, np.float32))[0] == np.float32(0.1)
            started = time.monotonic()
            client.send_infer(np.full(1, 3600, np.float32))
            assert child.stdout is not None
            assert child.stdout.readline() == "hangs\n"
            waiting.send_infer(np.full(1, 0, np.float32))
            for one in (client, waiting):
                with contextlib.suppress(ConnectionResetError):
                    assert one.sock.recv(1) == b""
        assert child.wait(30) == EXIT_STALLED
        assert 2 <= time.monotonic() - started < 30
        assert child.stderr is not None
        assert "stall_timeout_s is 2" in child.stderr.read()


_PARENT = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], sys.argv[2]], stdin=sys.stdin, stdout=subprocess.PIPE
)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_a_replica_does_not_outlive_the_process_that_started_it(run_dir: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, _HANGING_REPLICA, str(run_dir / "r.sock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        replica = int(parent.stdout.readline())
        ended = os.pidfd_open(replica)
        parent.send_signal(signal.SIGKILL)
        # A process descriptor becomes readable when its process has ended.
        assert select.select([ended], [], [], 30)[0]
        os.close(ended)
