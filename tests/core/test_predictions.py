"""What a model predicted, as names that can be counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.core.predictions import PredictionReader, is_class, name_of
from serving.core.types import Batch, Signature, TensorSpec


def signature(
    *outputs: tuple[str, str, tuple[int, ...]], batch: Batch = Batch.DYNAMIC
) -> Signature:
    x = (TensorSpec("x", "FP32", (-1, 2)),)
    return Signature(x, tuple(TensorSpec(*o) for o in outputs), batch)


def names(of: Signature, values: Any, dtype: str = "<f4", output: str | None = None) -> list[str]:
    array = np.array(values, dtype)
    codes = PredictionReader(of, output).read(array.shape, memoryview(array.tobytes()))
    return [name_of(code) for code in codes.tolist()]


def test_the_class_with_the_largest_score() -> None:
    of = signature(("p", "FP32", (-1, 3)))
    assert names(of, [[0, 1, 0], [3, 2, 1], [0, 0, 1]]) == ["1", "0", "2"]


def test_integers_are_classes() -> None:
    of = signature(("label", "INT64", (-1,)))
    assert names(of, [7, -1, 0], "<i8") == ["7", "-1", "0"]
    assert names(signature(("flag", "BOOL", (-1, 1))), [[True], [False]], "?") == ["1", "0"]


def test_names_are_few_however_many_the_classes() -> None:
    found = {name_of(code) for code in range(-100_000, 100_000)}
    assert len(found) == 127 + 64
    assert is_class(99_999)


@pytest.mark.parametrize("values", [[2**64 - 1], [2**63]])
def test_integers_beyond_measure_are_classes_too(values: list[int]) -> None:
    of = signature(("label", "UINT64", (-1,)))
    assert names(of, values, "<u8")[0].startswith("other-")


def test_numbers_fall_into_bins() -> None:
    of = signature(("y", "FP32", (-1, 1)))
    values = [[0.0], [0.05], [0.31], [0.999], [1.0], [2.1], [100.0], [-0.31], [-2.1]]
    assert names(of, values) == ["0", "0", "0.3", "0.9", "1", "2", "90.5", "-0.3", "-2"]
    assert names(signature(("y", "FP64", (-1,))), [0.31, 2.1], "<f8") == ["0.3", "2"]


def test_bins_are_few_and_in_order_whatever_the_number() -> None:
    of = signature(("y", "FP64", (-1,)))
    extremes = [float("inf"), float("-inf"), float("nan"), 1e300, -1e300, 1e-300]
    assert names(of, extremes, "<f8") == [
        "1.84e+19",
        "-1.84e+19",
        "nan",
        "1.84e+19",
        "-1.84e+19",
        "0",
    ]
    sweep = np.concatenate([[0], np.geomspace(1e-3, 1e30, 5000)])
    found = list(dict.fromkeys(names(of, [*-sweep[::-1], *sweep], "<f8")))
    assert len(found) < 600
    bounds = [float(name) for name in found if not name.startswith("-")]
    assert bounds == sorted(bounds)


def test_bins_are_no_classes() -> None:
    of = signature(("y", "FP32", (-1, 1)))
    array = np.array([[0.5], [-3e9], [float("nan")]], "<f4")
    codes = PredictionReader(of, None).read(array.shape, memoryview(array.tobytes()))
    assert not any(is_class(code) for code in codes.tolist())


def test_a_row_of_several_vectors_counts_by_its_first() -> None:
    of = signature(("logits", "FP32", (-1, -1, 3)))
    assert names(of, [[[0, 1, 0], [1, 0, 0]], [[0, 0, 1], [1, 0, 0]]]) == ["1", "2"]


def test_without_batch_dimension_there_is_one() -> None:
    of = signature(("p", "FP32", (3,)), batch=Batch.NONE)
    assert names(of, [0, 0, 1]) == ["2"]


def test_scores_come_before_other_numbers() -> None:
    of = signature(("s", "BYTES", (-1,)), ("y", "FP32", (-1, 1)), ("p", "FP32", (-1, 3)))
    assert PredictionReader(of, None).index == 2
    assert PredictionReader(of, "y").index == 1
    assert (
        PredictionReader(signature(("s", "BYTES", (-1,)), ("y", "FP32", (-1, 1))), None).index == 1
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "has no output of numbers"),
        ("s", "has no output 's' of numbers"),
        ("t", "output 't'"),
    ],
)
def test_no_output_to_read(output: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictionReader(signature(("s", "BYTES", (-1,))), output)
