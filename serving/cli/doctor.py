"""`serving doctor`: can it work here, and if not, what to do. One line a check."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from serving.errors import OperatorError

if TYPE_CHECKING:
    from serving.config import ServingConfig

_CHILD_TIMEOUT_S: Final = 60.0
_DISK_FAIL: Final = 1 << 30
_DISK_WARN: Final = 10 << 30
_OPEN_FILES: Final = 4096
_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "red"}

# Run in children: what a replica would meet, and a broken library cannot take this process with it.
_RAY: Final = "import ray, json; print(json.dumps({'version': ray.__version__}))"
_TORCH: Final = """
import json, torch
from serving.replica.backends.cuda import old_driver
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"version": torch.__version__, "built": torch.version.cuda, "devices": names,
                  "old_driver": old_driver("torch", torch.version.cuda)}))
"""
_ORT: Final = """
import json, onnxruntime
from serving.replica.backends.cuda import old_driver
print(json.dumps({"version": onnxruntime.__version__,
                  "providers": onnxruntime.get_available_providers(),
                  "old_driver": old_driver("ONNX Runtime", onnxruntime.cuda_version)}))
"""
_NVML: Final = """
import json
from serving.agent.nvml import Nvml
from serving.core.gpus import condition
from serving.errors import DeviceError
def row(gpu):
    found = condition(nvml.sample(gpu))
    return {**gpu.to_dict(), "health": found.health, "reasons": found.reasons}
try:
    nvml = Nvml.open()
    print(json.dumps({"driver": nvml.driver, "gpus": [row(gpu) for gpu in nvml.gpus()]}))
except DeviceError as error:
    print(json.dumps({"absent": str(error.__cause__)}))
"""
_GPU: Final = """
import json
from serving.cli.preflight import missing_gpu
print(json.dumps({"missing": missing_gpu()}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check; `advice` says what to do where it is not ok."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    fact: str
    advice: str = ""


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Configuration file to check with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings, as JSON.")] = False,
) -> None:
    """Check what serving needs; exit 1 if it cannot work."""
    from serving.config import load_config

    config = load_config(file)
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        keys = Finding.__dataclass_fields__
        typer.echo(json.dumps([{k: getattr(f, k) for k in keys} for f in findings], indent=2))
    if any(f.verdict == "fail" for f in findings):
        raise typer.Exit(1)


def examine(config: ServingConfig) -> Iterator[Finding]:
    """Every check in turn."""
    yield _python()
    yield _ray()
    torch, devices = _torch()
    yield torch
    yield _onnxruntime(devices)
    yield from _nvml(devices)
    yield from _models_on_cuda(config)
    yield _open_files()
    yield from _ports(config)
    yield _disk(config.home_dir)
    yield _store(config)
    yield _registry(config)


def _print(finding: Finding) -> None:
    typer.secho(f"{finding.verdict:<4}", fg=_STYLES[finding.verdict], nl=False)
    advice = f". {finding.advice}" if finding.advice else ""
    typer.echo(f"  {finding.check}: {finding.fact}{advice}")


def _python() -> Finding:
    # Which versions will do is the installer's business: requires-python.
    return Finding("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}")


def _ray() -> Finding:
    found, error = _child(_RAY)
    if found is None:
        return Finding("Ray", "fail", error, "Install the package again: pip install ray[serve]")
    address = os.environ.get("RAY_ADDRESS")
    where = f"RAY_ADDRESS={address}" if address else "embedded, on loopback"
    if tuple(int(n) for n in found["version"].split(".")[:2]) < (2, 60):
        return Finding("Ray", "fail", found["version"], "Install Ray 2.60 or newer")
    return Finding("Ray", "ok", f"{found['version']}, {where}")


def _torch() -> tuple[Finding, list[str]]:
    found, error = _child(_TORCH)
    if found is None:
        advice = "Models in .pt2 and TorchScript cannot be served; install torch"
        return Finding("torch", "fail", error, advice), []
    built = f"built for CUDA {found['built']}" if found["built"] else "CPU build"
    devices = ", ".join(found["devices"]) or "no CUDA device"
    fact = f"{found['version']}, {built}, {devices}"
    return _with_driver("torch", fact, found["old_driver"]), found["devices"]


def _onnxruntime(devices: list[str]) -> Finding:
    found, error = _child(_ORT)
    if found is None:
        advice = "Models in .onnx cannot be served; install onnxruntime-gpu"
        return Finding("ONNX Runtime", "fail", error, advice)
    short = [p.removesuffix("ExecutionProvider") for p in found["providers"]]
    fact = f"{found['version']}, providers {', '.join(short)}"
    if devices and "CUDA" not in short:
        advice = "There is a GPU, but ONNX models would run on the CPU: install onnxruntime-gpu"
        return Finding("ONNX Runtime", "warn", fact, advice)
    return _with_driver("ONNX Runtime", fact, found["old_driver"])


def _with_driver(runtime: str, fact: str, old: str | None) -> Finding:
    if old is None:
        return Finding(runtime, "ok", fact)
    advice = "Update the driver, or install builds for its CUDA"
    return Finding(runtime, "warn", f"{fact}; {old}", advice)


def _nvml(devices: list[str]) -> Iterator[Finding]:
    found, error = _child(_NVML)
    if found is None:
        yield Finding("NVML", "warn", error, "GPU facts will be missing: install nvidia-ml-py")
        return
    if "absent" in found:
        yield Finding("NVML", "ok", f"no NVIDIA driver ({found['absent']}); CPU only")
        return
    whole = sum(gpu["mig_parent"] is None for gpu in found["gpus"])
    fact = f"driver {found['driver']}, {whole} GPU(s)"
    if whole and not devices:
        advice = "torch sees no CUDA device: check CUDA_VISIBLE_DEVICES and torch's CUDA version"
        yield Finding("NVML", "warn", fact, advice)
    else:
        yield Finding("NVML", "ok", fact)
    yield from map(_gpu, found["gpus"])


def _gpu(gpu: dict[str, Any]) -> Finding:
    size = gpu["memory_bytes"]
    memory = "shared memory" if size is None else f"{size / (1 << 30):.0f} GiB"
    part = "MIG slice" if gpu["mig_parent"] else "GPU"
    fact = ", ".join([gpu["name"], memory, gpu["uuid"], gpu["health"], *gpu["reasons"]])
    if gpu["divided"]:
        fact += ", in MIG mode: only its slices are used"
    check = f"{part} {gpu['index']}"
    if gpu["health"] == "failed":
        return Finding(check, "warn", fact, "Take it out of use: `serving gpus cordon`")
    return Finding(check, "ok" if gpu["health"] == "ok" else "warn", fact)


def _models_on_cuda(config: ServingConfig) -> Iterator[Finding]:
    from serving.cli.preflight import models_on_cuda

    # On a cluster its nodes' GPUs count, which are not known here.
    asking = [] if os.environ.get("RAY_ADDRESS") else models_on_cuda(config)
    if not asking:
        return
    found, error = _child(_GPU)
    reason = error if found is None else found["missing"]
    for name in asking:
        check = f"models.{name}.device"
        if reason:
            advice = "Set it to auto or cpu, or serve on a machine with a GPU"
            yield Finding(check, "fail", f"cuda, but {reason}", advice)
        else:
            yield Finding(check, "ok", "cuda, and there is a GPU")


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fact = f"at most {soft} per process"
    if soft < _OPEN_FILES:
        return Finding("open files", "warn", fact, f"Run `ulimit -n {_OPEN_FILES}` or more")
    return Finding("open files", "ok", fact)


def _ports(config: ServingConfig) -> Iterator[Finding]:
    from serving.cli import home, preflight

    listeners = {
        "gateway": (config.gateway.host, config.gateway.port),
        "control": (config.control.host, config.control.port),
    }
    owner = home.running(config.home_dir)
    for section, (host, port) in listeners.items():
        where = f"{host}:{port}"
        problem = preflight.port_problem(section, host, port)
        if problem is None:
            yield Finding(f"{section} port", "ok", f"{where} is free")
        elif owner is not None:
            yield Finding(f"{section} port", "ok", f"{where}, held by `serving up` ({owner.pid})")
        else:
            yield Finding(f"{section} port", "fail", f"{where}: {problem.fact}", problem.advice)


def _disk(home: Path) -> Finding:
    existing = next(p for p in (home, *home.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        advice = "Set home or SERVING_HOME to a directory that this user may write"
        return Finding("disk", "fail", f"{existing} is not writable", advice)
    free = shutil.disk_usage(existing).free
    fact = f"{free / (1 << 30):.1f} GiB free for {home}"
    if free < _DISK_FAIL:
        return Finding("disk", "fail", fact, "Free some space, or set home to another disk")
    return Finding("disk", "warn" if free < _DISK_WARN else "ok", fact)


def _store(config: ServingConfig) -> Finding:
    from serving.store.sql import open_store

    path = _sqlite_file(config.store_url)
    if path is not None and not path.exists():
        return Finding("store", "ok", f"{path}, made at the first `serving up`")
    return _attempt("store", lambda: open_store(config.store_url).close(), "can be read")


def _registry(config: ServingConfig) -> Finding:
    from serving.registry.mlflow import Registry

    path = _sqlite_file(config.registry_uri)
    if path is not None and not path.exists():
        return Finding("registry", "ok", f"{path}, made at the first `serving register`")
    return _attempt("registry", lambda: Registry(config.registry_uri).models(), "can be read")


def _attempt(check: str, action: Callable[[], Any], fact: str) -> Finding:
    try:
        action()
    except OperatorError as error:
        return Finding(check, "fail", str(error), f"Set {check} in the configuration, or repair it")
    return Finding(check, "ok", fact)


def _sqlite_file(url: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(url.removeprefix(prefix)) if url.startswith(prefix) else None


def _child(code: str) -> tuple[dict[str, Any] | None, str]:
    """What a child process printed as JSON, or None and why not."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_CHILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"does not load within {_CHILD_TIMEOUT_S:g} s"
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return None, f"cannot be loaded: {last}"
