"""Benchmarks of the gateway against other ways to serve the same model. See docs/benchmarks.md."""
