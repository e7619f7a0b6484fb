"""Every metric, by what it is of."""

from __future__ import annotations

from typing import Final

from serving.metrics import costs, deployment, gpus, rollouts, triton

METRICS: Final = (
    *deployment.METRICS,
    *rollouts.METRICS,
    *gpus.METRICS,
    *costs.METRICS,
    *triton.METRICS,
)
"""In the order in which they are documented."""
