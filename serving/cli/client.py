"""The admin API as the command line sees it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final

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

    def apply(self, config: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
        """Send a configuration; the plan. Raises `OperatorError`."""
        body = {"config": config, "dry_run": dry_run}
        return self._call("/v1/apply", body, timeout_s=_APPLY_TIMEOUT_S)

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
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no controller answers at {self.url} ({reason}); start one with `serving up`, or "
                "name it with --url, -f or SERVING_CONTROL_URL"
            ) from error
        if not isinstance(parsed, dict):
            raise ClusterError(f"{self.url}{path} answered something that is not a JSON object")
        return parsed


def failures(status: dict[str, Any]) -> str:
    """One line with every version that was given up."""
    return "; ".join(f"{e['model']} version {e['version']}: {e['error']}" for e in status["errors"])


def _from_reply(url: str, error: urllib.error.HTTPError) -> OperatorError:
    try:
        body = json.load(error)
        return errors.operator_error(body["slug"], body["error"])
    except (ValueError, KeyError, TypeError):
        return ClusterError(f"{url} answered HTTP {error.code}; is it a controller's admin API?")
