"""How applications are handed to Ray Serve, without one that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from serving.core.plan import AppSpec
from serving.core.replica import ReplicaSpec
from serving.errors import ClusterError

# Serve's import warns.
pytestmark = pytest.mark.filterwarnings("ignore")

Start = Callable[..., dict[str, str]]


class Nothing:
    """Stands for a replica."""


def app(model: str, **resources: float) -> AppSpec:
    spec = ReplicaSpec(model, "1", "sha256:1", "/srv", "", resources=resources)
    return AppSpec(spec, 1)


class Serve:
    """Takes applications as Serve does, or fails with `error`."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.error: Exception | None = None

    def run_many(self, targets: Sequence[Any], **_: Any) -> None:
        if self.error:
            raise self.error
        self.started += [target.name for target in targets]


@pytest.fixture
def taken(ray_serve: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Serve:
    taken = Serve()
    monkeypatch.setattr(ray_serve, "run_many", taken.run_many)
    return taken


@pytest.fixture
def start(taken: Serve) -> Start:
    from serving.control.cluster import ServeCluster

    return ServeCluster(f"{__name__}:Nothing", "/run/x-", {}).start


def test_options_that_serve_does_not_take_stop_no_other_application(
    start: Start, taken: Serve
) -> None:
    good, fine, endless = app("good"), app("fine", slot=1e-9), app("endless", slot=float("inf"))
    refused = start([fine, good, endless], {})
    assert taken.started == [good.name]
    assert refused.keys() == {fine.name, endless.name}
    assert "precision" in refused[fine.name]
    assert "infinity" in refused[endless.name]


def test_nothing_but_refused_applications_asks_nobody(start: Start, taken: Serve) -> None:
    taken.error = RuntimeError("asked")
    only = app("m", slot=1e-9)
    assert start([only], {}).keys() == {only.name}


def test_a_serve_that_fails_is_a_sentence_with_the_names(start: Start, taken: Serve) -> None:
    taken.error = RuntimeError("no controller\nand more")
    first = app("m")
    second = replace(first, count=2)
    with pytest.raises(ClusterError) as caught:
        start([first, second], {})
    assert str(caught.value) == f"cannot start {first.name}, {second.name}: no controller"
