"""Predictions are counted alike, whether they are read at once or many runs at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from serving.core.predictions import PredictionReader, name_of
from serving.core.types import Batch, Signature, TensorSpec
from serving.gateway import tally
from serving.gateway.tally import Predictions

CLASSES = 10


def reader(datatype: str = "FP32", tail: tuple[int, ...] = (CLASSES,)) -> PredictionReader:
    spec = TensorSpec("y", datatype, (-1, *tail))
    return PredictionReader(Signature((spec,), (spec,), Batch.DYNAMIC), None)


def raw(values: np.ndarray) -> memoryview:
    return memoryview(values.tobytes())


@pytest.mark.parametrize(
    ("datatype", "tail"),
    [("FP32", (CLASSES,)), ("FP64", (3, CLASSES)), ("INT64", ()), ("FP32", ())],
)
def test_runs_are_read_together_as_each_alone(datatype: str, tail: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    read, later, alone = reader(datatype, tail), Predictions(), Counter[str]()
    for rows in rng.integers(0, 40, 500).tolist():
        values = (rng.normal(size=(rows, *tail)) * 10).astype(
            datatype.replace("FP", "float").lower()
        )
        later.read_later(read, values.shape, raw(values))
        alone.update(map(name_of, read.read(values.shape, raw(values)).tolist()))
    assert later.to_dict() == dict(alone)
    assert sum(alone.values()) > 0


def test_outputs_of_another_shape_or_reader_are_read_apart() -> None:
    predictions, first, second = Predictions(), reader(tail=(-1,)), reader("FP64", (-1,))
    predictions.read_later(first, (1, 3), raw(np.array([[0, 0, 1]], np.float32)))
    predictions.read_later(first, (1, 2), raw(np.array([[0, 1]], np.float32)))
    predictions.read_later(second, (2, 2), raw(np.array([[0, 1], [1, 0]], np.float64)))
    assert predictions.to_dict() == {"2": 1, "1": 2, "0": 1}
    assert predictions.to_dict() == {"2": 1, "1": 2, "0": 1}, "counted once"


def test_the_memory_of_what_is_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = []
    settle = Predictions._settle
    monkeypatch.setattr(Predictions, "_settle", lambda self: (settled.append(1), settle(self)))
    predictions, read = Predictions(), reader(tail=(1 << 16,))
    large = raw(np.zeros((1, 1 << 16), np.float32))
    for _ in range(8):
        predictions.read_later(read, (1, 1 << 16), large)
    assert len(settled) == 8 * large.nbytes // tally._MAX_PENDING_BYTES


def test_an_output_that_is_not_of_its_shape() -> None:
    with pytest.raises(ValueError, match=r"8 bytes are no output of shape \[3, 10\]"):
        Predictions().read_later(reader(), (3, CLASSES), memoryview(b"12345678"))
