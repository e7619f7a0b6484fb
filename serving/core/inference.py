"""One inference as data: what a transport's codec decodes into and encodes from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from serving.core.types import Batch, Signature

NO_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType({})
FIXED_SHAPES_KEY: Final = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one request, whatever the model takes.

    `max_strings` is for the elements of a BYTES tensor, which are looked at one by one.
    """

    max_json_depth: int = 32
    max_json_bytes: int = 16 << 20
    max_elements: int = 1 << 26
    max_tensors: int = 64
    max_strings: int = 1 << 18


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output that the client asked for, by its index in the signature.

    `classification` k > 0 asks for the k largest values as "value:index" strings instead of the
    tensor.
    """

    index: int
    binary: bool = False
    classification: int = 0


@dataclass(slots=True, eq=False)
class InferRequest:
    """A request that fits its model's signature.

    `inputs` are the raw forms of the signature's inputs, in its order: contiguous, little-endian,
    views of the request body where it carried them as binary. `shapes` are theirs, batch dimension
    included. `rows` is that dimension, 1 for `Batch.NONE`. Requests with equal `key` may be joined
    along dimension 0 (never those of a `Batch.NONE` model). `priority` 0 is the default, 1 the
    highest; `timeout_us` 0 is none. `outputs` None means all of them as JSON.
    """

    id: str | None
    rows: int
    inputs: list[memoryview | bytes]
    key: Hashable
    shapes: tuple[tuple[int, ...], ...]
    priority: int = 0
    timeout_us: int = 0
    outputs: tuple[RequestedOutput, ...] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def emptied(self) -> InferRequest:
        """The request without its inputs, which may be large."""
        return replace(self, inputs=[])


@dataclass(slots=True, eq=False)
class OutputTensor:
    """An output of the model for one request: index in the signature's outputs, shape, raw form."""

    index: int
    shape: tuple[int, ...]
    data: memoryview | bytes


@dataclass(slots=True, eq=False)
class EncodedResponse:
    """A response body: one buffer, or several to be written in order.

    `json_length` is the Inference-Header-Content-Length to send with it, None where the body is
    JSON only.
    """

    body: bytes | Sequence[bytes | memoryview]
    json_length: int | None = None

    @property
    def nbytes(self) -> int:
        """The body's Content-Length."""
        if isinstance(self.body, bytes):
            return len(self.body)
        return sum(map(len, self.body))


def row_limit(signature: Signature, max_rows: int) -> int:
    """Most rows in one request under the configured batch limit; 0 without a batch dimension."""
    if signature.batch is Batch.NONE:
        return 0
    if signature.batch is Batch.FIXED:
        return min(max_rows, signature.fixed_rows)
    return max_rows
