"""The admin API as the command line sees it."""

from __future__ import annotations

import getpass
import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote, urlencode

from serving import errors
from serving.errors import ClusterError, OperatorError

_TIMEOUT_S: Final = 10.0
_APPLY_TIMEOUT_S: Final = 600.0
# Loopback and cluster addresses: a proxy of the environment must not come between.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Admin:
    """Calls to a running controller."""

    def __init__(self, url: str) -> None:
        self.url = url

    def status(self) -> dict[str, Any]:
        """What runs. Raises `OperatorError`."""
        return self._call("/v1/status")

    def plan(self) -> dict[str, Any]:
        """Where each replica is placed, or why not. Raises `OperatorError`."""
        return self._call("/v1/plan")

    def apply(self, config: dict[str, Any], *, dry_run: bool, reason: str = "") -> dict[str, Any]:
        """Send a configuration; the plan. Raises `OperatorError`."""
        body = {"config": config, "dry_run": dry_run, "actor": actor(), "reason": reason}
        return self._call("/v1/apply", body, timeout_s=_APPLY_TIMEOUT_S)

    def rollouts(
        self, model: str | None = None, *, active: bool | None = None
    ) -> list[dict[str, Any]]:
        """Rollouts, newest first; of one model, or only those that run. Raises `OperatorError`."""
        wanted = {"model": model, "active": None if active is None else str(active).lower()}
        found: list[dict[str, Any]] = self._call("/v1/rollouts" + _query(wanted))["rollouts"]
        return found

    def rollout(self, name: str) -> dict[str, Any]:
        """The rollout of an id, or the latest of a model. Raises `OperatorError`."""
        return self._call(f"/v1/rollouts/{quote(name, safe='')}")

    def start_rollout(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start a rollout. Raises `OperatorError`."""
        return self._call("/v1/rollouts", request, timeout_s=_APPLY_TIMEOUT_S)

    def plan_rollout(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a rollout would do; nothing changes. Raises `OperatorError`."""
        return self._call("/v1/rollouts/plan", request, timeout_s=_APPLY_TIMEOUT_S)

    def command_rollout(self, name: str, command: str, body: dict[str, Any]) -> dict[str, Any]:
        """Pause, resume, promote, approve, abort or rollback. Raises `OperatorError`."""
        return self._call(f"/v1/rollouts/{quote(name, safe='')}/{command}", body)

    def cost(self, by: str, since_s: int | None) -> dict[str, Any]:
        """What everything cost in the last `since_s` seconds, or ever. Raises `OperatorError`."""
        return self._call("/v1/cost" + _query({"by": by, "since": since_s}))

    def audit(
        self, *, after: int | None = None, limit: int | None = None, subject: str | None = None
    ) -> list[dict[str, Any]]:
        """Entries of the audit log, oldest first: those after `after`, else the last.

        Raises `OperatorError`.
        """
        wanted = {"after": after, "limit": limit, "subject": subject}
        found: list[dict[str, Any]] = self._call("/v1/audit" + _query(wanted))["entries"]
        return found

    def verify_audit(self, expect: str | None = None) -> dict[str, Any]:
        """Check every link of the audit log; `expect` is HASH@COUNT, where it ended once.

        Raises `OperatorError` naming the first broken one.
        """
        return self._call("/v1/audit/verify" + _query({"expect": expect}))

    def gpus(self) -> dict[str, Any]:
        """Every GPU and every node that has some. Raises `OperatorError`."""
        return self._call("/v1/gpus")

    def command_gpu(self, uuid: str, command: str, body: dict[str, Any]) -> dict[str, Any]:
        """Cordon or uncordon a GPU; {"uuid"}. Raises `OperatorError`."""
        return self._call(f"/v1/gpus/{quote(uuid, safe='')}/{command}", body)

    def wait_converged(self, apply_id: int, progress: Callable[[dict[str, Any]], None]) -> None:
        """Follow an apply to its end.

        Raises `ClusterError` with what went wrong, or `ConflictError` if a later apply has replaced
        it. A controller that is away for a while is waited for: it resumes by itself.
        """
        patience = time.monotonic() + 60.0
        while True:
            try:
                status = self.status()
            except ClusterError:
                if time.monotonic() > patience:
                    raise
                time.sleep(0.5)
                continue
            patience = time.monotonic() + 60.0
            progress(status)
            if status["apply"]["id"] > apply_id:
                raise errors.ConflictError("another apply has replaced this one")
            if status["apply"]["state"] == "failed":
                raise ClusterError(failures(status))
            if status["apply"]["state"] == "converged":
                return
            time.sleep(0.2)

    def _call(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with _OPENER.open(request, timeout=timeout_s) as reply:
                parsed = json.load(reply)
        except urllib.error.HTTPError as error:
            raise _from_reply(self.url, error) from error
        except http.client.HTTPException as error:
            raise ClusterError(f"what listens at {self.url} does not speak HTTP") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise ClusterError(_too_late(self.url, timeout_s, body)) from error
            raise ClusterError(
                f"no controller answers at {self.url} ({reason}); start one with `serving up`, or "
                "name it with --url, -f or SERVING_CONTROL_URL"
            ) from error
        if not isinstance(parsed, dict):
            raise ClusterError(f"{self.url}{path} answered something that is not a JSON object")
        return parsed


def actor() -> str:
    """Who gives a command: $SERVING_ACTOR, else the login name and this machine's."""
    if named := os.environ.get("SERVING_ACTOR"):
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _query(wanted: dict[str, Any]) -> str:
    given = {key: value for key, value in wanted.items() if value is not None}
    return "?" + urlencode(given) if given else ""


def failures(status: dict[str, Any]) -> str:
    """One line with every version that was given up."""
    return "; ".join(f"{e['model']} version {e['version']}: {e['error']}" for e in status["errors"])


def _too_late(url: str, timeout_s: float, body: dict[str, Any] | None) -> str:
    sentence = f"the controller at {url} timed out: no answer in {timeout_s:.0f} s"
    if body is None:
        return sentence
    return f"{sentence}. It may do what it was told all the same: see `serving status`"


def _from_reply(url: str, error: urllib.error.HTTPError) -> OperatorError:
    try:
        body = json.load(error)
        return errors.operator_error(body["slug"], body["error"])
    except (ValueError, KeyError, TypeError):
        return ClusterError(f"{url} answered HTTP {error.code}; is it a controller's admin API?")
