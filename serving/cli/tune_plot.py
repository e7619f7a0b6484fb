"""What `serving tune` measured, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw(found: dict[str, Any], path: Path) -> None:
    """Latency over throughput: each precision and number of replicas, the frontiers, the choice.

    Raises `OSError` where the file cannot be written.
    """
    percentile = found["percentile"]
    figure, axis = plt.subplots(figsize=(8, 4.5))

    def line(rows: list[dict[str, Any]], mark: str, **style: Any) -> None:
        rows = sorted(rows, key=lambda row: row["throughput"])
        xs = [row["throughput"] for row in rows]
        axis.plot(xs, [row["latency_ms"][percentile] for row in rows], mark, **style)

    for kind in dict.fromkeys((r["precision"], r["instances"]) for r in found["measured"]):
        mine = [r for r in found["measured"] if (r["precision"], r["instances"]) == kind]
        line(mine, "o", label=f"{kind[0]}, replicas: {kind[1]}", alpha=0.6)
    for number in dict.fromkeys(row["instances"] for row in found["frontier"]):
        mine = [row for row in found["frontier"] if row["instances"] == number]
        line(mine, "-", color="black", linewidth=0.8)
    axis.plot([], [], "-", color="black", linewidth=0.8, label="frontier, by replicas")
    if found["chosen"] is not None:
        line([found["chosen"]], "*", color="black", markersize=14, label="chosen")
    axis.set(
        xlabel="rows a second", ylabel=f"{percentile} in ms", yscale="log",
        title=f"{found['model']} version {found['version']} on {found['device']}",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
