"""Samples, golden outputs, warm-up, and the way from a spec to a proven engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from serving.artifacts import (
    GOLDEN_FILE,
    ONNX_PLATFORM,
    SAMPLE_FILE,
    build_manifest,
    cache_dir,
    write_manifest,
    write_signature,
)
from serving.core.replica import ReplicaSpec
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import ArtifactError, DeviceError
from serving.replica.backends import cuda
from serving.replica.backends.base import Backend
from serving.replica.engine import Engine
from serving.replica.golden import compare, load_arrays, run_sample, save_arrays, warm_up
from serving.replica.loading import load_engine
from serving.replica.probing import to_bfloat16
from serving.replica.rules import rules_for

from . import models
from .conftest import Gate

X = np.arange(8, dtype=np.float32).reshape(2, 4)


class Bundle:
    """A bundle of the linear model and how to fetch it."""

    def __init__(self, directory: Path, home: Path, **golden: np.ndarray) -> None:
        directory.mkdir()
        self.directory, self.home = directory, home
        models.linear(directory / "model.onnx")
        write_signature(directory, models.LINEAR, platform=ONNX_PLATFORM, model_file="model.onnx")
        save_arrays(directory / SAMPLE_FILE, models.LINEAR.inputs, [X])
        recorded = golden.get("p", X @ models.LINEAR_W)
        save_arrays(directory / GOLDEN_FILE, models.LINEAR.outputs, [recorded])
        manifest = build_manifest(directory)
        write_manifest(directory, manifest)
        self.digest = manifest.digest
        self.fetched = 0

    def fetch(self, target: Path) -> None:
        self.fetched += 1
        shutil.copytree(self.directory, target, dirs_exist_ok=True)

    def spec(self, **settings: Any) -> ReplicaSpec:
        return ReplicaSpec(
            model="m", version="1", digest=self.digest, home=str(self.home), run_dir="", **settings
        )


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    for path in (tmp_path / "home").rglob("*"):
        path.chmod(0o700)


@pytest.fixture
def bundle(tmp_path: Path, home: Path) -> Bundle:
    return Bundle(tmp_path / "bundle", home)


def test_a_good_bundle_loads_and_is_fetched_once(bundle: Bundle) -> None:
    for _ in range(2):
        engine = load_engine(bundle.spec(device="cpu"), bundle.fetch).engine
        np.testing.assert_allclose(run_sample(engine, [X])[0], X @ models.LINEAR_W)
    assert bundle.fetched == 1


def test_a_golden_mismatch_refuses_with_the_numbers(tmp_path: Path, home: Path) -> None:
    wrong = X @ models.LINEAR_W
    wrong[1, 2] += 7
    wrong[0, 0] += 3
    bundle = Bundle(tmp_path / "bundle", home, p=wrong)
    with pytest.raises(ArtifactError) as error:
        load_engine(bundle.spec(device="cpu"), bundle.fetch)
    assert "output 'p' differs by at most 7 at [1, 2]: " in str(error.value)
    assert "allowed is 0.0165 + 0.001 × |recorded| (2 of 6 elements exceed it)" in str(error.value)


def test_a_tampered_artifact_is_refused_by_name(bundle: Bundle) -> None:
    load_engine(bundle.spec(device="cpu"), bundle.fetch)
    model = cache_dir(bundle.home, bundle.digest) / "model.onnx"
    model.chmod(0o600)
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx: was changed after it was registered"):
        load_engine(bundle.spec(device="cpu"), bundle.fetch)


def test_what_was_fetched_must_have_the_digest(bundle: Bundle) -> None:
    spec = replace(bundle.spec(device="cpu"), digest="sha256:" + "0" * 64)
    with pytest.raises(ArtifactError, match=r"its digest is sha256:.*, expected sha256:0000"):
        load_engine(spec, bundle.fetch)
    assert not cache_dir(bundle.home, spec.digest).exists()


@pytest.mark.skipif(cuda.missing_cuda() is None, reason="there is a GPU here")
def test_a_gpu_that_is_not_there_refuses_the_load(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="device: cuda"):
        load_engine(bundle.spec(device="cuda"), bundle.fetch)


def test_a_spec_survives_json(bundle: Bundle) -> None:
    spec = bundle.spec(buckets=(1, 8), onnx={"intra_op_threads": 2}, listen_tcp=True)
    assert ReplicaSpec.from_dict(spec.to_dict()) == spec
    assert spec.to_dict()["buckets"] == [1, 8]
    with pytest.raises(TypeError, match="colour"):
        ReplicaSpec.from_dict({**spec.to_dict(), "colour": 1})


@pytest.mark.parametrize(
    ("max_size", "buckets", "sizes"),
    [
        (64, None, [1, 64]),
        (1, None, [1]),
        (64, (1, 4, 64), [1, 4, 64]),
        (10, (4, 16), [4, 16]),
    ],
)
def test_warm_up_runs_every_size(
    linear_backend: Backend, max_size: int, buckets: tuple[int, ...] | None, sizes: list[int]
) -> None:
    gate = Gate(linear_backend)
    gate.open()
    warm_up(Engine(gate, rules_for(gate, max_size, buckets)), [X])
    assert gate.batches == sizes


def test_a_warm_up_that_fails_says_at_how_many_rows(tmp_path: Path) -> None:
    backend = models.cpu_backend(
        models.halves_rows(tmp_path / "m.onnx"), ONNX_PLATFORM, models.identity_signature("FP32")
    )
    with pytest.raises(ArtifactError, match="warm-up at 8 rows: output 'y' came back with 4 rows"):
        warm_up(Engine(backend, rules_for(backend, 8)), [np.ones((3, 2), np.float32)])


def test_a_long_sample_runs_in_pieces(linear_backend: Backend) -> None:
    gate = Gate(linear_backend)
    gate.open()
    x = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    (p,) = run_sample(Engine(gate, rules_for(gate, 4)), [x])
    np.testing.assert_allclose(p, x @ models.LINEAR_W, rtol=1e-4, atol=1e-5)
    assert gate.batches == [4, 4, 2]


def spec(datatype: str) -> TensorSpec:
    return TensorSpec("y", datatype, (-1,))


def same(datatype: str, got: np.ndarray, expected: np.ndarray, precision: str = "FP32") -> bool:
    try:
        compare(spec(datatype), got, expected, precision)
    except ArtifactError:
        return False
    return True


@pytest.mark.parametrize(
    ("datatype", "precision", "allowed", "refused"),
    [
        ("FP32", "FP32", 1e-3, 3e-3),
        ("FP64", "FP32", 1e-3, 3e-3),
        ("FP32", "TF32", 1e-2, 4e-2),
        ("FP16", "FP32", 1e-2, 4e-2),
        ("FP32", "FP16", 1e-2, 4e-2),
        ("FP32", "BF16", 5e-2, 2e-1),
    ],
)
def test_the_tolerance_follows_the_coarser_of_datatype_and_arithmetic(
    datatype: str, precision: str, allowed: float, refused: float
) -> None:
    dtype = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}[datatype]
    golden = np.array([1.0, 0.5], dtype)
    assert same(datatype, (golden * (1 + allowed)).astype(dtype), golden, precision)
    assert not same(datatype, (golden * (1 + refused)).astype(dtype), golden, precision)


def test_bfloat16_is_compared_as_numbers() -> None:
    golden = to_bfloat16(np.array([1.0, -2.0], np.float32))
    assert same("BF16", to_bfloat16(np.array([1.02, -2.0], np.float32)), golden)
    assert not same("BF16", to_bfloat16(np.array([1.5, -2.0], np.float32)), golden)
    assert not same("BF16", to_bfloat16(np.array([1.0, 2.0], np.float32)), golden)


def test_nan_and_infinity_must_be_where_they_were() -> None:
    golden = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert same("FP32", golden.copy(), golden)
    for i, value in enumerate((0.0, -np.inf, np.nan, np.nan)):
        other = golden.copy()
        other[i] = value
        assert not same("FP32", other, golden), value


@pytest.mark.parametrize(
    ("datatype", "golden", "other"),
    [
        ("INT64", np.array([1, 2]), np.array([1, 3])),
        ("BOOL", np.array([True, False]), np.array([True, True])),
        ("BYTES", np.array([b"a", b"b"], object), np.array([b"a", b"c"], object)),
    ],
)
def test_whole_numbers_and_bytes_must_be_equal(
    datatype: str, golden: np.ndarray, other: np.ndarray
) -> None:
    compare(spec(datatype), golden.copy(), golden, "BF16")
    with pytest.raises(ArtifactError, match=r"1 of 2 elements, first at \[1\]"):
        compare(spec(datatype), other, golden, "BF16")


def test_another_shape_is_a_mismatch() -> None:
    golden = np.zeros(3, np.float32)
    with pytest.raises(ArtifactError, match=r"has shape \[2\], recorded was \[3\]"):
        compare(spec("FP32"), golden[:2], golden, "FP32")


ELEMENTS = st.lists(st.binary(max_size=20), min_size=0, max_size=6)


@given(ELEMENTS)
def test_bytes_survive_a_file_without_pickle(
    tmp_path_factory: pytest.TempPathFactory, elements: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    save_arrays(path, [spec("BYTES")], [array])
    assert load_arrays(path, [spec("BYTES")])[0].tolist() == elements


def test_equal_arrays_give_equal_files_whatever_the_names(tmp_path: Path) -> None:
    specs = [TensorSpec("file", "FP32", (2, 4)), TensorSpec("a/b:0", "FP32", (2, 4))]
    for name in ("a.npz", "b.npz"):
        save_arrays(tmp_path / name, specs, [X, X])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for array in load_arrays(tmp_path / "a.npz", specs):
        np.testing.assert_array_equal(array, X)


def test_a_damaged_sample_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "sample.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_arrays(path, models.LINEAR.inputs)
    save_arrays(path, [TensorSpec("x", "FP64", (-1, 4))], [X.astype(np.float64)])
    with pytest.raises(ArtifactError, match="'x' is float64 with 2 dimensions, its signature"):
        load_arrays(path, models.LINEAR.inputs)
    with pytest.raises(ArtifactError, match="other"):
        load_arrays(path, [TensorSpec("other", "FP64", (-1, 4))])


def test_a_scalar_keeps_its_rank_on_the_way(tmp_path: Path) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.FLOAT, ())
    tensors = (TensorSpec("x", "FP32", ()),), (TensorSpec("y", "FP32", ()),)
    backend = models.cpu_backend(model, ONNX_PLATFORM, Signature(*tensors, Batch.NONE))
    (y,) = run_sample(Engine(backend, rules_for(backend, 8)), [np.array(3, np.float32)])
    assert y.shape == ()
    assert y == 3
