"""Names of metrics that Prometheus takes."""

from __future__ import annotations

import re

from serving.metrics import METRICS


def test_metric_names_and_labels_are_prometheus_names() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        # The others are names that Triton gave, and dashboards know.
        assert re.fullmatch(r"serving_[a-z_]+|nv_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total"), "the exposition adds it"
        assert (metric.kind == "histogram") <= metric.name.endswith(("_seconds", "_rows"))
        assert (metric.kind == "info") == metric.name.endswith("_info")
        assert metric.help.endswith(".")
