"""A real deployment for tests: `serving up` as a child process, with its own home and ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from serving.cli.preflight import free_port

SERVING = [str(Path(sys.executable).with_name("serving"))]


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """The first true value of `condition`, polled; fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def serving(
    *arguments: str | Path, home: Path, env: dict[str, str] | None = None, timeout_s: float = 180.0
) -> subprocess.CompletedProcess[str]:
    """Run one `serving` command to its end."""
    return subprocess.run(
        [*SERVING, *map(str, arguments)],
        env={**os.environ, "SERVING_HOME": str(home), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


_REGISTER = """
import json, sys
from serving.cli.main import app
for arguments in json.load(sys.stdin):
    app(["register", *arguments], standalone_mode=False)
"""


def register(home: Path, *calls: Sequence[object]) -> None:
    """`serving register` with each call's arguments; in one process, which imports MLflow once."""
    done = subprocess.run(
        [sys.executable, "-c", _REGISTER],
        env={**os.environ, "SERVING_HOME": str(home)},
        input=json.dumps([[str(argument) for argument in call] for call in calls]),
        capture_output=True,
        text=True,
        timeout=180.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class Deployment:
    """`with Deployment(home, {"mlp": {…}}) as d:` serves those models and stops in the end."""

    def __init__(
        self, home: Path, models: dict[str, Any], command: Sequence[str] = SERVING, **sections: Any
    ) -> None:
        self.home = home
        self.command = command
        self.port, self.control_port = free_port(), free_port()
        self.config = {
            **sections,
            "gateway": {"port": self.port, **sections.get("gateway", {})},
            "control": {"port": self.control_port, **sections.get("control", {})},
            "models": models,
        }
        self.file = home / "serving.yaml"
        self.log = home / "up.log"

    def __enter__(self) -> Deployment:
        self.write(self.config["models"])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*self.command, "up", "-f", str(self.file)],
                env={**os.environ, "SERVING_HOME": str(self.home)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            eventually(self._ready, "ready", 120)
        except BaseException as error:
            self.stop()
            error.add_note(self.log.read_text())
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ready(self) -> bool:
        assert self.process.poll() is None, "serving up ended"
        return "\nready" in self.log.read_text()

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def write(self, models: dict[str, Any]) -> None:
        """Change the models in the configuration file: at once, unless they name a rollout."""
        self.config["models"] = {n: {"rollout": "immediate", **m} for n, m in models.items()}
        self.file.write_text(yaml.safe_dump(self.config))

    def apply(self, models: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """Change the models and `serving apply`."""
        self.write(models)
        return serving("apply", "-f", self.file, home=self.home)

    def get(self, port: int, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return json.loads(reply.read())

    def status(self) -> Any:
        return self.get(self.control_port, "/v1/status")

    def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.control_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return str(reply.read().decode())
