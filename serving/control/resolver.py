"""References to versions, resolved in a child process.

The registry's client is large and slow to import, would hold this process's interpreter
lock all the while, and is needed during an apply only. The child reads one JSON request from stdin
and writes one reply:

    {"uri", "home", "refs": [[model, ref], …]}
    {"pins": [Pin.to_dict(), …]}  or  {"error", "slug"}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from serving.control.state import Resolved
from serving.core.types import Signature
from serving.errors import OperatorError, RegistryError, operator_error

_TIMEOUT_S: Final = 570.0
"""Less than a client waits for an apply. Long, because artifacts may have to be fetched."""


class RegistryResolver:
    """Resolves against the registry at `uri` and puts what it finds into the cache of `home`."""

    def __init__(self, uri: str, home: Path) -> None:
        self._request = {"uri": uri, "home": str(home)}

    def resolve(self, refs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Resolved]:
        """(model, ref) to what it names now; `ref` is a number or an @alias.

        Blocks. Raises `RegistryError` or `ArtifactError`.
        """
        if not refs:
            return {}
        request = json.dumps({**self._request, "refs": list(refs)})
        try:
            child = subprocess.run(
                [sys.executable, "-m", "serving.control.resolver"],
                input=request,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
                # A copy: another thread may change the environment while the child is started.
                env=dict(os.environ),
            )
        except subprocess.TimeoutExpired as error:
            raise RegistryError(
                f"the registry did not deliver within {_TIMEOUT_S:g} s; is it reachable?"
            ) from error
        return _read_reply(child)


def _read_reply(child: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], Resolved]:
    lines = child.stdout.strip().splitlines()
    try:
        reply = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise RegistryError(f"the registry client ended ({child.returncode}): {last}") from error
    if "error" in reply:
        raise operator_error(reply["slug"], reply["error"])
    return {
        (pin["model"], pin["ref"]): Resolved(
            pin["version"], pin["digest"], pin["platform"], Signature.from_dict(pin["signature"])
        )
        for pin in reply["pins"]
    }


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from serving.registry.mlflow import Registry
    from serving.registry.pin import materialise, resolve

    registry, home = Registry(request["uri"]), Path(request["home"])
    pins = [resolve(registry, model, ref) for model, ref in request["refs"]]
    for pin in pins:
        materialise(registry, pin, home)
    return {"pins": [pin.to_dict() for pin in pins]}


def main() -> int:
    """The child process."""
    try:
        reply = _answer(json.load(sys.stdin))
    except OperatorError as error:
        reply = {"error": str(error), "slug": error.slug}
    sys.stdout.write(json.dumps(reply) + "\n")
    return 1 if "error" in reply else 0


if __name__ == "__main__":
    sys.exit(main())
