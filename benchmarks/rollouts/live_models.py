"""The versions that are rolled out live: y = 2x, some of which fail, some of which are slow."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROWS = 2000
"""Bodies that a load draws from; their first values are spread evenly over [0, 1)."""
STABLE_FAILS = 0.001
_SIDE = 256


def write(
    path: Path, *, fails_below: float = 0.0, stable_fails: bool = True, work: int = 0
) -> Path:
    """TorchScript: `x` FP32 [-1, 4] to `y`.

    A row whose first value is under `fails_below` raises; so does one among the `STABLE_FAILS`
    highest in [0, 1), with `stable_fails`. So a row tells which of two versions fails it. A run
    takes `work` products of two 256×256 matrices, whatever its rows.
    """
    import torch

    class Version(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.fails_below = fails_below
            self.fails_from = 1.0 - STABLE_FAILS if stable_fails else 1.0
            self.work = work
            # Products of a rotation neither grow nor fade, so each takes the same time.
            generator = torch.Generator().manual_seed(1)
            noise = torch.randn(_SIDE, _SIDE, generator=generator)
            self.register_buffer("rotation", torch.linalg.qr(noise)[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = x[:, 0]
            if bool((first < self.fails_below).any()):
                raise RuntimeError("this version cannot")
            if bool(((first >= self.fails_from) & (first < 1.0)).any()):
                raise RuntimeError("no version can")
            product = self.rotation
            for _ in range(self.work):
                product = product @ self.rotation
            return x * 2.0 + product[0, 0] * 0.0

    with warnings.catch_warnings():
        # TorchScript is deprecated, and served all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Version()).save(str(path))
    return path


def write_sample(path: Path) -> Path:
    """A sample that no version fails."""
    np.savez(path, x=np.full((2, 4), 2.0, np.float32))
    return path


def first_values() -> NDArray[np.float32]:
    """The first value of each of the load's `ROWS` bodies: the middles of equal parts of [0, 1)."""
    return ((np.arange(ROWS) + 0.5) / ROWS).astype(np.float32)


def blame(row: int, fails_below: float) -> str:
    """Which arm fails the body of this number by itself: "stable", "canary" or "neither"."""
    value = float(first_values()[row])
    if value >= 1.0 - STABLE_FAILS:
        return "stable"
    return "canary" if value < fails_below else "neither"
