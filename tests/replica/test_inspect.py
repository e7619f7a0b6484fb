"""From a model file to a bundle, in a child process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from serving.artifacts import (
    EXPORT_PLATFORM,
    GOLDEN_FILE,
    ONNX_PLATFORM,
    SAMPLE_FILE,
    TORCHSCRIPT_PLATFORM,
    build_manifest,
    read_signature,
    write_manifest,
)
from serving.core.replica import ReplicaSpec
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import ArtifactError
from serving.replica.golden import load_arrays
from serving.replica.inspect import inspect_in_child
from serving.replica.loading import load_engine

from . import models
from .conftest import look, save_npz


def loads_for_serving(out: Path, tmp_path: Path) -> None:
    """A replica takes the bundle: digest, warm-up and golden check included."""
    manifest = build_manifest(out)
    write_manifest(out, manifest)

    def fetch(target: Path) -> None:
        for path in out.rglob("*"):
            if path.is_file():
                copy = target / path.relative_to(out)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())

    home = str(tmp_path / "home")
    load_engine(ReplicaSpec("m", "1", manifest.digest, home, "", device="cpu"), fetch)


def test_a_child_process_makes_a_bundle_that_a_replica_takes(tmp_path: Path, out: Path) -> None:
    found = inspect_in_child(models.linear(tmp_path / "any name.onnx"), out)
    assert found["platform"] == ONNX_PLATFORM
    assert Signature.from_dict(found["signature"]) == models.LINEAR
    assert (found["sample"], found["reason"]) == ("generated", "its rows are independent")
    assert sorted(p.name for p in out.iterdir()) == [
        "golden.npz",
        "model.onnx",
        "sample.npz",
        "signature.json",
    ]
    info = read_signature(out)
    assert (info.signature, info.model_file) == (models.LINEAR, "model.onnx")
    (x,) = load_arrays(out / SAMPLE_FILE, info.signature.inputs)
    (p,) = load_arrays(out / GOLDEN_FILE, info.signature.outputs)
    np.testing.assert_allclose(p, x @ models.LINEAR_W, rtol=1e-5)
    loads_for_serving(out, tmp_path)


def test_the_same_model_gives_the_same_bundle(tmp_path: Path) -> None:
    model = models.linear(tmp_path / "m.onnx")
    digests = []
    for name in ("a", "b"):
        look(model, tmp_path / name)
        digests.append(build_manifest(tmp_path / name).digest)
    assert digests[0] == digests[1]


def test_external_data_goes_along(tmp_path: Path, out: Path) -> None:
    model = models.linear(tmp_path / "m.onnx", external="weights.bin")
    look(model, out)
    assert (out / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    loads_for_serving(out, tmp_path)


def test_external_data_behind_a_link_is_refused(tmp_path: Path, out: Path) -> None:
    model = models.linear(tmp_path / "m.onnx", external="weights.bin")
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ArtifactError, match="external data behind a link is refused"):
        look(model, out)


def test_missing_external_data_is_named(tmp_path: Path, out: Path) -> None:
    model = models.linear(tmp_path / "m.onnx", external="weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"cannot be copied: .*weights\.bin"):
        look(model, out)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_outside_the_models_directory_is_refused(
    tmp_path: Path, out: Path, location: str
) -> None:
    model = models.linear(tmp_path / "m.onnx", external="abcdefghijklmn")
    content = model.read_bytes()
    # The protobuf's length prefixes stay right when the name keeps its length.
    padded = location.ljust(14, "x").encode()
    model.write_bytes(content.replace(b"abcdefghijklmn", padded))
    with pytest.raises(ArtifactError, match="only plain paths inside the bundle are allowed"):
        look(model, out)


def test_an_exported_program(tmp_path: Path, out: Path) -> None:
    found = inspect_in_child(models.export_net(tmp_path / "net.pt2"), out)
    assert found["platform"] == EXPORT_PLATFORM
    assert Signature.from_dict(found["signature"]) == models.NET
    loads_for_serving(out, tmp_path)


def test_an_exported_program_with_frozen_rows(tmp_path: Path, out: Path) -> None:
    look(models.export_net(tmp_path / "net.pt2", dynamic=False, rows=4), out)
    signature = read_signature(out).signature
    assert (signature.batch, signature.fixed_rows) == (Batch.FIXED, 4)
    assert signature.inputs == models.NET.inputs
    loads_for_serving(out, tmp_path)


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return x * factor


class Normed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
class TestTorchScript:
    def test_its_sample_shows_the_signature(self, tmp_path: Path, out: Path) -> None:
        model = models.script(tmp_path / "m.pt", Scaled())
        sample = save_npz(
            tmp_path / "s.npz",
            factor=np.full((2, 1), 3, np.float32),
            x=np.ones((2, 5), np.float32),
        )
        found = inspect_in_child(model, out, sample=sample)
        assert (found["platform"], found["sample"]) == (TORCHSCRIPT_PLATFORM, "given")
        signature = read_signature(out).signature
        assert signature.inputs == (
            TensorSpec("x", "FP32", (-1, 5)),
            TensorSpec("factor", "FP32", (-1, 1)),
        )
        assert signature.outputs == (TensorSpec("output0", "FP32", (-1, 5)),)
        assert signature.batch is Batch.DYNAMIC
        np.testing.assert_array_equal(load_arrays(out / GOLDEN_FILE, signature.outputs)[0], 3)
        loads_for_serving(out, tmp_path)

    def test_rows_that_depend_on_each_other_are_one_request(
        self, tmp_path: Path, out: Path
    ) -> None:
        model = models.script(tmp_path / "m.ts", Normed())
        sample = save_npz(tmp_path / "s.npz", input0=np.eye(3, dtype=np.float32))
        look(model, out, sample=sample)
        signature = read_signature(out).signature
        assert signature.batch is Batch.NONE
        assert signature.inputs == (TensorSpec("input0", "FP32", (3, 3)),)
        loads_for_serving(out, tmp_path)

    def test_without_sample_and_signature_it_is_refused(self, tmp_path: Path, out: Path) -> None:
        model = models.script(tmp_path / "m.ts", Normed())
        with pytest.raises(ArtifactError, match="give a sample or a signature"):
            look(model, out)

    def test_a_given_signature_is_used(self, tmp_path: Path, out: Path) -> None:
        model = models.script(tmp_path / "m.ts", Scaled())
        given = Signature(
            (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "FP32", (-1, 2))),
            (TensorSpec("product", "FP32", (-1, 2)),),
            Batch.DYNAMIC,
        )
        path = tmp_path / "signature.json"
        path.write_text(json.dumps(given.to_dict()))
        look(model, out, signature=path)
        assert read_signature(out).signature == given
        loads_for_serving(out, tmp_path)


def test_rows_that_depend_on_each_other_are_not_merged(tmp_path: Path, out: Path) -> None:
    found = look(models.rows_depend(tmp_path / "m.onnx"), out)
    assert found["reason"].startswith("its rows are not independent: golden check: output 'y'")
    signature = read_signature(out).signature
    assert (signature.batch, signature.inputs[0].shape) == (Batch.NONE, (-1, 2))
    loads_for_serving(out, tmp_path)


def test_rows_that_depend_a_little_in_small_outputs_are_not_merged(
    tmp_path: Path, out: Path
) -> None:
    model = models.save_onnx(
        tmp_path / "m.onnx",
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
            helper.make_node("Mul", ["mean", "little"], ["influence"]),
            helper.make_node("Add", ["x", "influence"], ["sum"]),
            helper.make_node("Mul", ["sum", "scale"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["batch", 2])],
        [("y", TensorProto.FLOAT, ["batch", 2])],
        {"little": np.array(0.02, np.float32), "scale": np.array(0.002, np.float32)},
    )
    look(model, out)
    assert read_signature(out).signature.batch is Batch.NONE


def test_a_model_that_returns_another_number_of_rows_has_no_batch(
    tmp_path: Path, out: Path
) -> None:
    look(models.halves_rows(tmp_path / "m.onnx"), out)
    assert read_signature(out).signature.batch is Batch.NONE


def test_frozen_rows_that_depend_on_each_other_are_no_batch(tmp_path: Path, out: Path) -> None:
    model = models.save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [("x", TensorProto.FLOAT, [4])],
        [("y", TensorProto.FLOAT, [4])],
    )
    look(model, out)
    signature = read_signature(out).signature
    assert (signature.batch, signature.inputs[0].shape) == (Batch.NONE, (4,))


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        ("batch", "dynamic", (Batch.DYNAMIC, 0, (-1, 4))),
        ("batch", "none", (Batch.NONE, 0, (-1, 4))),
        (3, "fixed", (Batch.FIXED, 3, (-1, 4))),
        (3, "auto", (Batch.FIXED, 3, (-1, 4))),
        (1, "auto", (Batch.NONE, 0, (1, 4))),
        (1, "fixed", (Batch.FIXED, 1, (-1, 4))),
    ],
)
def test_the_batch_can_be_asked_for(
    tmp_path: Path, out: Path, rows: int | str, asked: str, expected: tuple[object, ...]
) -> None:
    look(models.linear(tmp_path / "m.onnx", rows=rows), out, batch=asked)
    s = read_signature(out).signature
    assert (s.batch, s.fixed_rows, s.inputs[0].shape) == expected
    loads_for_serving(out, tmp_path)


@pytest.mark.parametrize(("rows", "asked"), [(3, "dynamic"), ("batch", "fixed")])
def test_a_batch_that_the_shapes_forbid_is_refused(
    tmp_path: Path, out: Path, rows: int | str, asked: str
) -> None:
    with pytest.raises(ArtifactError, match=f"batch {asked}: "):
        look(models.linear(tmp_path / "m.onnx", rows=rows), out, batch=asked)


def test_a_stale_output_shape_is_corrected(tmp_path: Path, out: Path) -> None:
    model = models.save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Reshape", ["x", "to"], ["y"])],
        [("x", TensorProto.FLOAT, ["batch", "width"])],
        [("y", TensorProto.FLOAT, ["batch", 7])],
        {"to": np.array([0, -1], np.int64)},
    )
    look(model, out)
    assert read_signature(out).signature.outputs[0].shape == (-1, -1)


def test_text_models_get_digits_or_the_users_text(tmp_path: Path) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.STRING, ("batch", 1))
    look(model, tmp_path / "generated")
    specs = read_signature(tmp_path / "generated").signature.inputs
    (x,) = load_arrays(tmp_path / "generated" / SAMPLE_FILE, specs)
    assert all(e.isdigit() for e in x.reshape(-1))
    sample = save_npz(tmp_path / "s.npz", x=np.array([["größe"], [""]]))
    look(model, tmp_path / "given", sample=sample)
    specs = read_signature(tmp_path / "given").signature.outputs
    (y,) = load_arrays(tmp_path / "given" / GOLDEN_FILE, specs)
    assert y.tolist() == [["größe".encode()], [b""]]
    loads_for_serving(tmp_path / "given", tmp_path)


def test_floats_stand_for_bfloat16(tmp_path: Path, out: Path) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.BFLOAT16)
    sample = save_npz(tmp_path / "s.npz", x=np.array([[1.0, -2.0]]))
    look(model, out, sample=sample)
    (y,) = load_arrays(out / GOLDEN_FILE, read_signature(out).signature.outputs)
    assert y.tolist() == [[0x3F80, 0xC000]]
