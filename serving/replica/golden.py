"""Samples and golden outputs: their file form, and how closely they must be reproduced."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.artifacts import GOLDEN_FILE, SAMPLE_FILE
from serving.core.types import DATATYPES, Batch, TensorSpec
from serving.errors import ArtifactError, InvalidRequest
from serving.replica.backends.base import Array
from serving.replica.engine import Engine
from serving.replica.wire import join_bytes, split_bytes
from serving.replica.work import Work

# (relative, absolute) tolerance by the coarsest of the output's datatype and the arithmetic behind
# it. Golden outputs are recorded once, on a CPU in the model's own precision; what differs later is
# the order of sums (other instruction sets, batch sizes and libraries) and the mantissa: 23 bits
# for FP32, 10 for TF32 and FP16, 7 for BF16, each widened by about a decimal digit for the depth of
# a network. The absolute part is scaled by the largest golden value above 1, because sums that
# cancel keep the error of their terms. All else must be equal.
TOLERANCES: Final = {
    "FP32": (1e-3, 1e-4),
    "TF32": (1e-2, 1e-2),
    "FP16": (1e-2, 1e-2),
    "BF16": (5e-2, 5e-2),
}
_COARSENESS: Final = ("FP64", "FP32", "TF32", "FP16", "BF16")
_FLOATS: Final = frozenset({"FP16", "FP32", "FP64", "BF16"})


def save_arrays(path: Path, specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> None:
    """Write one array per tensor to an .npz file, the same bytes for the same arrays.

    BYTES, which npz could only hold as pickled objects, become `NAME/bytes` (UINT8, the raw form)
    and `NAME/shape`. BF16 is stored as uint16.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for spec, array in zip(specs, arrays, strict=True):
            if spec.datatype == "BYTES":
                _write(archive, f"{spec.name}/bytes", join_bytes(array))
                _write(archive, f"{spec.name}/shape", np.array(array.shape, np.int64))
            else:
                _write(archive, spec.name, array)


def load_arrays(path: Path, specs: Sequence[TensorSpec]) -> list[Array]:
    """Read `save_arrays`'s form. Raises `ArtifactError` where it does not fit `specs`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [_read(archive, spec) for spec in specs]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, InvalidRequest) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    for spec, array in zip(specs, arrays, strict=True):
        dtype = DATATYPES[spec.datatype].numpy or np.dtype(object)
        if array.dtype != dtype or array.ndim != len(spec.shape):
            raise ArtifactError(
                f"{path}: {spec.name!r} is {array.dtype} with {array.ndim} dimensions, "
                f"its signature says {spec.datatype} {list(spec.shape)}"
            )
    return arrays


def warm_up(engine: Engine, sample: Sequence[Array]) -> None:
    """Run the sample at every bucket, or, without buckets, at one row and the most rows.

    Raises `ArtifactError` if the model fails.
    """
    for rows in warm_sizes(engine):
        run_at(engine, sample, rows)


def warm_sizes(engine: Engine) -> list[int]:
    """The row counts of a warm-up, ascending."""
    if engine.backend.signature.batch is Batch.NONE:
        return [1]
    rules = engine.rules
    sizes = (
        {min(b, rules.max_size) for b in rules.buckets} if rules.buckets else {1, rules.max_size}
    )
    return sorted(sizes)


def run_at(engine: Engine, sample: Sequence[Array], rows: int) -> None:
    """Run the sample once, repeated to `rows` rows. Raises `ArtifactError` if the model fails."""
    _run(engine, resized(sample, rows), rows, "warm-up")


def check_golden(engine: Engine, bundle: Path) -> None:
    """Run the bundle's sample and compare with its golden outputs.

    Raises `ArtifactError` with the largest difference, where it is and what was allowed.
    """
    signature = engine.backend.signature
    sample = load_arrays(bundle / SAMPLE_FILE, signature.inputs)
    golden = load_arrays(bundle / GOLDEN_FILE, signature.outputs)
    outputs = run_sample(engine, sample)
    for spec, got, expected in zip(signature.outputs, outputs, golden, strict=True):
        compare(spec, got, expected, engine.backend.precision)


def run_sample(engine: Engine, sample: Sequence[Array]) -> list[Array]:
    """The outputs for `sample`, in runs that fit the engine. Raises `ArtifactError`."""
    if engine.backend.signature.batch is Batch.NONE:
        return _run(engine, list(sample), 1, "its sample")
    step, total = engine.rules.max_size, len(sample[0])
    parts = [
        _run(engine, [a[at : at + step] for a in sample], min(step, total - at), "its sample")
        for at in range(0, total, step)
    ]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def compare(
    spec: TensorSpec, got: Array, expected: Array, precision: str, least_scale: float = 1.0
) -> None:
    """Raise `ArtifactError` unless `got` is `expected` within the tolerance of its datatype.

    The absolute tolerance is scaled by the largest expected value, but at least by `least_scale`.
    """
    if got.shape != expected.shape:
        raise ArtifactError(
            f"golden check: output {spec.name!r} has shape {list(got.shape)}, "
            f"recorded was {list(expected.shape)}"
        )
    if spec.datatype not in _FLOATS:
        wrong = np.not_equal(got, expected)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ArtifactError(
                f"golden check: output {spec.name!r} differs in {np.count_nonzero(wrong)} of "
                f"{got.size} elements, first at {list(first)}: {got[first]!r}, recorded was "
                f"{expected[first]!r}; {spec.datatype} must be equal"
            )
        return
    have, want = _widened(spec, got), _widened(spec, expected)
    rtol, atol = TOLERANCES[max(spec.datatype, precision, "FP32", key=_COARSENESS.index)]
    finite = np.abs(want[np.isfinite(want)])
    atol *= float(finite.max(initial=least_scale))
    with np.errstate(invalid="ignore"):
        difference = np.abs(have - want)
    # Equal infinities and NaN where NaN was recorded are what was recorded.
    difference[(have == want) | (np.isnan(have) & np.isnan(want))] = 0.0
    difference[np.isnan(difference)] = np.inf
    excess = difference - (atol + rtol * np.abs(np.nan_to_num(want, posinf=0.0, neginf=0.0)))
    if (excess > 0).any():
        at = np.unravel_index(int(np.argmax(difference)), difference.shape)
        index = tuple(int(i) for i in at)
        raise ArtifactError(
            f"golden check: output {spec.name!r} differs by at most {difference[index]:.6g} at "
            f"{list(index)}: {have[index]:.6g}, recorded was {want[index]:.6g}; allowed is "
            f"{atol:.3g} + {rtol:.3g} × |recorded| ({np.count_nonzero(excess > 0)} of {got.size} "
            "elements exceed it)"
        )


def resized(sample: Sequence[Array], rows: int) -> list[Array]:
    """The sample's rows, repeated or cut to `rows`."""
    return [a[np.arange(rows) % len(a)] for a in sample]


def _run(engine: Engine, inputs: list[Array], rows: int, what: str) -> list[Array]:
    work = Work(inputs, rows, arrived=time.monotonic())
    engine.submit(work)
    if work.error is not None:
        raise ArtifactError(f"{what} at {rows} rows: {work.error}")
    return work.outputs


def _widened(spec: TensorSpec, array: Array) -> Array:
    if spec.datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def _write(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    # A ZipInfo of its own has a fixed date, so that equal arrays give an equal digest.
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(info, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _read(archive: Any, spec: TensorSpec) -> Array:
    if spec.datatype != "BYTES":
        array: Array = archive[spec.name]
        return array
    raw, shape = archive[f"{spec.name}/bytes"], archive[f"{spec.name}/shape"]
    return split_bytes(memoryview(raw), tuple(int(d) for d in shape))
