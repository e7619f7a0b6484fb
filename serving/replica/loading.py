"""From a replica's settings to a proven engine: fetch, verify, load, warm up, golden check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from serving.artifacts import SAMPLE_FILE, place
from serving.core.replica import ReplicaSpec
from serving.errors import ServingError
from serving.replica.backends.base import RuntimeOptions, load_backend
from serving.replica.engine import Engine, rules_for
from serving.replica.golden import check_golden, load_arrays, warm_up


def load_engine(spec: ReplicaSpec, fetch: Callable[[Path], None]) -> Engine:
    """A warm engine for `spec`, ready for traffic.

    `fetch` writes the bundle into an empty directory; it is called only if this node's cache lacks
    it. Raises `ArtifactError` if the bundle does not match its digest, the runtime refuses it, or
    its golden outputs are not met; `DeviceError` if the device is not there; and what `fetch`
    raises.
    """
    bundle = place(Path(spec.home), spec.digest, fetch)
    backend = load_backend(bundle, RuntimeOptions.from_spec(spec))
    try:
        engine = Engine(backend, rules_for(backend, spec.max_size, spec.buckets))
        warm_up(engine, load_arrays(bundle / SAMPLE_FILE, backend.signature.inputs))
        check_golden(engine, bundle)
    except ServingError:
        backend.close()
        raise
    return engine
