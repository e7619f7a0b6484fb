"""The one error of the benchmarks."""

from __future__ import annotations


class BenchmarkError(Exception):
    """A run cannot go on, or its figures cannot be trusted. `str(error)` is a sentence."""
