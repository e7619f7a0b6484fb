"""What a model predicted, as a small set of names that can be counted.

Scores give the class with the largest one, an integer output is a class as it is, and a plain
number falls into a bin: tenths up to 1, four bins an octave beyond. A class is known by its number;
those that are too many share names.
"""

from __future__ import annotations

from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from serving.core.tensor_values import values_of
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec

Codes = npt.NDArray[np.int64]
"""One prediction a row: a class, or a bin from `_BINS` on."""

_CLASSES: Final = 64
_MOST: Final = 1 << 47
_TENTHS: Final = 10
_PER_OCTAVE: Final = 4
_OCTAVES: Final = 64
# Where the codes of bins lie: those of positive numbers from it on, of negative ones below.
_BINS: Final = 1 << 48
_NAN: Final = _BINS + 1024
_LEAST_BIN: Final = _BINS - 1024


def is_class(code: int) -> bool:
    """Whether a code is a class, with which a label can be compared; it is a bin otherwise."""
    return code < _LEAST_BIN


def name_of(code: int) -> str:
    """The name under which predictions are counted."""
    if is_class(code):
        # Labels are small numbers, of either sign. The others share as many names again.
        return str(code) if abs(code) < _CLASSES else f"other-{code % _CLASSES}"
    if code == _NAN:
        return "nan"
    sign, step = ("", code - _BINS) if code >= _BINS else ("-", _BINS - 1 - code)
    if step < _TENTHS:
        return f"{sign}{step / _TENTHS:g}"
    return f"{sign}{2 ** ((step - _TENTHS) / _PER_OCTAVE):.3g}"


class PredictionReader:
    """Reads the predictions of one model from one of its outputs."""

    def __init__(self, signature: Signature, output: str | None) -> None:
        """Without an `output` it is the first that has scores, else the first of numbers.

        Raises ValueError where there is no such output, or it is not of numbers.
        """
        numeric = [i for i, spec in enumerate(signature.outputs) if spec.datatype != "BYTES"]
        # Whether each row of an output has a prediction of its own.
        self.batched = signature.batch is not Batch.NONE
        if output is None:
            scored = [i for i in numeric if self._has_scores(signature.outputs[i])]
            found = (scored or numeric)[:1]
        else:
            found = [i for i in numeric if signature.outputs[i].name == output]
        if not found:
            what = "no output" if output is None else f"no output {output!r}"
            raise ValueError(f"the model has {what} of numbers to read a prediction from")
        self.index = found[0]
        self._datatype = signature.outputs[self.index].datatype
        # Bytes an element.
        self.itemsize = DATATYPES[self._datatype].itemsize

    def _has_scores(self, spec: TensorSpec) -> bool:
        return len(spec.shape) > self.batched and spec.shape[-1] not in (0, 1)

    def read(self, shape: tuple[int, ...], data: memoryview | bytes) -> Codes:
        """The predictions of every row. Of a row with several vectors, the first's counts.

        Raises ValueError where `data` does not have the elements of `shape`.
        """
        values = values_of(self._datatype, shape, data)
        if values is None or not prod(shape):
            return np.empty(0, np.int64)
        rows = shape[0] if self.batched else 1
        width = shape[-1] if len(shape) > self.batched else 1
        first = values.reshape(rows, -1, width)[:, 0]
        if width > 1:
            classes: Codes = first.argmax(-1)
            return classes
        single = first[:, 0]
        if single.dtype.kind == "f":
            return _bins(single)
        return np.clip(single.astype(np.float64), -_MOST, _MOST).astype(np.int64)


def _bins(values: npt.NDArray[np.floating]) -> Codes:
    size = np.abs(values.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.clip(np.log2(size), 0, _OCTAVES)
        tenths = np.minimum(size * _TENTHS, _TENTHS - 1)
        steps = np.where(size < 1, tenths, _TENTHS + octaves * _PER_OCTAVE)
        steps = np.floor(np.nan_to_num(steps)).astype(np.int64)
    codes = np.where(values < 0, _BINS - 1 - steps, _BINS + steps)
    return np.where(np.isnan(size), _NAN, codes)
