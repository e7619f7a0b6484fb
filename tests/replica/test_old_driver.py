"""A driver that is older than what the runtimes are built for, under the real runtimes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from . import models

# A build for CPUs, which the tests may run on, is said to be one for CUDA.
_CODE = """
import logging, sys
from pathlib import Path
import onnxruntime
import torch
from serving.artifacts import EXPORT_PLATFORM, ONNX_PLATFORM
from serving.errors import DeviceError
from serving.replica.backends.base import RuntimeOptions, load_model
onnxruntime.cuda_version = torch.version.cuda = "13.0"
logging.basicConfig(format="%(message)s", stream=sys.stdout)
for model, platform in zip(sys.argv[1:], (ONNX_PLATFORM, EXPORT_PLATFORM)):
    for device in ("cuda", "auto"):
        try:
            print(load_model(Path(model), platform, RuntimeOptions(device), None).device)
        except DeviceError as error:
            print(error)
"""


def test_a_driver_that_is_too_old_is_named_and_no_silent_fallback(
    cuda_library: Path, tmp_path: Path
) -> None:
    files = models.linear(tmp_path / "m.onnx"), models.export_net(tmp_path / "m.pt2")
    path = f"{cuda_library}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    env = {**os.environ, "LD_LIBRARY_PATH": path, "FAKE_CUDA_DRIVER": "12040"}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        timeout=120,
    )
    reasons = [
        f"the NVIDIA driver supports CUDA 12.4; {runtime} is built for CUDA 13.0, which needs "
        "driver 580 or newer"
        for runtime in ("ONNX Runtime", "torch")
    ]
    said = done.stdout.splitlines()
    assert said[0::3] == [
        f"device: cuda: {reason}; update the driver, or set `device: cpu`" for reason in reasons
    ]
    assert said[1::3] == [f"{reason}: running on the CPU" for reason in reasons]
    assert said[2::3] == ["cpu", "cpu"]
