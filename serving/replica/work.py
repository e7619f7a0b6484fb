"""One batch in a replica: what came of it, and how long it took."""

from __future__ import annotations

import threading

from serving.errors import ServingError
from serving.replica.backends.base import Array


class Work:
    """One batch on its way through the engine, filled in by whichever thread runs it.

    `inputs` are in the signature's order; `deadline` is on the monotonic clock in seconds, 0 for
    none; with `alone` it is merged with no other. Afterwards either `outputs` or `error` is set,
    with the rows of the run it was part of (padding included), the seconds it waited and the
    seconds that run took.
    """

    __slots__ = (
        "alone",
        "arrived",
        "compute_s",
        "deadline",
        "error",
        "finished",
        "inputs",
        "outputs",
        "queue_s",
        "rows",
        "run_rows",
        "shapes",
        "wake",
    )

    def __init__(
        self,
        inputs: list[Array],
        rows: int,
        *,
        arrived: float,
        deadline: float = 0.0,
        alone: bool = False,
    ) -> None:
        self.alone = alone
        self.inputs = inputs
        self.rows = rows
        self.arrived = arrived
        self.deadline = deadline
        self.outputs: list[Array] = []
        self.error: ServingError | None = None
        self.finished = False
        self.run_rows = 0
        self.queue_s = 0.0
        self.compute_s = 0.0
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.wake: threading.Lock | None = None
