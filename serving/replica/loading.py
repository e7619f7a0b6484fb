"""From a replica's settings to a proven engine: fetch, verify, load, warm up, golden check."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.artifacts import SAMPLE_FILE, place
from serving.core.memory_profile import MemoryProfile
from serving.core.replica import GpuLease, ReplicaSpec
from serving.errors import ServingError
from serving.replica.backends.base import RuntimeOptions, load_backend
from serving.replica.engine import Engine
from serving.replica.golden import check_golden, load_arrays
from serving.replica.memory_fit import row_bytes
from serving.replica.profiling import profiled_warm_up
from serving.replica.rules import rules_for


@dataclass(frozen=True, slots=True)
class Loaded:
    """A warm engine, and on a GPU the memory that it takes."""

    engine: Engine
    profile: MemoryProfile | None


def load_engine(
    spec: ReplicaSpec, fetch: Callable[[Path], None], lease: GpuLease | None = None
) -> Loaded:
    """A warm engine for `spec`, ready for traffic.

    `fetch` writes the bundle into an empty directory; it is called only if this node's cache lacks
    it. With a `lease` this process sees its GPU alone and holds no more of it than its bytes;
    nothing in the process may have used CUDA before. Raises `ArtifactError` if the bundle does not
    match its digest, the runtime refuses it, or its golden outputs are not met; `DeviceError` if
    the device is not there, or too small; and what `fetch` raises.
    """
    bundle = place(Path(spec.home), spec.digest, fetch)
    if lease is not None:
        # The driver reads it once, when the first runtime starts it.
        os.environ["CUDA_VISIBLE_DEVICES"] = lease.uuid
    backend = load_backend(bundle, RuntimeOptions.from_spec(spec, lease))
    try:
        sample = load_arrays(bundle / SAMPLE_FILE, backend.signature.inputs)
        engine = Engine(
            backend,
            rules_for(backend, spec.max_size, spec.buckets),
            ceiling=None if lease is None else lease.ceiling,
            usual_row_bytes=row_bytes(sample, len(sample[0]) if sample[0].ndim else 1),
        )
        profile = profiled_warm_up(engine, sample)
        check_golden(engine, bundle)
    except ServingError:
        backend.close()
        raise
    engine.warmed_up()
    return Loaded(engine, profile)
