"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Row = Mapping[str, Any]
_DPI = 80


def false_rollbacks(rows: Sequence[Row], directory: Path) -> None:
    """A heat map a scenario: upper confidence bounds by request rate and share of errors."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    rates = sorted({row["rate"] for row in rows})
    errors = sorted({row["base_error"] for row in rows})
    figure, axes = plt.subplots(
        1, len(scenarios), figsize=(2.3 * len(scenarios) + 1, 2.9), sharey=True, squeeze=False
    )
    image = None
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        upper = np.full((len(rates), len(errors)), np.nan)
        for row in rows:
            if row["scenario"] == scenario:
                at = rates.index(row["rate"]), errors.index(row["base_error"])
                upper[at] = 100 * row["upper"]
                axis.text(at[1], at[0], str(row["false"]), ha="center", va="center", fontsize=8)
        image = axis.imshow(upper, vmin=0, vmax=1, cmap="RdYlGn_r", aspect="auto", alpha=0.8)
        axis.set_title(scenario, fontsize=9)
        axis.set_xticks(range(len(errors)), [f"{100 * e:g} %" for e in errors], fontsize=8)
        axis.set_yticks(range(len(rates)), [f"{r:g}/s" for r in rates], fontsize=8)
        axis.set_xlabel("errors of stable", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes[0].tolist(), label="upper bound, %")
    count = max((row["rollouts"] for row in rows), default=0)
    figure.suptitle(
        f"False rollbacks of {count:,} healthy rollouts (allowed: 1 %)", y=1.08, fontsize=10
    )
    _save(figure, directory / "false-rollbacks.png", tight=False)


def detection(rows: Sequence[Row], directory: Path) -> None:
    """Median delays with 95th percentiles, by fault, one line a request rate."""
    faults = list(dict.fromkeys(row["fault"] for row in rows))
    figure, axis = plt.subplots(figsize=(8, 4))
    for rate in sorted({row["rate"] for row in rows}):
        mine = {
            row["fault"]: row["delay_s"]
            for row in rows
            if row["rate"] == rate and row["replicas"] == 2
        }
        shown = [f for f in faults if f in mine and mine[f]["median"] is not None]
        median = [mine[f]["median"] for f in shown]
        above = [(mine[f]["p95"] or m) - m for f, m in zip(shown, median, strict=True)]
        places = [faults.index(f) for f in shown]
        axis.errorbar(
            places, median, yerr=[[0] * len(median), above], fmt="o", capsize=3, label=f"{rate:g}/s"
        )
    axis.set_yscale("log")
    axis.set_ylabel("seconds to the verdict (median, p95)")
    axis.set_xticks(range(len(faults)), faults, rotation=40, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(title="requests")
    axis.set_title(
        "Default plan, two canary replicas: time from the fault to the verdict", fontsize=10
    )
    _save(figure, directory / "detection.png")


def peers(rows: Sequence[Row], directory: Path) -> None:
    """Delay against regression, ours and the peers', as they come and tuned."""
    kinds = {"errors": "errors of the canary, times stable's", "latency": "latency, times stable's"}
    figure, axes = plt.subplots(1, len(kinds), figsize=(10, 4), sharey=True)
    for axis, (kind, label) in zip(axes, kinds.items(), strict=True):
        for rule in dict.fromkeys(row["rule"] for row in rows):
            mine = [
                row
                for row in rows
                if row["rule"] == rule and row["kind"] == kind and row["base_error"] == 0.001
            ]
            points = [(r["factor"], r["delay_s"]["median"]) for r in mine if r["caught"] > 0.5]
            style = "--" if "tuned" in rule else "-"
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), f"o{style}", label=rule)
        factors = sorted({row["factor"] for row in rows if row["kind"] == kind})
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(factors, [f"{x:g}" for x in factors])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("median seconds to the verdict")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        "200 requests/s, 0.1 % errors, 5 % to the canary for an hour (missing: under half caught)",
        fontsize=10,
    )
    _save(figure, directory / "peers.png")


def _save(figure: Any, path: Path, *, tight: bool = True) -> None:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
