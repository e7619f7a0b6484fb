"""Versions of one model, y = 2x, some of which fail."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np


def write(path: Path, *, fails_below: float = 0.0) -> Path:
    """TorchScript: x FP32 [-1, 4] to y. A row whose first value is under `fails_below` raises.

    First values are drawn from [0, 1) by the clients, so that is the share of requests that fail.
    """
    import torch

    class Version(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails_below = fails_below

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x[:, 0] < self.fails_below).any()):
                raise RuntimeError("this version cannot")
            return x * 2.0

    with warnings.catch_warnings():
        # TorchScript is deprecated, and served all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Version()).save(str(path))
    return path


def write_sample(path: Path) -> Path:
    """A sample that no version fails."""
    np.savez(path, x=np.ones((2, 4), np.float32))
    return path
