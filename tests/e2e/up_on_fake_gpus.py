"""`serving`, whose replicas take the fake NVML's GPUs for real ones."""

import sys

from serving import compose
from serving.cli.main import main

compose.REPLICA_CLASS = "tests.e2e.gpu_replica:GpuReplica"  # type: ignore[misc]
sys.argv[0] = "serving"
main()
