"""What cannot become a bundle, and models that misbehave while they are looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from serving.artifacts import ONNX_PLATFORM
from serving.errors import ArtifactError
from serving.replica.inspect import inspect_in_child

from . import models
from .conftest import look, save_npz


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.ones((1, 4), np.float32)}, "holds z; the inputs are x"),
        ({"x": np.ones((1, 5), np.float32)}, r"s\.npz: 'x' has shape \[1, 5\], not \[-1, 4\]"),
        ({"x": np.ones(4, np.float32)}, r"'x' has shape \[4\], not \[-1, 4\]"),
        ({"x": np.array([["a"] * 4])}, "'x' is <U1, not FP32"),
        ({"x": np.ones((0, 4), np.float32)}, r"s\.npz: has no rows"),
        ({"x": np.array([{}])}, "not an .npz of plain arrays: Object arrays cannot be loaded"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(
    tmp_path: Path, out: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    sample = save_npz(tmp_path / "s.npz", **arrays)
    with pytest.raises(ArtifactError, match=message):
        look(models.linear(tmp_path / "m.onnx"), out, sample=sample)


def test_a_model_that_no_generated_value_fits_asks_for_a_sample(tmp_path: Path, out: Path) -> None:
    model = models.save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "W"], ["p"])],
        [("x", TensorProto.FLOAT, ["batch", "width"])],
        [("p", TensorProto.FLOAT, ["batch", 1])],
        {"W": np.ones((13, 1), np.float32)},
    )
    with pytest.raises(
        ArtifactError, match="generated values do not fit this model: give a sample"
    ):
        look(model, out)


def test_a_model_that_answers_differently_each_time_is_refused(tmp_path: Path, out: Path) -> None:
    model = models.save_onnx(
        tmp_path / "m.onnx",
        [
            helper.make_node("RandomNormalLike", ["x"], ["noise"]),
            helper.make_node("Add", ["x", "noise"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["batch", 2])],
        [("y", TensorProto.FLOAT, ["batch", 2])],
    )
    with pytest.raises(ArtifactError, match="different outputs for the same inputs"):
        look(model, out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.onnx", None, "there is no such file"),
        ("m.h5", b"x", "cannot serve a .h5; allowed: .onnx, .pt2"),
        ("m.onnx", b"", "is empty"),
        ("m.onnx", b"\x08\x01garbage", "m.onnx: "),
        ("m.pt2", b"garbage", "torch cannot load it: "),
        ("m.pt", b"garbage", "torch cannot load it: "),
    ],
)
def test_a_file_that_cannot_be_served_is_one_clear_line(
    tmp_path: Path, out: Path, name: str, content: bytes | None, message: str
) -> None:
    model = tmp_path / name
    if content is not None:
        model.write_bytes(content)
    sample = save_npz(tmp_path / "s.npz", x=np.ones((1, 4), np.float32))
    with pytest.raises(ArtifactError, match=message) as error:
        inspect_in_child(model, out, sample=sample)
    assert str(error.value).startswith(str(model))
    assert "\n" not in str(error.value)


def test_a_bundle_is_never_written_over_something(tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ArtifactError, match="is not empty"):
        look(models.linear(tmp_path / "m.onnx"), out)


class Endless(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool((x == x).all()):
            x = x * 1
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_that_never_returns_is_ended(tmp_path: Path, out: Path) -> None:
    model = models.script(tmp_path / "m.ts", Endless())
    sample = save_npz(tmp_path / "s.npz", x=np.ones((1, 1), np.float32))
    with pytest.raises(ArtifactError, match="took longer than 8 s"):
        inspect_in_child(model, out, sample=sample, timeout_s=8)


class Greedy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1 << 40, dtype=torch.uint8)[: x.size(0)]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_that_takes_all_memory_is_ended(tmp_path: Path, out: Path) -> None:
    model = models.script(tmp_path / "m.ts", Greedy())
    sample = save_npz(tmp_path / "s.npz", x=np.ones((1, 1), np.float32))
    with pytest.raises(ArtifactError, match=r"cannot run its sample: .*memory"):
        inspect_in_child(model, out, sample=sample)


def test_the_command_prints_one_line_of_json_whatever_the_model_prints(
    tmp_path: Path, out: Path
) -> None:
    command = [sys.executable, "-m", "serving.replica.inspect"]
    good = models.linear(tmp_path / "m.onnx")
    done = subprocess.run([*command, good, "--out", out], capture_output=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["platform"] == ONNX_PLATFORM
    bad = subprocess.run(
        [*command, tmp_path / "no.onnx", "--out", out], capture_output=True, check=False
    )
    assert bad.returncode == 1
    assert list(json.loads(bad.stdout)) == ["error"]
    assert bad.stdout.count(b"\n") == 1


def test_a_child_that_crashes_is_reported(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho something broke >&2\nkill -SEGV $$\n")
    crash.chmod(0o700)
    monkeypatch.setattr(sys, "executable", os.fspath(crash))
    with pytest.raises(ArtifactError, match="ended with status -11: something broke"):
        inspect_in_child(models.linear(tmp_path / "m.onnx"), out)
