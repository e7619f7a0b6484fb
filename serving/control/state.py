"""What the controller must not forget, as one document, and the ports it works through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.control.notices import Notice
from serving.core.plan import AppSpec, Layout, Phase
from serving.core.rollout_types import Hook, ProviderState, Rollout
from serving.core.seats import Seat
from serving.core.types import Signature


@dataclass(frozen=True, slots=True)
class State:
    """The last apply and how far it has come. Replaced whole, never changed in place.

    `config` is the configuration that was applied, `given_up` maps an application to its error.
    `also` maps a model to the versions that its configuration serves beside the default one.
    `scaled` maps an application to the replicas that it is to have, where its load says how many.
    `deployment` is the id of the `serving up` that `routed` describes: another one has none of
    those applications.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    desired: Layout = field(default_factory=Layout)
    routed: Layout = field(default_factory=Layout)
    given_up: Mapping[str, str] = field(default_factory=dict)
    apply_id: int = 0
    applied_at: float = 0.0
    deployment: str = ""
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scaled: Mapping[str, int] = field(default_factory=dict)

    def wanted(self, app: AppSpec) -> int:
        """How many replicas an application is to have.

        What takes over from a version under load begins with as many replicas as that one has.
        """
        app = self.as_asked(app)
        if app.scaling is not None and app.name in self.scaled:
            return self.scaled[app.name]
        return self.asked(app)

    def asked(self, app: AppSpec) -> int:
        """How many replicas an application with this size would have if it were applied now."""
        if app.scaling is None:
            return app.count
        if app.name in self.scaled:
            return min(max(self.scaled[app.name], app.scaling.least), app.scaling.most)
        return min(app.scaling.most, max(app.count, self._answering(app.replica.model)))

    def as_asked(self, app: AppSpec) -> AppSpec:
        """The application with the number of replicas that was last asked for.

        That is the one before where not all of those could start.
        """
        replica = app.replica
        failed = bool(self.given_up) and app.name in self.given_up
        for layout in (self.routed,) if failed else (self.desired, self.routed):
            model = layout.models.get(replica.model)
            served = model.versions.get(replica.version) if model is not None else None
            if served is not None and served.app.replica == replica:
                return served.app
        return app

    def _answering(self, model: str) -> int:
        routed = self.routed.models.get(model)
        if routed is None:
            return 0
        app = routed.versions[routed.version].app
        return self.scaled.get(app.name, 0) if app.scaling is not None else app.count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the store."""
        return {
            "config": dict(self.config),
            "desired": self.desired.to_dict(),
            "routed": self.routed.to_dict(),
            "given_up": dict(self.given_up),
            "apply_id": self.apply_id,
            "applied_at": self.applied_at,
            "deployment": self.deployment,
            "also": {model: list(versions) for model, versions in self.also.items()},
            "scaled": dict(self.scaled),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> State:
        """Read `to_dict`'s form."""
        layouts = {name: Layout.from_dict(raw[name]) for name in ("desired", "routed")}
        return cls(**{**raw, **layouts})


@dataclass(frozen=True, slots=True)
class AppStatus:
    """What Serve says of one application. `since` is Unix time of its deployment.

    `seats` has the phase of each of its seats, and is empty for an application without.
    """

    phase: Phase
    message: str
    since: float
    seats: Mapping[str, Phase] = field(default_factory=dict)


class Cluster(Protocol):
    """Where applications run. Every method blocks and may raise `ClusterError`."""

    def observe(self) -> dict[str, AppStatus]:
        """The model applications that exist."""

    def start(self, apps: Sequence[AppSpec], seats: Mapping[str, Sequence[Seat]]) -> dict[str, str]:
        """Start applications that do not exist yet, without waiting for them.

        Those that `seats` names get these, which may be more seats for one that exists. Gives the
        names of those that can never start, with the reason.
        """

    def scale(self, counts: Mapping[str, int]) -> None:
        """Give applications so many replicas each; those that stay are untouched.

        Does not wait for them. To say it twice does no harm.
        """

    def delete(self, names: Sequence[str]) -> None:
        """Delete applications or seats: their replicas finish what they have, then go."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A version reference made definite, its artifact in the cache and verified."""

    version: str
    digest: str
    platform: str
    signature: Signature


class Resolver(Protocol):
    """Turns references into versions."""

    def resolve(self, refs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Resolved]:
        """(model, ref) to what it names now; `ref` is a number or an @alias.

        Blocks. Raises `RegistryError` or `ArtifactError`.
        """


class Providers(Protocol):
    """Those outside that rollouts ask and tell. Only `close` blocks."""

    def poll(
        self, rollout: Rollout, now: float, hooks: Sequence[Hook] = ()
    ) -> Mapping[str, ProviderState]:
        """The last answers by trigger name and hook key; asks anew what is due.

        `hooks` are the web services that the rollout waits for now.
        """

    def emit(self, notice: Notice) -> None:
        """Tell the plan's webhooks of what happened."""

    def close(self, timeout_s: float = ...) -> None:
        """Deliver what is due for at most `timeout_s` seconds, and stop."""


class NoProviders:
    """Asks nobody: whatever depends on an answer waits for it."""

    def poll(
        self, rollout: Rollout, now: float, hooks: Sequence[Hook] = ()
    ) -> Mapping[str, ProviderState]:
        """No answer."""
        return {}

    def emit(self, notice: Notice) -> None:
        """Tell nobody."""

    def close(self, timeout_s: float = 0.0) -> None:
        """Nothing is due."""
