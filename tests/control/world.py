"""A controller without Ray: a real store, and a cluster of applications that are only names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serving.config import ServingConfig, parse_config
from serving.control.controller import Controller
from serving.control.notices import Notice
from serving.control.reconcile import Clock
from serving.control.state import AppStatus, NoProviders, Resolved
from serving.core.plan import AppSpec, Phase
from serving.core.rollout_types import Hook, ProviderState, Rollout
from serving.core.seats import Seat, app_of, number_of, seat_name
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import RegistryError
from serving.store.sql import Store, open_store

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), Batch.DYNAMIC
)


class Crash(BaseException):
    """The controller's process ends here."""


@dataclass
class FakeCluster:
    """Applications that become ready when `announce` says so, in seats where they have some.

    Versions that are `broken` fail at their start, those that are `refused` are never started,
    those that are `silent` say nothing any more, replicas of `slow` seats are not ready yet.
    Those of `mute` seats end without a word. Without seats no more than `capacity` replicas of an
    application ever get ready. `generation` counts how often replicas of a version were replaced.
    An application that is started again has replicas of new names.
    """

    apps: dict[str, AppSpec] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    capacity: int = 100
    generation: dict[str, int] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    scaled: list[tuple[str, int]] = field(default_factory=list)
    now: float = 1000.0
    seats: dict[str, dict[str, Seat]] = field(default_factory=dict)
    slow: set[str] = field(default_factory=set)
    mute: set[str] = field(default_factory=set)
    ended: list[dict[str, Any]] = field(default_factory=list)

    def observe(self) -> dict[str, AppStatus]:
        return {
            name: AppStatus(phase, "", 1000.0, dict.fromkeys(self.seats.get(name, ()), phase))
            for name, phase in self.phases.items()
        }

    def start(self, apps: Sequence[AppSpec], seats: Mapping[str, Sequence[Seat]]) -> dict[str, str]:
        refused = {a.name: "never" for a in apps if a.replica.version in self.refused}
        for app in (a for a in apps if a.name not in refused):
            own = {seat_name(app.name, s.number): s for s in seats.get(app.name, ())}
            there = self.seats.get(app.name, {})
            if own and app.name in self.phases:
                assert not own.keys() & there.keys(), "a seat runs already: this would roll it"
            else:
                assert app.name not in self.phases, f"{app.name} runs already: this would roll it"
                self.apps[app.name], self.phases[app.name] = app, Phase.STARTING
                self.started.append(app.name)
                there = {}
            self.seats[app.name] = {**there, **own}
        return refused

    def scale(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            assert not self.seats.get(name), f"{name} has seats"
            self.apps[name] = replace(self.apps[name], count=count)
            self.scaled.append((name, count))

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            app = app_of(name)
            if app == name:
                self.phases.pop(name, None)
            elif self.seats[app].pop(name, None) is not None:
                if name not in self.mute:
                    self.ended.append(self._of_seat(self.apps[app], name, "draining"))
                if not self.seats[app]:
                    del self.phases[app]
            self.deleted.append(name)

    def _of_seat(self, app: AppSpec, seat: str, state: str) -> dict[str, Any]:
        number = number_of(seat) + 100 * self.generation.get(app.replica.version, 0)
        place = self.seats[app.name].get(seat, Seat(0)).node or "node"
        return {**announcement(app, number, state=state), "seat": seat, "node": place}

    def announcements(self) -> list[dict[str, Any]]:
        """What the replicas of everything that runs say now."""
        found, self.ended = self.ended, []
        for name in self.phases:
            app = self.apps[name]
            if app.replica.version in self.silent:
                continue
            first = app.count * self.generation.get(app.replica.version, 0)
            first += 100 * (self.started.count(name) - 1)
            failed = app.replica.version in self.broken
            if not failed:
                self.phases[name] = Phase.RUNNING
            state = "failed" if failed else "ready"
            if seats := self.seats.get(name):
                found += [self._of_seat(app, s, state) for s in seats if s not in self.slow]
            else:
                count = min(app.count, self.capacity)
                found += [announcement(app, first + i, state=state) for i in range(count)]
        return found


def announcement(app: AppSpec, number: int, state: str = "ready") -> dict[str, Any]:
    replica = f"{app.name}#{number}"
    return {
        "replica": replica,
        "app": app.name,
        "model": app.replica.model,
        "version": app.replica.version,
        "digest": app.replica.digest,
        "node": "node",
        "unix": f"/run/{replica}.sock" if state != "failed" else None,
        "tcp": None,
        "pid": 1,
        "device": "cpu",
        "platform": "onnxruntime_onnx",
        "state": state,
        "error": "the golden outputs differ" if state == "failed" else None,
        "rss_bytes": 1,
        "load_s": 0.1,
    }


@dataclass
class FakeResolver:
    """Versions 1 to 3 of every model; `champion` is what @champion names."""

    champion: str = "1"
    digests: dict[str, str] = field(default_factory=dict)
    signatures: dict[str, Signature] = field(default_factory=dict)
    gone: bool = False
    calls: int = 0

    def resolve(self, refs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Resolved]:
        self.calls += 1
        if self.gone:
            raise RegistryError("the registry does not answer")
        return {(model, ref): self._one(ref) for model, ref in refs}

    def _one(self, ref: str) -> Resolved:
        version = self.champion if ref == "@champion" else ref
        if version not in ("1", "2", "3"):
            raise RegistryError(f"no version {ref}")
        digest = self.digests.get(version, f"sha256:{version * 64}")
        signature = self.signatures.get(version, SIGNATURE)
        return Resolved(version, digest, "onnxruntime_onnx", signature)


class FakeProviders(NoProviders):
    """Answers what it was told to, and remembers what it was to tell."""

    def __init__(self) -> None:
        self.answers: dict[str, ProviderState] = {}
        self.notices: list[Notice] = []

    def poll(
        self, rollout: Rollout, now: float, hooks: Sequence[Hook] = ()
    ) -> dict[str, ProviderState]:
        return dict(self.answers)

    def emit(self, notice: Notice) -> None:
        self.notices.append(notice)


class Bomb:
    """Passes calls on to `target`; the `fuse`-th call ends the controller, before or after it."""

    def __init__(self, target: Any, names: Sequence[str], trip: Callable[[], str]) -> None:
        self._target, self._names, self._trip = target, frozenset(names), trip

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if name not in self._names:
            return method

        def call(*args: Any, **options: Any) -> Any:
            verdict = self._trip()
            if verdict == "before":
                raise Crash
            result = method(*args, **options)
            if verdict == "after":
                raise Crash
            return result

        return call


@dataclass
class World:
    """One deployment whose controller may be replaced at any time."""

    home: Path
    deployment: str = "first"
    cluster: FakeCluster = field(default_factory=FakeCluster)
    resolver: FakeResolver = field(default_factory=FakeResolver)
    providers: FakeProviders = field(default_factory=lambda: FakeProviders())
    monotonic: float = 0.0
    set_back: float = 0.0
    """By how much somebody has set the wall clock back."""
    tenants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store: Store = open_store(f"sqlite:///{self.home / 'store.db'}")

    def config(self, models: dict[str, Any] | None = None) -> ServingConfig:
        # What is not about rollouts is told without them.
        models = {n: {"rollout": "immediate", **m} for n, m in (models or {}).items()}
        raw = {"home": str(self.home), "models": models, "tenants": self.tenants}
        return parse_config(raw, source="test")

    async def controller(self, wrap: Callable[[Any, str], Any] = lambda x, _: x) -> Controller:
        """A new controller process, on what the last one left.

        `wrap` may replace what it works through: store, cluster, providers and board.
        """
        controller = Controller(
            self.config(),
            self.deployment,
            store=wrap(self.store, "store"),
            cluster=wrap(self.cluster, "cluster"),
            resolver=self.resolver,
            clock=Clock(lambda: self.monotonic, lambda: 1000.0 + self.monotonic - self.set_back),
            providers=lambda _: wrap(self.providers, "providers"),
        )
        await controller.load()
        controller.gpus.expect({})
        controller.board = controller.reconciler.board = wrap(controller.board, "board")
        return controller

    def announce(self, controller: Controller) -> None:
        for info in self.cluster.announcements():
            controller.announce(info)

    async def settle(self, controller: Controller, steps: int = 12) -> None:
        """Time passes, replicas announce themselves, gateways report, the controller steps."""
        for _ in range(steps):
            self.monotonic += 1.0
            self.announce(controller)
            controller.report(self.report(controller.board.revision))
            await controller.step(look=True)

    def report(self, revision: int, **facts: Any) -> dict[str, Any]:
        return gateway_report("g1", revision, **facts)

    async def apply(
        self, controller: Controller, models: dict[str, Any], *, dry_run: bool = False
    ) -> dict[str, Any]:
        raw = self.config(models).model_dump(mode="json")
        return await controller.apply(raw, dry_run=dry_run)


def gateway_report(
    gateway: str, revision: int = 0, models: Sequence[dict[str, Any]] = (), **facts: Any
) -> dict[str, Any]:
    return {
        "gateway": gateway,
        "node": "node",
        "pid": 1,
        "revision": revision,
        "started_at": 1.0,
        "connections": 0,
        "unrouted": {},
        "models": list(models),
        "bounds": {"seconds": [0.001, 0.01, 0.1], "rows": [1, 4, 16]},
        **facts,
    }


def model_row(version: str, success: int, **facts: Any) -> dict[str, Any]:
    """A gateway's totals of a version: every request took 5 ms, alone in its batch."""
    seconds = {"counts": [0, success, 0, 0], "sum": 0.005 * success}
    return {
        "model": "m",
        "version": version,
        "digest": f"sha256:{version}",
        "requests": {"success": success},
        **dict.fromkeys(("latency", "gateway", "queue", "compute"), seconds),
        "batch_size": {"counts": [success, 0, 0, 0], "sum": success},
        "queue_depth": 0,
        "in_flight": 0,
        "replicas_connected": 1,
        **facts,
    }
