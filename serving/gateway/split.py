"""The rows of a batch's outputs, handed back to the requests that they belong to."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

from serving.core.frames import TensorEntry
from serving.core.inference import OutputTensor
from serving.core.types import DATATYPES, TensorSpec
from serving.errors import ModelFailed

_LENGTH: Final = struct.Struct("<I")


def split_outputs(
    specs: Sequence[TensorSpec],
    batched: bool,
    counts: Sequence[int],
    rows: int,
    entries: Sequence[TensorEntry],
    tensors: Sequence[memoryview],
) -> list[list[OutputTensor]]:
    """Per request its slice of every output, as views of `tensors`.

    `counts` are the requests' rows, `rows` those of the run, `specs` the signature's outputs. What
    a request that ran alone gets is checked when it is encoded. Raises `ModelFailed` where the rows
    of several do not add up.
    """
    if [e.index for e in entries] != list(range(len(specs))):
        raise ModelFailed(f"{len(entries)} outputs came back, expected {len(specs)}")
    parts: list[list[OutputTensor]] = [[] for _ in counts]
    for entry, data in zip(entries, tensors, strict=True):
        if not batched or len(counts) == 1:
            parts[0].append(OutputTensor(entry.index, entry.shape, data))
            continue
        if rows != sum(counts) or not entry.shape or entry.shape[0] != rows:
            raise ModelFailed(
                f"output {specs[entry.index].name!r} has shape {list(entry.shape)} "
                f"for a batch of {sum(counts)} rows"
            )
        tail = entry.shape[1:]
        width = math.prod(tail)
        if specs[entry.index].datatype == "BYTES":
            ends = _ends_of_bytes(data, width, counts)
        else:
            ends = _ends(DATATYPES[entry.datatype].itemsize * width, counts)
        if ends[-1] != len(data):
            raise ModelFailed(
                f"output {specs[entry.index].name!r} does not hold the elements of its shape"
            )
        at = 0
        for part, count, end in zip(parts, counts, ends, strict=True):
            part.append(OutputTensor(entry.index, (count, *tail), data[at:end]))
            at = end
    return parts


def _ends(step: int, counts: Sequence[int]) -> list[int]:
    at = 0
    ends = []
    for count in counts:
        at += step * count
        ends.append(at)
    return ends


def _ends_of_bytes(data: memoryview, width: int, counts: Sequence[int]) -> list[int]:
    at = 0
    ends = []
    try:
        for count in counts:
            for _ in range(count * width):
                at += _LENGTH.size + int(_LENGTH.unpack_from(data, at)[0])
            ends.append(at)
    except struct.error:
        return [-1]
    return ends
