"""Whether two versions gave the same answer to one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from serving.core.inference import OutputTensor
from serving.core.tensor_values import Array, values_of
from serving.core.types import Batch, Signature, TensorSpec

Metric = Callable[[Array, Array], float]
"""How far the second of two arrays of one shape is from the first: 0 where they are equal."""

Comparison = Callable[[Sequence[OutputTensor], Sequence[OutputTensor]], bool]
"""Whether two answers, outputs in the signature's order, agree."""

KINDS: Final = ("argmax", "tolerance", "exact", "metric", "none")

_FLOATS: Final = frozenset({"FP16", "FP32", "FP64", "BF16"})
# Where scores are asked for and a model gives none, plain numbers are compared this closely.
_RTOL: Final = 1e-3
_ATOL: Final = 1e-5


def _differences(a: Array, b: Array) -> Array:
    """Between elements, without sign; 0 for two equal infinities."""
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))


def _max_abs(a: Array, b: Array) -> float:
    """The largest difference of two elements."""
    return float(np.max(_differences(a, b), initial=0.0))


def _max_rel(a: Array, b: Array) -> float:
    """The largest difference, as a share of the first answer's element."""
    differences = _differences(a, b)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(differences == 0, 0.0, differences / np.abs(a))
    return float(np.max(shares, initial=0.0))


def _cosine(a: Array, b: Array) -> float:
    """One minus the cosine of the angle between the two answers."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not lengths:
        return float(np.any(a != b))
    return 1.0 - float(np.vdot(a, b)) / lengths


def _mse(a: Array, b: Array) -> float:
    """The mean of the squared differences."""
    return float(np.mean(_differences(a, b) ** 2)) if a.size else 0.0


METRICS: Final[Mapping[str, Metric]] = {
    "max_abs": _max_abs,
    "max_rel": _max_rel,
    "cosine": _cosine,
    "mse": _mse,
}
"""`rollout_spec.METRIC_NAMES` and what they do."""


def comparison(
    settings: Mapping[str, Any], signature: Signature, metric: Metric | None = None
) -> Comparison:
    """The comparison that `settings` (`rollout_spec.Compare` as a dict) ask for.

    `metric` is the function of kind "metric", for a name that is not in `METRICS`. An operator's
    function is given float64 arrays, as the built-in ones are. Raises ValueError for a kind, an
    output or a metric that does not exist.
    """
    kind = settings.get("kind", "argmax")
    if kind == "none":
        return lambda first, second: True
    index = _output(settings.get("output"), signature)
    spec = signature.outputs[index]
    if kind == "argmax":
        agree = _decision(spec, signature.batch is not Batch.NONE)
    else:
        agree = _tensor_comparison(kind, settings, spec, metric)
    return lambda first, second: agree(first[index], second[index])


_Agree = Callable[[OutputTensor, OutputTensor], bool]


def _tensor_comparison(
    kind: str, settings: Mapping[str, Any], spec: TensorSpec, metric: Metric | None
) -> _Agree:
    if kind == "exact":
        return _equal
    if kind not in KINDS:
        raise ValueError(f"kind of comparison is {kind!r}; allowed: {', '.join(KINDS)}")
    if spec.datatype == "BYTES":
        raise ValueError(f"output {spec.name!r} holds strings: compare it with exact or argmax")
    if kind == "tolerance":
        rtol, atol = float(settings.get("rtol", _RTOL)), float(settings.get("atol", _ATOL))
        return _numeric(spec, lambda a, b: np.allclose(b, a, rtol, atol, equal_nan=True))
    name = settings.get("metric", "")
    distance = metric or METRICS.get(name)
    if distance is None:
        raise ValueError(
            f"metric is {name!r}; allowed: {', '.join(METRICS)}, or module:function of your own"
        )
    threshold = float(settings.get("threshold", 0.0))
    # Not "more than": NaN is no sign of agreement.
    return _numeric(spec, lambda a, b: bool(distance(a, b) <= threshold))


def _output(name: str | None, signature: Signature) -> int:
    names = [spec.name for spec in signature.outputs]
    if name is None:
        return 0
    if name not in names:
        raise ValueError(f"the model has no output {name!r}; its outputs: {', '.join(names)}")
    return names.index(name)


def _equal(first: OutputTensor, second: OutputTensor) -> bool:
    return first.shape == second.shape and bytes(first.data) == bytes(second.data)


def _numeric(spec: TensorSpec, agree: Callable[[Array, Array], bool]) -> _Agree:
    def compare(first: OutputTensor, second: OutputTensor) -> bool:
        a, b = _values(spec, first), _values(spec, second)
        if a is None or b is None or a.shape != b.shape:
            return False
        return agree(a, b)

    return compare


def _values(spec: TensorSpec, tensor: OutputTensor) -> Array | None:
    """As float64; None where the data do not fit the shape."""
    try:
        values = values_of(spec.datatype, tensor.shape, tensor.data)
    except ValueError:
        return None
    return None if values is None else values.astype(np.float64)


def _decision(spec: TensorSpec, batched: bool) -> _Agree:
    """The same class is chosen; of an output without scores, the same label or number."""
    if spec.datatype == "BYTES":
        return _equal
    whole = spec.datatype not in _FLOATS

    def agree(a: Array, b: Array) -> bool:
        if a.ndim > batched and a.shape[-1] > 1:
            return bool(np.array_equal(a.argmax(-1), b.argmax(-1)))
        if whole:
            return bool(np.array_equal(a, b))
        return np.allclose(b, a, _RTOL, _ATOL, equal_nan=True)

    return _numeric(spec, agree)
