"""Turns a model file into a bundle: `python -m serving.replica.inspect MODEL --out DIR`.

Runs as a child process, because loading a model is running it: a `.pt2` is unpickled, a broken
graph may crash the runtime. It loads the artifact once on the CPU, reads or infers its signature,
runs a sample through it, and writes the model, signature.json, sample.npz and golden.npz. It prints
one line of JSON: what it found, or {"error": …} with an exit status other than 0.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil

from serving.artifacts import (
    EXPORT_PLATFORM,
    GOLDEN_FILE,
    ONNX_PLATFORM,
    SAMPLE_FILE,
    TORCHSCRIPT_PLATFORM,
    onnx_external_data,
    write_signature,
)
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ArtifactError, ServingError
from serving.replica import probing
from serving.replica.backends.base import Array, Backend, RuntimeOptions, load_model, one_line
from serving.replica.engine import Engine
from serving.replica.golden import compare, run_sample, save_arrays
from serving.replica.rules import rules_for

TIMEOUT_S: Final = 600
_MAX_SIZE: Final = 64
_MIN_MEMORY_BYTES: Final = 8 << 30
_KINDS: Final = {
    ".onnx": (ONNX_PLATFORM, "model.onnx"),
    ".pt2": (EXPORT_PLATFORM, "model.pt2"),
    ".ts": (TORCHSCRIPT_PLATFORM, "model.ts"),
    ".pt": (TORCHSCRIPT_PLATFORM, "model.ts"),
}


def inspect_in_child(
    model: Path,
    out: Path,
    *,
    sample: Path | None = None,
    signature: Path | None = None,
    batch: str = "auto",
    timeout_s: int = TIMEOUT_S,
) -> dict[str, Any]:
    """Make the bundle of `model` in the empty directory `out`, in a child process.

    Gives {"platform", "model_file", "signature", "sample", "reason", "load_s", "run_s"}. Raises
    `ArtifactError` with the child's message, or if it dies or takes longer than `timeout_s`
    seconds.
    """
    command = [sys.executable, "-m", "serving.replica.inspect", str(model), "--out", str(out)]
    command += ["--batch", batch, "--timeout", str(timeout_s)]
    for flag, path in (("--sample", sample), ("--signature", signature)):
        if path is not None:
            command += [flag, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGALRM:
        raise ArtifactError(f"{model}: loading and running it took longer than {timeout_s} s")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ArtifactError(
            f"{model}: the process that loaded it ended with status {done.returncode}: {tail[0]}"
        ) from None
    if "error" in answer:
        raise ArtifactError(answer["error"])
    return answer


def inspect(
    model: Path, out: Path, *, sample: Path | None, signature: Path | None, batch: str
) -> dict[str, Any]:
    """Load and run `model`, write its bundle to `out`. Raises `ArtifactError`."""
    platform, model_file = _kind(model)
    given = _read_signature(signature) if signature is not None else None
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ArtifactError(f"{out}: is not empty")
    _copy_model(model, out / model_file, platform)
    try:
        return _bundle(out, platform, model_file, sample, given, batch)
    except ArtifactError as error:
        # What is loaded is the copy; what the user knows is the original.
        raise ArtifactError(str(error).replace(str(out / model_file), str(model))) from error


def _bundle(
    out: Path,
    platform: str,
    model_file: str,
    sample: Path | None,
    given: Signature | None,
    batch: str,
) -> dict[str, Any]:
    """Run the model in `out` and write what a bundle has beside it."""
    started = time.monotonic()
    backend, declared = _load(out / model_file, platform, given, sample)
    load_s = time.monotonic() - started
    started = time.monotonic()
    finding = _find(backend, declared, sample, batch, given)
    run_s = time.monotonic() - started
    backend.signature = finding.signature
    golden = _golden(backend, finding.sample)
    write_signature(out, finding.signature, platform=platform, model_file=model_file)
    save_arrays(out / SAMPLE_FILE, finding.signature.inputs, finding.sample)
    save_arrays(out / GOLDEN_FILE, finding.signature.outputs, golden)
    return {
        "platform": platform,
        "model_file": model_file,
        "signature": finding.signature.to_dict(),
        "sample": "given" if sample is not None else "generated",
        "reason": finding.reason,
        "load_s": round(load_s, 3),
        "run_s": round(run_s, 3),
    }


def _kind(model: Path) -> tuple[str, str]:
    if not model.is_file():
        raise ArtifactError(f"{model}: there is no such file")
    if model.suffix not in _KINDS:
        raise ArtifactError(
            f"{model}: cannot serve a {model.suffix or 'file without suffix'}; "
            "allowed: .onnx, .pt2 (torch.export), .ts or .pt (TorchScript)"
        )
    return _KINDS[model.suffix]


def _copy_model(model: Path, target: Path, platform: str) -> None:
    """The model and, for ONNX, its external data, at the places that the model names."""
    try:
        shutil.copyfile(model, target)
        for location in onnx_external_data(model) if platform == ONNX_PLATFORM else ():
            source, copy = model.parent / location, target.parent / location
            parts = Path(location).parts
            if any(model.parent.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))):
                raise ArtifactError(f"{source}: external data behind a link is refused")
            if copy.exists():
                raise ArtifactError(f"{model}: its external data is called {location!r}: rename it")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    except OSError as error:
        raise ArtifactError(f"{model}: cannot be copied: {error}") from error


def _read_signature(path: Path) -> Signature:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path}: expected a JSON object")
    return Signature.from_dict({"batch": "none", **raw})


def _load(
    model: Path, platform: str, given: Signature | None, sample: Path | None
) -> tuple[Backend, Signature]:
    options = RuntimeOptions(device="cpu")
    if given is not None or platform != TORCHSCRIPT_PLATFORM:
        backend = load_model(model, platform, options, given)
        return backend, backend.signature
    if sample is None:
        raise ArtifactError(
            f"{model.name}: TorchScript does not record its inputs; give a sample or a signature"
        )
    # The sample shows the inputs, a run with it the outputs.
    from serving.replica.backends.torch import TorchBackend, script_arguments

    inputs = _inputs_of(probing.sample_arrays(sample), script_arguments(model))
    script = TorchBackend(model, platform, options, Signature(inputs, (), Batch.NONE))
    try:
        outputs = script.describe_outputs(probing.read_sample(sample, inputs))
    except (RuntimeError, TypeError) as error:
        raise ArtifactError(f"the model cannot run its sample: {one_line(error)}") from error
    script.signature = Signature(inputs, tuple(outputs), Batch.NONE)
    return script, script.signature


def _inputs_of(arrays: dict[str, Array], arguments: list[str]) -> tuple[TensorSpec, ...]:
    """TorchScript's inputs, in the order of `forward`'s arguments if the sample names those."""
    names = arguments if sorted(arguments) == sorted(arrays) else list(arrays)
    by_dtype = {d.numpy: d.name for d in DATATYPES.values() if d.name != "BF16"}
    for name, array in arrays.items():
        if array.dtype not in by_dtype:
            raise ArtifactError(f"the sample's {name!r} is {array.dtype}, which torch has not")
    return tuple(TensorSpec(n, by_dtype[arrays[n].dtype], arrays[n].shape) for n in names)


def _open_rows(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(replace(s, shape=(-1, *s.shape[1:])) if s.shape else s for s in specs)


def _find(
    backend: Backend, declared: Signature, sample: Path | None, batch: str, given: Signature | None
) -> probing.Finding:
    if sample is not None:
        arrays = probing.read_sample(sample, declared.inputs)
        if any(a.ndim and not len(a) for a in arrays):
            raise ArtifactError(f"{sample}: has no rows")
        try:
            outputs = probing.run(backend, arrays)
        except ArtifactError as error:
            # Not before: what a graph declares may be stale.
            probing.refuse_shapes(sample, declared.inputs, arrays)
            raise ArtifactError(f"{sample}: {error}") from error
    else:
        arrays, outputs = probing.run_first_that_fits(
            backend, probing.generated_samples(declared.inputs)
        )
    if given is not None and batch == "auto":
        return probing.Finding(given, arrays, outputs, "as the given signature says")
    if backend.platform == TORCHSCRIPT_PLATFORM and given is None and batch in ("auto", "dynamic"):
        # The sample's own first dimension need not be the only one that the model takes.
        opened = Signature(_open_rows(declared.inputs), _open_rows(declared.outputs), Batch.NONE)
        finding = probing.find_batch(backend, opened, arrays, outputs, batch)
        if finding.signature.batch is Batch.DYNAMIC:
            return finding
    return probing.find_batch(backend, declared, arrays, outputs, batch)


def _golden(backend: Backend, sample: list[Array]) -> list[Array]:
    """The outputs for the sample as serving computes them, the same twice."""
    engine = Engine(backend, rules_for(backend, _MAX_SIZE))
    golden, again = run_sample(engine, sample), run_sample(engine, sample)
    for spec, first, second in zip(backend.signature.outputs, golden, again, strict=True):
        try:
            compare(spec, second, first, backend.precision)
        except ArtifactError as error:
            raise ArtifactError(
                f"the model gives different outputs for the same inputs, so it cannot be checked "
                f"at load: {error}"
            ) from error
    return golden


def _bound(model: Path, timeout_s: int) -> None:
    """Bound what a bad model can do to this machine: time, memory, core dumps."""
    # The default action of SIGALRM ends the process even inside a runtime that does not return.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(timeout_s)
    size = model.stat().st_size if model.is_file() else 0
    memory = min(psutil.virtual_memory().total, max(_MIN_MEMORY_BYTES, 8 * size))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="serving.replica.inspect")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", type=Path)
    parser.add_argument("--signature", type=Path)
    parser.add_argument("--batch", choices=("auto", "dynamic", "fixed", "none"), default="auto")
    parser.add_argument("--timeout", type=int, default=TIMEOUT_S)
    args = parser.parse_args(arguments)
    # Runtimes and models print to stdout; the answer must be alone there.
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    _bound(args.model, args.timeout)
    try:
        answer = inspect(
            args.model, args.out, sample=args.sample, signature=args.signature, batch=args.batch
        )
    except ServingError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"error": f"{args.model}: {type(error).__name__}: {one_line(error)}"}
    os.write(answer_fd, json.dumps(answer).encode() + b"\n")
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
