"""Bundles for tests."""

from pathlib import Path

from serving.artifacts import build_manifest, read_manifest, write_manifest, write_signature
from serving.core.types import Batch, Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), Batch.DYNAMIC
)


def write_bundle(directory: Path, weights: bytes = b"weights" * 1000) -> str:
    """A bundle whose model nobody loads, with its manifest; returns the digest."""
    (directory / "nested").mkdir(parents=True)
    (directory / "model.pt2").write_bytes(weights)
    (directory / "nested" / "labels.txt").write_text("zero\none\n")
    write_signature(directory, SIGNATURE, platform="pytorch_export", model_file="model.pt2")
    write_manifest(directory, build_manifest(directory))
    return digest_of(directory)


def digest_of(directory: Path) -> str:
    return read_manifest(directory).digest
