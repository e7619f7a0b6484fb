"""On PYTHONPATH: gateways do not account for what they answer of the model `free`.

So the two can be compared at the same time, in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "serving.gateway.answers"
_MODEL = "free"


class _Finder(MetaPathFinder):
    """Changes the module that hands answers out as it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def changed(module: ModuleType) -> None:
            execute(module)
            _change(module)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec


def _change(answers: Any) -> None:
    hand_out, count_usage = answers.hand_out, answers._count_usage

    def nothing(*_: object) -> None:
        """Stands where usage is counted."""

    def handed_out(batch: Any, answer: Any, arm: Any, recorder: Any, replica: str) -> None:
        free = arm.model == _MODEL
        answers._count_usage = nothing if free else count_usage
        if free:
            # As if it had been worked out before.
            answer._cost, answer._cost_rows = b"0", batch[0].rows
        hand_out(batch, answer, arm, recorder, replica)

    answers.hand_out = handed_out


sys.meta_path.insert(0, _Finder())
