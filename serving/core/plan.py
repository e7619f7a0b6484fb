"""What to do next to make what runs equal to what was asked for: pure decisions.

A `Layout` says which version of which model runs in which Serve application, and how the gateways
are to treat it. There are two of them: `desired` (the last apply, pins resolved) and `routed` (what
the route table says). `decide` compares them with what was observed and returns the next `routed`
layout, the applications to start, to give up and to retire. The order that makes a change invisible
to clients follows from three rules:

1. an application is routed only when all its replicas are ready;
2. nothing of a model leaves the routes before the version that replaces it has entered them;
3. an application that neither layout needs is retired, and deleted only once it is drained.

What replicas are is immutable: a setting that a replica reads is part of the application's name (a
hash), so a changed setting is another application, started beside the old one. How many there are
is not: `routed` has the old number until the new one has come about, or for good where it cannot.
`decide` may be called at any time, any number of times, by a controller that has just lost its
memory: it looks at the world, never at history.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from serving.core.replica import ReplicaSpec
from serving.core.routing import Arm, Endpoint, ModelRoute, RouteTable
from serving.core.scaling import Scaling
from serving.core.sizes import Size

APP_PREFIX: Final = "model-"


@dataclass(frozen=True, slots=True)
class AppSpec:
    """One Serve application: replicas of one version, which stay the same from start to end.

    `count` of them, or with `scaling` as many as that says, from `count` on.
    """

    replica: ReplicaSpec
    count: int
    ready_timeout_s: float = 300.0
    scaling: Scaling | None = None

    @property
    def name(self) -> str:
        """`model-<name>-v<version>-<hash>`: equal if a replica could not tell the difference."""
        identity = {**self.replica.to_dict(), "run_dir": "", "app": ""}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{APP_PREFIX}{self.replica.model}-v{self.replica.version}-{digest[:8]}"

    @property
    def size(self) -> Size:
        """How many replicas it is to have."""
        return Size(self.count, self.scaling)


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """A version in its application, and how gateways treat it (`arm.endpoints` is empty here)."""

    app: AppSpec
    arm: Arm

    def sized_as(self, other: ServedVersion) -> ServedVersion:
        """The same version with as many replicas as `other` is to have."""
        app = replace(self.app, count=other.app.count, scaling=other.app.scaling)
        arm = replace(self.arm, replicas=other.arm.replicas, wake_queue=other.arm.wake_queue)
        return ServedVersion(app, arm)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model: `version` answers requests that name none."""

    version: str
    versions: Mapping[str, ServedVersion]


@dataclass(frozen=True, slots=True)
class Layout:
    """Every served model by name."""

    models: Mapping[str, ServedModel] = field(default_factory=dict)

    def apps(self) -> dict[str, AppSpec]:
        """Every application by name."""
        return {
            served.app.name: served.app
            for model in self.models.values()
            for served in model.versions.values()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the store."""
        apps = {
            m: {v: asdict(s.app) for v, s in x.versions.items()} for m, x in self.models.items()
        }
        return {"table": route_table(self, {}, 0).to_dict(), "apps": apps}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Layout:
        """Read `to_dict`'s form."""
        table = RouteTable.from_dict(raw["table"])
        models = {}
        for name, route in table.models.items():
            versions = {
                version: ServedVersion(_app_from_dict(raw["apps"][name][version]), arm)
                for version, arm in route.arms.items()
            }
            models[name] = ServedModel(route.version, versions)
        return cls(models)


def _app_from_dict(raw: Mapping[str, Any]) -> AppSpec:
    # Layouts of earlier versions say nothing of scaling.
    scaling = Scaling(**raw["scaling"]) if raw.get("scaling") else None
    return AppSpec(**{**raw, "replica": ReplicaSpec.from_dict(raw["replica"]), "scaling": scaling})


class Phase(StrEnum):
    """What Serve says of an application."""

    ABSENT = "absent"
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class ObservedApp:
    """One application as seen now.

    `error` is what Serve or a replica said about a failed start; `age_s` counts from the start of
    the application, or from the last apply if that is later. `wanted` replicas are to be ready
    before it is routed; None: as many as it is started with.
    """

    phase: Phase = Phase.ABSENT
    endpoints: tuple[Endpoint, ...] = ()
    error: str = ""
    age_s: float = 0.0
    wanted: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The next step. `given_up` maps an application to why it is not tried again until an apply."""

    routed: Layout
    start: tuple[AppSpec, ...] = ()
    retire: tuple[str, ...] = ()
    given_up: Mapping[str, str] = field(default_factory=dict)
    pending: tuple[str, ...] = ()


def decide(
    desired: Layout,
    routed: Layout,
    observed: Mapping[str, ObservedApp],
    given_up: Mapping[str, str],
) -> Decision:
    """Compare and choose the next step. `pending` names what is still being waited for."""
    before = routed.apps()
    failed = {
        name: given_up.get(name) or _failure(app, observed.get(name, ObservedApp()), before)
        for name, app in desired.apps().items()
        if name not in before or app.size.grows_from(before[name].size)
    }
    failed = {name: error for name, error in failed.items() if error}
    following = Layout(
        {
            name: model
            for name, wanted in desired.models.items()
            if (model := _next_model(wanted, routed.models.get(name), observed, failed))
        }
    )
    hopeful = {name: app for name, app in desired.apps().items() if name not in failed}
    needed = {**hopeful, **following.apps()}
    start = tuple(
        app
        for name, app in needed.items()
        if observed.get(name, ObservedApp()).phase is Phase.ABSENT
    )
    retire = tuple(sorted(n for n in observed if n not in needed and _exists(observed[n])))
    after = following.apps()
    pending = tuple(
        sorted(n for n, a in hopeful.items() if n not in after or a.size != after[n].size)
    )
    return Decision(following, start, retire, failed, pending)


def _failure(app: AppSpec, seen: ObservedApp, before: Mapping[str, AppSpec]) -> str:
    why = _why_unready(app, seen)
    if not why or app.name not in before:
        return why
    return f"still {before[app.name].size} instead of {app.size} replicas: {why}"


def _why_unready(app: AppSpec, seen: ObservedApp) -> str:
    if seen.error and not is_ready(app, seen):
        return seen.error
    if seen.phase is Phase.FAILED:
        return "its replicas do not start; see the replica's log"
    late = seen.age_s > app.ready_timeout_s and len(seen.endpoints) < _needed(app, seen)
    if seen.phase in (Phase.STARTING, Phase.RUNNING) and late:
        ready = f"{len(seen.endpoints)} of {_needed(app, seen)} replicas"
        return f"{ready} ready within ready_timeout_s={app.ready_timeout_s:g}"
    return ""


def is_ready(app: AppSpec, seen: ObservedApp) -> bool:
    """Whether every replica of `app` is warm and listening, and will stay."""
    alive = seen.phase in (Phase.STARTING, Phase.RUNNING)
    return alive and len(seen.endpoints) >= _needed(app, seen)


def _needed(app: AppSpec, seen: ObservedApp) -> int:
    # A minimum that was raised may find no room, so that as many as before are wanted.
    return app.count if seen.wanted is None else max(seen.wanted, app.size.least)


def _exists(seen: ObservedApp) -> bool:
    return seen.phase not in (Phase.ABSENT, Phase.DELETING)


def _next_model(
    wanted: ServedModel,
    current: ServedModel | None,
    observed: Mapping[str, ObservedApp],
    failed: Mapping[str, str],
) -> ServedModel | None:
    old = dict(current.versions) if current else {}
    versions: dict[str, ServedVersion] = {}
    for version, served in wanted.versions.items():
        name = served.app.name
        seen, hopeful = observed.get(name, ObservedApp()), name not in failed
        if version in old and old[version].app.name == name:
            before, ready = old[version], len(seen.endpoints)
            reached = hopeful and served.app.size.is_reached(before.app.size, ready)
            versions[version] = served if reached else served.sized_as(before)
        elif hopeful and is_ready(served.app, seen):
            versions[version] = served
        elif version in old:
            versions[version] = old[version]
    if wanted.version in versions:
        return ServedModel(wanted.version, versions)
    # The new default is not there yet (or never will be): everything old stays as it is.
    return ServedModel(current.version, {**old, **versions}) if current else None


def route_table(
    layout: Layout, endpoints: Mapping[str, tuple[Endpoint, ...]], revision: int
) -> RouteTable:
    """The table that routes `layout`; `endpoints` maps an application to its ready replicas."""
    return RouteTable(
        revision,
        {
            name: ModelRoute(
                name,
                model.version,
                {
                    version: replace(served.arm, endpoints=endpoints.get(served.app.name, ()))
                    for version, served in model.versions.items()
                },
            )
            for name, model in layout.models.items()
        },
    )


@dataclass(frozen=True, slots=True)
class GatewayView:
    """A live gateway: the table it applied, and what it has yet to answer by (model, version)."""

    revision: int
    unanswered: Mapping[tuple[str, str], int]


def is_drained(
    model: str,
    version: str | None,
    unrouted_since: int,
    gateways: Iterable[GatewayView],
) -> bool:
    """Whether every gateway has left an application behind.

    `unrouted_since` is the first revision without it. `version` is None where the version is still
    routed, in another application: then what is unanswered may be the other one's, and leaving the
    old table is all that can be asked (a replica finishes its batches before it goes, and what it
    cannot finish is sent again).
    """
    return all(
        g.revision >= unrouted_since
        and (version is None or not g.unanswered.get((model, version), 0))
        for g in gateways
    )


class Change(StrEnum):
    """What an apply does to one version. HELD: nothing, as it was taken back before."""

    START = "start"
    SCALE = "scale"
    REPLACE = "replace"
    UPDATE = "update"
    STOP = "stop"
    UNCHANGED = "unchanged"
    ROLLOUT = "rollout"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A line of an apply's plan. `default` marks the version that answers requests naming none."""

    change: Change
    model: str
    version: str
    digest: str
    default: bool
    reason: str


def compare(
    new: Layout, desired: Layout, routed: Layout, given_up: Mapping[str, str]
) -> tuple[PlanRow, ...]:
    """What applying `new` changes, by model and version, over what runs or is being started."""
    old = _in_place(desired, routed, given_up)
    rows: list[PlanRow] = []
    for name in sorted({*new.models, *old.models}):
        wanted = new.models.get(name, ServedModel("", {}))
        current = old.models.get(name, ServedModel("", {}))
        versions = sorted({*wanted.versions, *current.versions}, key=int)
        rows += [_row(name, version, wanted, current, given_up) for version in versions]
    return tuple(rows)


def _in_place(desired: Layout, routed: Layout, given_up: Mapping[str, str]) -> Layout:
    """What is routed, and what is on its way there."""
    models = dict(routed.models)
    for name, wanted in desired.models.items():
        coming = {v: s for v, s in wanted.versions.items() if s.app.name not in given_up}
        now = models.get(name)
        versions = {**coming, **(now.versions if now else {})}
        # A number that is on its way.
        versions |= {v: s for v, s in coming.items() if s.app.name == versions[v].app.name}
        default = now.version if now and wanted.version not in coming else wanted.version
        if versions:
            models[name] = ServedModel(default, versions)
    return Layout(models)


def _row(
    model: str,
    version: str,
    wanted: ServedModel,
    current: ServedModel,
    given_up: Mapping[str, str],
) -> PlanRow:
    after, before = wanted.versions.get(version), current.versions.get(version)
    default = wanted.version == version
    change, reason = Change.UNCHANGED, ""
    if after is None:
        change, reason = Change.STOP, "no longer asked for"
    elif before is None:
        change, reason = Change.START, "failed before" if after.app.name in given_up else "new"
    elif after.app.name != before.app.name:
        change, reason = Change.REPLACE, f"changed: {', '.join(_differences(after, before))}"
    elif str(after.app.size) != str(before.app.size):
        change, reason = Change.SCALE, _scaled(after, before)
    elif after != before:
        change, reason = Change.UPDATE, f"changed: {', '.join(_differences(after, before))}"
    elif default and current.version != version:
        change, reason = Change.UPDATE, "becomes the default version"
    served = after or before
    digest = served.arm.digest if served else ""
    return PlanRow(change, model, version, digest, default, reason)


def _scaled(after: ServedVersion, before: ServedVersion) -> str:
    reason = f"{before.app.size} -> {after.app.size} replicas"
    others = _differences(after, before.sized_as(after))
    others += ["scaling"] * after.app.size.follows_otherwise(before.app.size)
    return f"{reason}; changed: {', '.join(others)}" if others else reason


def _differences(after: ServedVersion, before: ServedVersion) -> list[str]:
    def flat(served: ServedVersion) -> dict[str, Any]:
        arm = {n: getattr(served.arm, n) for n in Arm.__dataclass_fields__}
        settings = {"scaling": served.app.scaling, "ready_timeout_s": served.app.ready_timeout_s}
        return {**arm, **served.app.replica.to_dict(), **settings, "run_dir": ""}

    new, old = flat(after), flat(before)
    return sorted(key for key in new if new[key] != old[key])
