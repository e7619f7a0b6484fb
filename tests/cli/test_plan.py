"""`serving plan`, and what an apply says where memory is short, against the real admin API."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.cli.plan_render import placement_view
from serving.cli.render import show_view
from serving.core.gpus import Gpu, GpuSample, NodeReport
from tests.cli.admin import admin_api
from tests.e2e.deployment import serving

GIB = 1 << 30
NAMES = ("GPU-1b2c3d4e-0000", "GPU-9d8c7b6a-0000")
REPORT = NodeReport(
    "n1",
    "host-1",
    gpus=tuple(
        (
            Gpu(uuid, "n1", i, "NVIDIA L4", 24 * GIB),
            GpuSample(1.0, memory_used=0.0, memory_reserved=0.0, throttle=(), processes=()),
        )
        for i, uuid in enumerate(NAMES)
    ),
).to_dict()
MODELS = {
    "digits": {"version": "1", "gpu_memory_bytes": 15 * GIB},
    "small": {"version": "1", "device": "cpu"},
}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with admin_api(tmp_path, MODELS, [REPORT]) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def too_much(tmp_path: Path) -> Path:
    """A third model that needs more than any GPU has left."""
    path = tmp_path / "more.yaml"
    path.write_text(
        "models:\n"
        f"  digits: {{version: 1, rollout: immediate, gpu_memory_bytes: {15 * GIB}}}\n"
        "  small: {version: 1, rollout: immediate, device: cpu}\n"
        f"  large: {{version: 2, rollout: immediate, gpu_memory_bytes: {25 * GIB}}}\n"
    )
    return path


def ran(url: str, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return serving(*arguments, "--url", url, home=home, env={"LC_ALL": "C.UTF-8"})


REFUSED = (
    "large version 2: needs 25.0 GiB as gpu_memory_bytes says; the largest free is 24.0 GiB on "
    "GPU-9d8c7b6a-0000"
)


def test_the_plan_says_where_everything_goes(url: str, tmp_path: Path) -> None:
    done = ran(url, tmp_path, "plan")
    assert (done.returncode, done.stderr) == (0, "")
    digits, small = (
        next(line.split() for line in done.stdout.splitlines() if line.split()[:1] == [name])
        for name in ("digits", "small")
    )
    assert digits[1:5] == ["1", "1", "15.0", "GiB"]
    assert digits[-3:] == ["GPU-1b2c3d4e-0000", "(to", "come)"]
    assert small[-1] == "CPU"
    gpu = next(line for line in done.stdout.splitlines() if line.split()[:1] == [NAMES[0]])
    assert "15.0 GiB" in gpu
    assert "9.0 GiB" in gpu


def test_the_plan_of_a_configuration_says_what_has_no_room(
    url: str, tmp_path: Path, too_much: Path
) -> None:
    done = ran(url, tmp_path, "plan", too_much)
    assert done.returncode == 1
    assert done.stderr == f"error: this would be refused: {REFUSED}\n"
    assert REFUSED in done.stdout
    shown = json.loads(ran(url, tmp_path, "plan", too_much, "--json").stdout)
    assert [row["model"] for row in shown["models"] if row["refused"]] == ["large"]


def test_a_dry_run_shows_the_refusal_and_an_apply_changes_nothing(
    url: str, tmp_path: Path, too_much: Path
) -> None:
    dry = ran(url, tmp_path, "apply", "-f", too_much, "--dry-run")
    assert dry.returncode == 1
    assert dry.stderr == f"error: this would be refused: {REFUSED}\n"
    assert NAMES[0] in dry.stdout
    before = json.loads(ran(url, tmp_path, "status", "--json").stdout)["apply"]
    real = ran(url, tmp_path, "apply", "-f", too_much)
    assert real.returncode == 1
    (line,) = real.stderr.splitlines()
    assert "model 'large' version 2 needs 25.0 GiB" in line
    assert "nothing was changed" in line
    assert json.loads(ran(url, tmp_path, "status", "--json").stdout)["apply"] == before


def test_without_gpus_the_plan_says_so(tmp_path: Path) -> None:
    with admin_api(tmp_path, MODELS) as port:
        done = ran(f"http://127.0.0.1:{port}", tmp_path, "plan")
    assert done.returncode == 0
    assert "no GPU is known: nothing is placed by memory" in done.stdout


def test_who_stays_on_a_cordoned_gpu_and_what_was_learned_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    why = "needs 20.0 GiB; the largest free is 4.0 GiB on GPU-b (1 cordoned)"
    row = {
        "model": "m", "version": "1", "new": False, "replicas": 1, "bytes": 20 << 30,
        "basis": "", "estimated": False, "slots": [], "refused": None, "stays": why,
        "ceilings": {"NVIDIA L4": 24},
    }  # fmt: skip
    gpu = {
        "uuid": "GPU-a", "type": "L4", "cordoned": True, "throttled": False,
        **dict.fromkeys(
            ["memory_bytes", "leased_bytes", "planned_bytes", "others_bytes", "free_bytes"], 0
        ),
    }  # fmt: skip
    show_view(placement_view({"models": [row], "gpus": [gpu]}))
    printed = capsys.readouterr().out
    assert f"m version 1 stays on a cordoned GPU: {why}" in printed
    assert (
        "m version 1: runs have at most 24 rows on NVIDIA L4, as larger ones ran out of memory"
        in printed
    )
