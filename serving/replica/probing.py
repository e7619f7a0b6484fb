"""Finding out by running a model what its file does not say: what fits, and what rows are."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ArtifactError, ServingError
from serving.replica.backends.base import Array, Backend, as_raw, one_line
from serving.replica.golden import compare

SEED: Final = 0
# Sizes tried for variable dimensions other than the rows, until the model takes one: short
# sequences first, then what convolutional networks need.
_VARIABLE_SIZES: Final = (8, 32, 64, 224)
_GENERATED_ROWS: Final = 2
_PROBE_ROWS: Final = 3
# Rows that influence each other must show in small outputs too, such as 1000 probabilities.
_LEAST_SCALE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Finding:
    """The signature to serve with, a sample, its outputs, and why rows are treated so."""

    signature: Signature
    sample: list[Array]
    outputs: list[Array]
    reason: str


def read_sample(path: Path, specs: Sequence[TensorSpec]) -> list[Array]:
    """A user's sample from an .npz with one array per input.

    BYTES may be text or byte strings, BF16 floats or uint16. Raises `ArtifactError` where it does
    not fit.
    """
    arrays = sample_arrays(path)
    expected = [spec.name for spec in specs]
    if sorted(arrays) != sorted(expected):
        raise ArtifactError(
            f"{path}: holds {', '.join(sorted(arrays))}; the inputs are {', '.join(expected)}"
        )
    return [_fitted(path, spec, arrays[spec.name]) for spec in specs]


def refuse_shapes(path: Path, specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> None:
    """Raise `ArtifactError` where a sample's shape is not the declared one."""
    for spec, array in zip(specs, arrays, strict=True):
        if spec.shape and any(
            want not in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
        ):
            raise _misshapen(path, spec, array)


def sample_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz in their order. Raises `ArtifactError`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: not an .npz of plain arrays: {one_line(error)}") from error


def generated_samples(specs: Sequence[TensorSpec]) -> Iterator[list[Array]]:
    """Deterministic values: floats in [-1, 1), whole numbers 0 and 1, decimal digits as BYTES."""
    variable = any(-1 in spec.shape[1:] for spec in specs)
    for size in _VARIABLE_SIZES if variable else _VARIABLE_SIZES[:1]:
        rng = np.random.default_rng(SEED)
        yield [_values(spec, size, rng) for spec in specs]


def run_first_that_fits(
    backend: Backend, samples: Iterator[list[Array]]
) -> tuple[list[Array], list[Array]]:
    """The first sample that the model takes, and its outputs. Raises `ArtifactError` if none."""
    problem = ""
    for sample in samples:
        try:
            return sample, run(backend, sample)
        except ArtifactError as error:
            problem = str(error)
    raise ArtifactError(f"{problem}; generated values do not fit this model: give a sample")


def run(backend: Backend, inputs: Sequence[Array]) -> list[Array]:
    """One run. Raises `ArtifactError` if the model fails."""
    try:
        return [as_raw(out) for out in backend.run(inputs)]
    except ServingError as error:
        raise ArtifactError(f"the model cannot run its sample: {error}") from error
    except Exception as error:
        raise ArtifactError(f"the model cannot run its sample: {one_line(error)}") from error


def find_batch(
    backend: Backend, declared: Signature, sample: list[Array], outputs: list[Array], asked: str
) -> Finding:
    """How the rows of a model may be treated: `asked` is auto, dynamic, fixed or none.

    `auto` merges rows only if a run over several rows gives, row by row, what each row gives alone.
    Raises `ArtifactError` if what is asked for does not fit the model's shapes.
    """
    declared = _as_observed(declared, sample, outputs)
    first = {
        spec.shape[0] if spec.shape else None for spec in (*declared.inputs, *declared.outputs)
    }
    variable, frozen = first == {-1}, len(first) == 1 and next(iter(first)) not in (None, -1)
    if asked == "none":
        return Finding(declared, sample, outputs, "as asked")
    if asked == "dynamic" and not variable:
        raise ArtifactError(
            "batch dynamic: not every input and output has a variable first dimension"
        )
    if asked == "fixed" and not frozen:
        raise ArtifactError(
            "batch fixed: the inputs and outputs have no common frozen first dimension"
        )
    if not variable and not frozen:
        return Finding(declared, sample, outputs, "the first dimensions differ, so none holds rows")
    rows = next(iter(first)) or 0
    batched = _batched(declared, 0 if variable else rows)
    if asked != "auto":
        return Finding(batched, sample, outputs, "as asked")
    if frozen and rows == 1:
        return Finding(declared, sample, outputs, "the first dimension is frozen at 1")
    problem = _dependent_rows(backend, batched, sample)
    if problem:
        return Finding(declared, sample, outputs, f"its rows are not independent: {problem}")
    return Finding(batched, sample, outputs, "its rows are independent")


def _batched(declared: Signature, fixed_rows: int) -> Signature:
    def free(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, shape=(-1, *spec.shape[1:])) for spec in specs)

    batch = Batch.FIXED if fixed_rows else Batch.DYNAMIC
    return Signature(free(declared.inputs), free(declared.outputs), batch, fixed_rows)


def _as_observed(
    declared: Signature, sample: Sequence[Array], outputs: Sequence[Array]
) -> Signature:
    """`declared` without the claims that a run disproves: graphs carry stale output shapes."""
    if len(outputs) != len(declared.outputs):
        raise ArtifactError(
            f"the model returned {len(outputs)} outputs, its signature has {len(declared.outputs)}"
        )
    return replace(
        declared,
        inputs=tuple(map(_observed, declared.inputs, sample)),
        outputs=tuple(map(_observed, declared.outputs, outputs)),
    )


def _observed(spec: TensorSpec, array: Array) -> TensorSpec:
    expected = DATATYPES[spec.datatype].numpy or np.dtype(object)
    if array.dtype != expected:
        raise ArtifactError(f"{spec.name!r} is {array.dtype}, declared is {spec.datatype}")
    if len(spec.shape) != array.ndim:
        return replace(spec, shape=(-1,) * array.ndim)
    shape = tuple(s if s == a else -1 for s, a in zip(spec.shape, array.shape, strict=True))
    return replace(spec, shape=shape)


def _dependent_rows(backend: Backend, signature: Signature, sample: Sequence[Array]) -> str:
    """Empty if each row's outputs are the same alone and among others, else what differs."""
    total = signature.fixed_rows or _PROBE_ROWS
    together = [_varied(spec, a, total) for spec, a in zip(signature.inputs, sample, strict=True)]
    try:
        merged = run(backend, together)
        for row in range(min(total, _PROBE_ROWS)):
            alone = run(backend, [_alone(a, row, signature.fixed_rows) for a in together])
            for spec, whole, part in zip(signature.outputs, merged, alone, strict=True):
                if len(whole) != total or len(part) != max(1, signature.fixed_rows):
                    return f"output {spec.name!r} has {len(whole)} rows for {total} rows of input"
                together_here = whole[row : row + 1]
                compare(spec, part[:1], together_here, backend.precision, _LEAST_SCALE)
    except ArtifactError as error:
        return str(error)
    return ""


def _alone(array: Array, row: int, fixed_rows: int) -> Array:
    """The row by itself; in a frozen graph, in the first place among copies of itself."""
    return np.repeat(array[row : row + 1], max(1, fixed_rows), axis=0)


def _varied(spec: TensorSpec, array: Array, rows: int) -> Array:
    """`rows` rows that differ where the datatype allows it, so that mutual influence would show."""
    resized = array[np.arange(rows) % len(array)]
    if spec.datatype in ("FP16", "FP32", "FP64"):
        factors = (0.5 ** np.arange(rows)).reshape(-1, *([1] * (array.ndim - 1)))
        return as_raw((resized * factors).astype(array.dtype))
    return resized


def _values(spec: TensorSpec, size: int, rng: np.random.Generator) -> Array:
    shape = tuple(
        d if d >= 0 else (_GENERATED_ROWS if i == 0 else size) for i, d in enumerate(spec.shape)
    )
    if spec.datatype == "BYTES":
        digits = np.empty(shape, dtype=object)
        digits.reshape(-1)[:] = [b"%d" % d for d in rng.integers(0, 10, digits.size)]
        return digits
    if spec.datatype == "BF16":
        return to_bfloat16(rng.uniform(-1, 1, shape).astype(np.float32))
    dtype = DATATYPES[spec.datatype].numpy
    if spec.datatype.startswith("FP"):
        return as_raw(np.asarray(rng.uniform(-1, 1, shape), dtype))
    return as_raw(np.asarray(rng.integers(0, 2, shape), dtype))


def to_bfloat16(values: Array) -> Array:
    """FP32 to BF16 as uint16, rounding half to even (NaN stays NaN)."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _fitted(path: Path, spec: TensorSpec, array: Array) -> Array:
    if spec.shape and array.ndim != len(spec.shape):
        raise _misshapen(path, spec, array)
    if spec.datatype == "BYTES":
        return _as_bytes(path, spec, array)
    if spec.datatype == "BF16" and array.dtype.kind == "f":
        return to_bfloat16(array)
    dtype: Any = DATATYPES[spec.datatype].numpy
    if not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise ArtifactError(f"{path}: {spec.name!r} is {array.dtype}, not {spec.datatype}")
    return as_raw(array.astype(dtype))


def _misshapen(path: Path, spec: TensorSpec, array: Array) -> ArtifactError:
    return ArtifactError(
        f"{path}: {spec.name!r} has shape {list(array.shape)}, not {list(spec.shape)}"
    )


def _as_bytes(path: Path, spec: TensorSpec, array: Array) -> Array:
    if array.dtype.kind not in "US":
        raise ArtifactError(f"{path}: {spec.name!r} is {array.dtype}, the model takes BYTES")
    elements = np.empty(array.shape, dtype=object)
    elements.reshape(-1)[:] = [
        e.encode() if isinstance(e, str) else bytes(e) for e in array.reshape(-1).tolist()
    ]
    return elements
