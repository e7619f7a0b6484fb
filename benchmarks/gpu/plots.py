"""One picture a model: throughput by batch size, and latency by throughput."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

_DPI = 90


def draw(title: str, figures: Mapping[str, Any], path: Path) -> None:
    """`figures`: "bare" by batch size and "gateway" by connections, which may be empty."""
    bare, served = figures["bare"], figures["gateway"]
    figure, (batches, curve) = plt.subplots(1, 2, figsize=(11, 4))
    sizes = sorted(bare)
    batches.plot(sizes, [bare[n]["rows_per_s"] for n in sizes], "o-", label="bare loop")
    if served:
        best = max(each["rows_per_s"] for each in served.values())
        batches.axhline(best, color="C1", linestyle="--", label="gateway, its best")
    batches.set_xscale("log", base=2)
    batches.set_xticks(sizes, [str(n) for n in sizes])
    batches.set_xlabel("rows in a run")
    batches.set_ylabel("rows/s")
    curve.plot(
        [bare[n]["rows_per_s"] for n in sizes],
        [bare[n]["run_ms"] for n in sizes],
        "o-",
        label="bare loop, median run",
    )
    counts = sorted(served)
    rates = [served[n]["rows_per_s"] for n in counts]
    curve.plot(rates, [served[n]["p50_ms"] for n in counts], "s-", label="gateway, p50")
    curve.plot(rates, [served[n]["p99_ms"] for n in counts], "^:", label="gateway, p99")
    for n, rate in zip(counts, rates, strict=True):
        curve.annotate(str(n), (rate, served[n]["p99_ms"]), fontsize=7, va="bottom")
    curve.set_yscale("log")
    curve.set_xlabel("rows/s (numbers: connections)")
    curve.set_ylabel("ms")
    for axis in (batches, curve):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
