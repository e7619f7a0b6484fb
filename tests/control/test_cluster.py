"""How applications are handed to Ray Serve, without one that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from serving.control.state import Cluster
from serving.core.plan import AppSpec, Phase
from serving.core.replica import ReplicaSpec
from serving.core.seats import Seat
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
        self.options: dict[str, Any] = {}
        self.statuses: dict[str, str] = {}
        self.deleted: list[str] = []
        self.error: Exception | None = None

    def run_many(self, targets: Sequence[Any], **_: Any) -> None:
        if self.error:
            raise self.error
        self.started += [target.name for target in targets]
        self.options |= {t.name: t.target._bound_deployment for t in targets}

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(
            applications={
                name: SimpleNamespace(
                    status=status, message="", last_deployed_time_s=7.0, deployments={}
                )
                for name, status in self.statuses.items()
            }
        )

    def delete(self, name: str, **_: Any) -> None:
        self.deleted.append(name)


@pytest.fixture
def taken(ray_serve: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Serve:
    taken = Serve()
    for name in ("run_many", "status", "delete"):
        monkeypatch.setattr(ray_serve, name, getattr(taken, name))
    return taken


@pytest.fixture
def cluster(taken: Serve) -> Cluster:
    from serving.control.cluster import ServeCluster

    return ServeCluster(f"{__name__}:Nothing", "/run/x-", {})


@pytest.fixture
def start(cluster: Cluster) -> Start:
    return cluster.start


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


def test_a_seat_is_a_serve_application_of_one_replica_on_its_node(
    start: Start, taken: Serve
) -> None:
    m, plain = replace(app("m"), count=2), replace(app("plain"), count=2)
    start([m, plain], {m.name: [Seat(0, "n1", 0.25), Seat(3)]})
    assert taken.started == [f"{m.name}.0", f"{m.name}.3", plain.name]
    assert [d.num_replicas for d in taken.options.values()] == [1, 1, 2]
    first, second, third = (d.ray_actor_options for d in taken.options.values())
    assert first["num_gpus"] == 0.25
    assert first["label_selector"] == {"ray.io/node-id": "n1"}
    assert first["fallback_strategy"] == [{"label_selector": {}}], "any node, where n1 has died"
    assert second["num_gpus"] == 0.0001
    for anywhere in (second, third):
        assert not anywhere.get("label_selector")
    assert not third.get("num_gpus")


@pytest.mark.parametrize(
    ("seats", "phase"),
    [
        (["RUNNING", "DEPLOYING"], Phase.STARTING),
        (["RUNNING", "DEPLOY_FAILED"], Phase.RUNNING),
        (["DELETING", "DEPLOY_FAILED"], Phase.FAILED),
        (["DELETING", "DELETING"], Phase.DELETING),
    ],
)
def test_seats_are_seen_as_one_application(
    cluster: Cluster, taken: Serve, seats: list[str], phase: Phase
) -> None:
    name = app("m").name
    taken.statuses = {f"{name}.{i}": status for i, status in enumerate(seats)}
    taken.statuses |= {"model-other-v1-01234567": "RUNNING", "gateway": "RUNNING"}
    found = cluster.observe()
    assert found[name].phase is phase
    assert list(found[name].seats) == [f"{name}.0", f"{name}.1"]
    assert found["model-other-v1-01234567"].seats == {}
    assert len(found) == 2


def test_an_application_is_deleted_with_its_seats_and_a_seat_alone(
    cluster: Cluster, taken: Serve
) -> None:
    name = app("m").name
    taken.statuses = dict.fromkeys([f"{name}.0", f"{name}.1", "model-x-v1-01234567"], "RUNNING")
    cluster.delete([f"{name}.1"])
    assert taken.deleted == [f"{name}.1"]
    taken.deleted.clear()
    cluster.delete([name])
    assert taken.deleted == [f"{name}.0", f"{name}.1"]
