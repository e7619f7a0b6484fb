"""Models on CUDA against the same models on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serving.errors import ArtifactError
from serving.replica.backends.base import RuntimeOptions, load_model
from serving.replica.golden import compare
from tests.gpu import zoo
from tests.gpu.conftest import Tell

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["resnet50", "transformer"])
def test_a_gpu_gives_what_the_cpu_gives(tmp_path: Path, name: str, tell: Tell) -> None:
    path, platform, signature = zoo.build(name, tmp_path)
    on_cpu = load_model(path, platform, RuntimeOptions("cpu"), signature)
    on_gpu = load_model(path, platform, RuntimeOptions("auto"), signature)
    assert (on_gpu.device, on_gpu.precision) == ("cuda:0", "TF32")
    assert on_gpu.meter is not None
    assert on_gpu.meter.uuid.startswith(("GPU-", "MIG-"))
    on_gpu.check()
    kept = []
    for rows in (1, 7, 8, 3):
        inputs = zoo.inputs(name, rows)
        kept.append((on_cpu.run(inputs), on_gpu.run(inputs)))
    # Compared last: what an earlier run gave must still be what it was.
    (spec,) = signature.outputs
    tell(off_by=[off_by(want, have) for (want,), (have,) in kept], device=on_gpu.meter.device_type)
    for (want,), (have,) in kept:
        assert np.isfinite(have).all()
        # Probabilities are below 1, and so is what they may be off by.
        compare(spec, have, want, on_gpu.precision, least_scale=1e-3)
        # TF32 takes 3 % of the tolerance here; another row's answer is beyond it.
        for shift in range(1, len(want)):
            with pytest.raises(ArtifactError):
                compare(spec, np.roll(have, shift, 0), want, on_gpu.precision, least_scale=1e-3)
    on_gpu.check()


def test_weights_of_lower_precision_stay_within_its_tolerance(tmp_path: Path, tell: Tell) -> None:
    path, platform, signature = zoo.build("transformer", tmp_path)
    on_cpu = load_model(path, platform, RuntimeOptions("cpu"), signature)
    options = RuntimeOptions("cuda", torch={"dtype": "bfloat16"})
    on_gpu = load_model(path, platform, options, signature)
    inputs = zoo.inputs("transformer", 4)
    (want,), (have,) = on_cpu.run(inputs), on_gpu.run(inputs)
    assert have.dtype == np.float32
    tell(off_by=off_by(want, have))
    compare(signature.outputs[0], have, want, on_gpu.precision)
    with pytest.raises(ArtifactError):
        compare(signature.outputs[0], np.roll(have, 1, 0), want, on_gpu.precision)


def off_by(want: np.ndarray, have: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(have - want).max() / np.abs(want).max())
