"""Whether two answers to one request agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.core.compare import comparison
from serving.core.inference import OutputTensor
from serving.core.tensors import pack_bytes
from serving.core.types import Batch, Signature, TensorSpec


def signature(
    *outputs: tuple[str, str, tuple[int, ...]], batch: Batch = Batch.DYNAMIC
) -> Signature:
    x = (TensorSpec("x", "FP32", (-1, 2)),)
    return Signature(x, tuple(TensorSpec(*o) for o in outputs), batch)


SCORES = signature(("p", "FP32", (-1, 3)))


def tensor(values: Any, dtype: str = "<f4", index: int = 0) -> OutputTensor:
    array = np.array(values, dtype)
    return OutputTensor(index, array.shape, memoryview(array.tobytes()))


def agree(of: Signature, first: Any, second: Any, dtype: str = "<f4", **settings: Any) -> bool:
    return comparison(settings, of)([tensor(first, dtype)], [tensor(second, dtype)])


@pytest.mark.parametrize(
    ("second", "same"),
    [
        ([[0.1, 0.8, 0.1], [0.9, 0.0, 0.1]], True),
        ([[0.1, 0.4, 0.5], [0.9, 0.0, 0.1]], False),
        ([[0.1, 0.4, 0.5]], False),
    ],
)
def test_the_class_that_is_chosen(second: Any, same: bool) -> None:
    first = [[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]]
    assert agree(SCORES, first, second, kind="argmax") is same
    assert agree(SCORES, first, second) is same


@pytest.mark.parametrize(
    ("of", "dtype", "first", "close", "other"),
    [
        (signature(("y", "FP32", (-1, 1))), "<f4", [[2.0]], [[2.001]], [[2.1]]),
        (signature(("y", "FP64", (-1,))), "<f8", [2.0, 3.0], [2.0, 3.001], [3.0, 2.0]),
        (signature(("y", "FP32", (-1, -1))), "<f4", [[2.0]], [[2.0]], [[3.0]]),
        (signature(("y", "INT64", (-1,))), "<i8", [1, 2], [1, 2], [1, 3]),
        (signature(("y", "FP32", (3,)), batch=Batch.NONE), "<f4", [1, 2, 3], [0, 0, 1], [3, 2, 1]),
    ],
)
def test_without_scores_labels_are_equal_and_numbers_close(
    of: Signature, dtype: str, first: Any, close: Any, other: Any
) -> None:
    assert agree(of, first, close, dtype)
    assert not agree(of, first, other, dtype)


def test_strings() -> None:
    of = signature(("label", "BYTES", (-1,)))
    cat, dog = (OutputTensor(0, (1,), pack_bytes([word])) for word in (b"cat", b"dog"))
    for kind in ("argmax", "exact"):
        assert comparison({"kind": kind}, of)([cat], [cat])
        assert not comparison({"kind": kind}, of)([cat], [dog])
    with pytest.raises(ValueError, match="'label' holds strings: compare it with exact or argmax"):
        comparison({"kind": "tolerance"}, of)


def test_tolerance() -> None:
    settings = {"kind": "tolerance", "rtol": 0.1, "atol": 0.01}
    assert agree(SCORES, [[1, 10, 0]], [[1.1, 10.9, 0.009]], **settings)
    assert not agree(SCORES, [[1, 10, 0]], [[1.1, 10.9, 0.02]], **settings)
    assert not agree(SCORES, [[1, 10, 0]], [[1.1, float("nan"), 0]], **settings)
    assert agree(SCORES, [[1, float("nan"), 0]], [[1, float("nan"), 0]], **settings)


def test_exact() -> None:
    assert agree(SCORES, [[1, 2, 3]], [[1, 2, 3]], kind="exact")
    assert not agree(SCORES, [[1, 2, 3]], [[1, 2, 3.000001]], kind="exact")


def test_nothing_is_compared() -> None:
    assert agree(SCORES, [[1, 2, 3]], [[3, 2, 1]], kind="none")


@pytest.mark.parametrize(
    ("metric", "distance"),
    [("max_abs", 1.0), ("max_rel", 0.5), ("mse", 1 / 3), ("cosine", 1 - 13 / (14**0.5 * 13**0.5))],
)
def test_metrics(metric: str, distance: float) -> None:
    first, second = [[1, 2, 3]], [[0, 2, 3]]
    if metric == "max_rel":
        first, second = [[0, 2, 3]], [[0, 3, 3]]
    settings = {"kind": "metric", "metric": metric}
    assert agree(SCORES, first, second, threshold=distance + 1e-6, **settings)
    assert not agree(SCORES, first, second, threshold=distance - 1e-6, **settings)
    assert agree(SCORES, first, first, threshold=1e-9, **settings)
    assert not agree(SCORES, first, [[0, float("nan"), 3]], threshold=1e9, **settings)


@pytest.mark.parametrize("metric", ["max_abs", "max_rel", "mse"])
def test_infinities_that_are_equal_agree(metric: str) -> None:
    infinite = [[float("inf"), float("-inf"), 0]]
    assert agree(SCORES, infinite, infinite, kind="metric", metric=metric, threshold=1e-9)
    assert not agree(SCORES, [[1, 0, 0]], infinite, kind="metric", metric=metric, threshold=1e9)


def test_a_cosine_of_nothing() -> None:
    settings = {"kind": "metric", "metric": "cosine", "threshold": 0.5}
    assert agree(SCORES, [[0, 0, 0]], [[0, 0, 0]], **settings)
    assert not agree(SCORES, [[0, 0, 0]], [[1, 0, 0]], **settings)


def test_a_metric_of_ones_own() -> None:
    seen = []

    def first_only(a: Any, b: Any) -> float:
        seen.append((a.dtype, a.shape))
        return float(abs(a[0, 0] - b[0, 0]))

    settings = {"kind": "metric", "metric": "mine:first_only", "threshold": 0.5}
    compare = comparison(settings, SCORES, first_only)
    assert compare([tensor([[1, 2, 3]])], [tensor([[1.2, 9, 9]])])
    assert not compare([tensor([[1, 2, 3]])], [tensor([[2, 2, 3]])])
    assert seen[0] == (np.float64, (1, 3))


def test_the_output_that_is_named() -> None:
    of = signature(("a", "FP32", (-1, 3)), ("b", "FP32", (-1, 3)))
    one, two = [[1, 0, 0]], [[0, 1, 0]]
    first = [tensor(one), tensor(one, index=1)]
    second = [tensor(one), tensor(two, index=1)]
    assert comparison({"kind": "argmax"}, of)(first, second)
    assert not comparison({"kind": "argmax", "output": "b"}, of)(first, second)


def test_a_malformed_answer_of_the_canary_disagrees() -> None:
    broken = OutputTensor(0, (1, 3), memoryview(b"123"))
    for kind in ("argmax", "tolerance", "exact"):
        assert not comparison({"kind": kind}, SCORES)([tensor([[1, 2, 3]])], [broken])


def test_half_precision() -> None:
    of = signature(("y", "BF16", (-1, 1)))
    one = OutputTensor(0, (1, 1), memoryview(b"\x80\x3f"))
    two = OutputTensor(0, (1, 1), memoryview(b"\x00\x40"))
    compare = comparison({"kind": "metric", "metric": "max_abs", "threshold": 1.0}, of)
    assert compare([one], [two])
    assert not comparison({"kind": "tolerance"}, of)([one], [two])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vibes"}, "kind of comparison is 'vibes'; allowed: argmax, tolerance"),
        ({"output": "q"}, "the model has no output 'q'; its outputs: p"),
        ({"kind": "metric", "metric": "l7"}, "metric is 'l7'; allowed: max_abs"),
    ],
)
def test_what_does_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(settings, SCORES)
