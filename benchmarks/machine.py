"""What a result was measured on: enough to repeat it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("ray", "onnxruntime-gpu", "torch", "uvicorn", "httptools", "uvloop", "orjson", "numpy")
ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_slug() -> str:
    """The processor's name and core count for a file name."""
    name = re.sub(r"\((R|TM|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", cpu_model())
    words = re.findall(r"[a-z0-9.]+", name.lower())
    return "-".join([*words, f"{os.cpu_count()}c"])


def describe() -> dict[str, object]:
    """Processor, kernel, versions, commit and command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "wrk": _wrk_version(),
        "commit": commit(),
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
    }


def commit() -> str:
    """The checked-out commit, with `+changes` where the tree differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return (head or "none") + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    """What git says, "" where it says nothing: a copy of the tree need have no git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _module() -> str:
    return ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)


def _wrk_version() -> str:
    wrk = shutil.which("wrk")
    if wrk is None:
        return "none"
    done = subprocess.run([wrk, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).split("[", 1)[0].strip()
