import os
import subprocess
import sys

import pytest

from benchmarks import processes


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::ServeReplica:gateway:Gateway"], "ServeReplica:gateway:Gateway"),
        (["ray::ServeReplica:model-a.b-v1:M.handle_request"], "ServeReplica:model-a.b-v1:M"),
        (["ray::ServeController.listen_for_change"], "ServeController"),
        (["/opt/ray/raylet", "--raylet_socket_name=/tmp/x"], "raylet"),
        (["/v/bin/python3", "-u", "/opt/ray/log_monitor.py", "--x"], "log_monitor.py"),
        (["python", "-m", "benchmarks.peers.bare_asgi", "m"], "benchmarks.peers.bare_asgi"),
        (["/v/bin/python", "/v/bin/serving", "up"], "serving"),
        ([], "(exiting)"),
    ],
)
def test_role_names_a_process_by_its_command(command: list[str], role: str):
    assert processes.role(command) == role


def test_data_path_is_chosen_by_prefix_and_is_everything_without_one():
    assert processes.on_data_path("ServeReplica:gateway:Gateway", ["ServeReplica:gateway:"])
    assert not processes.on_data_path("ServeReplica:controller:C", ["ServeReplica:gateway:"])
    assert processes.on_data_path("raylet", [])


BUSY_CHILD = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
SHELL = ["sh", "-c", f'{sys.executable} -c "$0"; exit', BUSY_CHILD]


def test_meter_counts_the_cpu_time_of_descendants():
    # The shell's child is busy for half a second, then waits for a line.
    with subprocess.Popen(SHELL, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with processes.Meter(process.pid) as meter:
            assert process.stdout is not None
            process.stdout.readline()
        process.communicate(b"\n")
    assert 0.45 < sum(meter.by_role.values()) < 1.0
    assert 0.0 <= meter.others <= 1.0


def test_memory_is_read_where_asked_for():
    [own] = [p for p in processes.usage(os.getpid(), memory=True) if p.pid == os.getpid()]
    assert own.rss >= own.pss > 0
