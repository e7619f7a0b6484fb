"""Prometheus families made from the metrics that `serving.metrics` names."""

from __future__ import annotations

from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

from serving.metrics.family import Metric

_FAMILIES: Final[dict[str, Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
    "info": InfoMetricFamily,
}

_INFO_KEYS: Final = frozenset({"model", "version", "gpu", "host"})
"""Labels of an info family that say what it is about; the others are its value."""


def family_of(metric: Metric) -> Any:
    """An empty family, to which samples are added."""
    # An info family takes its labels from each sample's value.
    name = metric.name.removesuffix("_info") if metric.kind == "info" else metric.name
    labels = [label for label in metric.labels if label in _INFO_KEYS]
    return _FAMILIES[metric.kind](
        name, metric.help, labels=labels if metric.kind == "info" else metric.labels
    )
