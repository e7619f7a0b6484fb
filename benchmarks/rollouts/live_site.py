"""A deployment that versions are rolled out on: `serving up` with a home and ports of its own."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import deployments, processes
from benchmarks.errors import BenchmarkError

PORT, _CONTROL_PORT = 18100, 18102
_POLL_S = 0.05
_OVER = ("succeeded", "rolled_back", "rollback_failed", "paused")


class Site:
    """A running deployment. `pid` is its root process. Its calls raise `BenchmarkError`."""

    def __init__(
        self, scratch: Path, environment: Mapping[str, str], pid: int, models: int
    ) -> None:
        self.pid = pid
        self._models = models
        self._scratch = scratch
        self._environment = environment

    def start(self, model: str, version: str, plan: Mapping[str, Any]) -> str:
        """Begin a rollout by `serving rollout start`; its id."""
        file = self._scratch / "plan.yaml"
        file.write_text(yaml.safe_dump(dict(plan)), encoding="utf-8")
        self._serving("rollout", "start", model, "--to", version, "--plan", str(file))
        return str(self.rollout(model)["id"])

    def tell(self, *command: str) -> None:
        """Run a `serving` command."""
        self._serving(*command)

    def _serving(self, *arguments: str) -> None:
        deployments.serving(
            [*arguments, "-f", str(self._scratch / "serving.yaml")], self._environment
        )

    def rollout(self, name: str) -> dict[str, Any]:
        """A model's newest rollout, or the one of an id."""
        found: dict[str, Any] = self._get(f"/v1/rollouts/{name}")
        return found

    def until(self, name: str, state: str, timeout_s: float) -> dict[str, Any]:
        """The rollout once it is in `state`, or in one that it does not leave by itself."""
        now = self.follow(name, state, timeout_s)
        if now["state"] not in (state, *_OVER):
            raise BenchmarkError(f"{name} is {now['state']} after {timeout_s:.0f} s, not {state}")
        return now

    def follow(self, name: str, state: str, timeout_s: float) -> dict[str, Any]:
        """As `until`; what it has come to where the time is over."""
        deadline = time.monotonic() + timeout_s
        while (now := self.rollout(name))["state"] not in (state, *_OVER):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return now

    def entered(self, rollout: str) -> dict[str, float]:
        """When a rollout entered each state first, in Unix seconds, by the audit log."""
        entries = self._get(f"/v1/audit?after=0&limit=1000&subject={rollout}")["entries"]
        times: dict[str, float] = {}
        for entry in entries:
            times.setdefault(entry["body"]["to"], entry["at"])
        return times

    def alone(self, timeout_s: float = 60.0) -> None:
        """Wait until each model has one replica, so that nothing else shares the CPU."""
        deadline = time.monotonic() + timeout_s
        while True:
            roles = [process.role for process in processes.usage(self.pid)]
            if sum(role.startswith("ServeReplica:model-") for role in roles) <= self._models:
                return
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the other version did not go in {timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_CONTROL_PORT}{path}", timeout=30) as r:
                return json.loads(r.read())
        except OSError as error:
            raise BenchmarkError(f"{path}: {error}") from error


@contextlib.contextmanager
def site(
    scratch: Path,
    versions: Mapping[str, list[Path]],
    *,
    gateways: int = 1,
    sample: Path | None = None,
) -> Iterator[Site]:
    """Register every version of each model and serve the first of each."""
    environment = {"SERVING_HOME": str(scratch / "home")}
    model = {"version": "1", "device": "cpu", "rollout": "immediate"}
    config = {
        "gateway": {"port": PORT, "replicas": gateways},
        "control": {"port": _CONTROL_PORT},
        "models": {name: dict(model) for name in versions},
    }
    file = scratch / "serving.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    for name, paths in versions.items():
        for path in paths:
            given = ["--sample", str(sample), "--batch", "dynamic"] if sample else []
            deployments.serving(["register", name, str(path), *given], environment)
    system = deployments.System(
        "rollouts",
        f"{gateways} gateway(s), one replica a version",
        [*deployments.SERVING, "up", "-f", str(file)],
        f"http://127.0.0.1:{PORT}/v2/health/ready",
        environment=environment,
    )

    def check() -> None:
        with urllib.request.urlopen(system.url, timeout=10):
            return

    with deployments.started(system, check) as running:
        yield Site(scratch, environment, running.pid, len(versions))
