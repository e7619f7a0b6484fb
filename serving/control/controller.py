"""The controller: owns the store, the route table and what runs. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from serving.config import ServingConfig
from serving.control.board import RouteBoard
from serving.control.budgets import Budgets
from serving.control.bundles import Bundles
from serving.control.cost_metrics import CostMetrics
from serving.control.cost_views import cost_view
from serving.control.feedback import Feedback, answers_kept_s
from serving.control.fleet import Fleet
from serving.control.gpu_demands import Needs
from serving.control.gpus import Gpus
from serving.control.incidents import IncidentWatch
from serving.control.ledger import CostLedger
from serving.control.mover import Mover
from serving.control.observe import Observer
from serving.control.operations import Operations
from serving.control.placer import Placer
from serving.control.problems import Problems
from serving.control.readings import Readings
from serving.control.reconcile import Clock, Reconciler
from serving.control.reports import Reports
from serving.control.resumption import Resumption
from serving.control.rollouts import Rollouts
from serving.control.saving import Saving
from serving.control.scaler import Scaler
from serving.control.state import Cluster, NoProviders, Providers, Resolver, State
from serving.control.threads import one_thread
from serving.control.totals import Totals
from serving.core.routing import RouteTable
from serving.errors import Unavailable
from serving.store.sql import Store

CLUSTER_TIMEOUT_S: Final = 10.0
IDLE_OBSERVE_TICKS: Final = 5
FAREWELL_S: Final = 2.0
"""At the end, how long webhooks may take to be told what they were not yet."""


class Controller:
    """Takes applies, announcements and reports; runs the reconcile loop.

    `config` is what `serving up` was given. Everything runs on one event loop; blocking work goes
    to one thread for the store (it has one writer), one for the cluster and one for the registry.
    """

    def __init__(
        self,
        config: ServingConfig,
        deployment: str,
        *,
        store: Store,
        cluster: Cluster,
        resolver: Resolver,
        clock: Clock,
        providers: Callable[[Callable[[], int]], Providers] = lambda _: NoProviders(),
        agents: Callable[[], Mapping[str, float]] = dict,
        labels: Callable[[], Mapping[str, Mapping[str, str]]] = dict,
        listen_tcp: bool = False,
    ) -> None:
        """`providers` makes those that rollouts ask, from what tells the table's revision.

        `agents` makes sure that an agent runs on every node with GPUs, and says how many Ray counts
        on each; `labels` gives the labels of every node.
        """
        self.config = config
        self.deployment = deployment
        self.clock = clock
        self.problems = Problems()
        self.feedback = Feedback()
        self.cost_metrics = CostMetrics()
        self.budgets = Budgets(config.tenants)
        self._store, self._cluster, self._resolver = store, cluster, resolver
        self._new_providers = providers
        self._keep_agents, self._node_labels = agents, labels
        self._listen_tcp = listen_tcp
        self.bundles = Bundles(config.home_dir)
        self._in_store, self._in_registry = one_thread("store"), one_thread("registry")
        self._in_cluster = one_thread("cluster", timeout_s=CLUSTER_TIMEOUT_S)
        self._wake = asyncio.Event()
        self._look_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.started_at = clock.unix()
        self.resumption = Resumption(clock, config.control.tick_s)
        self._woken = False

    async def start(self) -> None:
        """Load what was saved and start the loops. Raises `StoreError`."""
        await self.load()
        self._tasks = [
            asyncio.create_task(self._loop(), name="reconcile"),
            asyncio.create_task(self._watch_loop(), name="rollouts"),
        ]

    async def load(self) -> None:
        """Take up what was saved. Raises `StoreError`."""
        stored = await self._in_store(self._store.desired)
        before = State.from_dict(stored) if stored else State()
        fresh = before.deployment != self.deployment
        saved = await self._in_store(self._store.route_table)
        table = RouteTable(complete=False) if saved is None else RouteTable.from_dict(saved)
        self.fleet = Fleet()
        self.gpus = Gpus(self.fleet, store=self._store, in_store=self._in_store, clock=self.clock)
        await self.gpus.load()
        self.ledger = CostLedger(
            self.config.cost, self._own_price, self.gpus.standings,
            store=self._store, in_store=self._in_store, clock=self.clock,
        )  # fmt: skip
        await self.ledger.load(fresh=fresh)
        self.totals = Totals(await self._in_store(self._store.counters), self.resumption.started)
        self.board = RouteBoard(table)
        if not fresh:
            self.resumption.resume(table, resumed=stored is not None)
        self.reconciler = Reconciler(
            State() if fresh else before, self.board, self.fleet, self.totals,
            store=self._store, in_store=self._in_store,
            cluster=self._cluster, in_cluster=self._in_cluster,
            clock=self.clock, tick_s=self.config.control.tick_s,
            drain_s=self.config.gateway.drain_s,
        )  # fmt: skip
        self.reconciler.price = self.ledger.price
        self._providers = self._new_providers(lambda: self.board.revision)
        observer = Observer(
            self.reconciler, self.fleet, self.totals,
            IncidentWatch(self.fleet, self.gpus.standings),
            self.clock, tick_s=self.config.control.tick_s, drain_s=self.config.gateway.drain_s,
        )  # fmt: skip
        self.rollouts = Rollouts(
            self.reconciler, observer,
            store=self._store, in_store=self._in_store, clock=self.clock, providers=self._providers,
        )  # fmt: skip
        await self._load_placement()
        self.operations = Operations(
            self.config, self.reconciler, self.rollouts, self.placer,
            store=self._store, in_store=self._in_store,
            resolver=self._resolver, in_registry=self._in_registry,
            clock=self.clock, listen_tcp=self._listen_tcp,
        )  # fmt: skip
        self._reports = Reports(
            self.reconciler, self.rollouts, self.totals, self.scaler, self.ledger,
            self.feedback, self.budgets,
            clock=self.clock, look=self._look_now.set, wake=self._wake_model,
        )  # fmt: skip
        self._saving = Saving(
            self.totals, self.ledger, self.gpus, self.placer, self.feedback, self.budgets,
            store=self._store, in_store=self._in_store,
            clock=self.clock, tick_s=self.config.control.tick_s,
        )  # fmt: skip
        self.readings = Readings(self.rollouts, store=self._store, in_store=self._in_store)
        # Another `serving up` left this: nothing of it runs. Its counters stay; its routes do not,
        # or a controller that took over before the first table would publish them as ours.
        blank = State(deployment=self.deployment, apply_id=before.apply_id) if fresh else None
        await self.rollouts.load(blank)

    async def _load_placement(self) -> None:
        """What decides where replicas run and how many. Raises `StoreError`."""
        self.placer = Placer(
            self.gpus.standings,
            lambda: [n.host or n.node for n in self.gpus.nodes() if n.age_s is None],
            Needs(self.config.gpu.safety_margin, self.bundles.size),
            self.clock,
        )
        self.placer.book.departing = lambda: self.fleet.departing(self.reconciler.leaving)
        self.scaler = Scaler(
            self.reconciler, self.fleet, self.totals, self.placer.no_room,
            clock=self.clock, tick_s=self.config.control.tick_s,
        )  # fmt: skip
        self.placer.recall(await self._in_store(self._store.memory_profiles))
        self.reconciler.seating = lambda apps: self.placer.seating(
            apps, self.state, self.rollouts.records, self.gpus.counted_by_ray,
            self.mover.next_number,
        )  # fmt: skip
        self.mover = Mover(
            self.reconciler, self.placer, self.gpus, lambda: self.rollouts.records,
            store=self._store, in_store=self._in_store,
            cluster=self._cluster, in_cluster=self._in_cluster,
            clock=self.clock, tick_s=self.config.control.tick_s,
            drain_s=self.config.gateway.drain_s,
        )  # fmt: skip

    async def stop(self) -> None:
        """End the loops and write what is unsaved."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._tasks:
            await self._saving.flush()
            await self.ledger.conclude()
            await asyncio.to_thread(self._providers.close, FAREWELL_S)

    @property
    def state(self) -> State:
        """The last apply and how far it has come."""
        return self.reconciler.state

    @property
    def alive(self) -> bool:
        """Whether the loops run."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    # What replicas and gateways call.

    def announce(self, info: Mapping[str, Any]) -> None:
        """A replica says that it is there, and in what state."""
        if self.fleet.announce(info, self.clock.monotonic()):
            self._wake.set()
            self._look_now.set()
        self.ledger.announced(info)
        self.gpus.heard(info)
        self.placer.heard(info)
        if self.resumption.heard(str(info["replica"])):
            self._wake.set()

    async def poll_routes(self, revision: int, timeout_s: float) -> Mapping[str, Any] | None:
        """The route table once it is newer than `revision`, or None after `timeout_s`."""
        return await self.board.poll(revision, min(timeout_s, 60.0))

    def report(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """See `Reports.take`."""
        return self._reports.take(payload)

    def add_feedback(self, raw: object) -> int:
        """Late labels for answers that were given; how many.

        Raises `InvalidRequest`, or `ConflictError` if no rollout asks for labels.
        """
        return self.feedback.add(raw, self.clock.monotonic(), answers_kept_s(self.board.table))

    def lease_gpu(self, app: str, replica: str, node: str, pid: int) -> dict[str, Any] | None:
        """See `Placer.lease`; the lease as `GpuLease.to_dict`, or None for the CPU."""
        if not self.resumption.may_act:
            raise Unavailable("just restarted: replicas have not repeated what they hold yet")
        if not self.gpus.counted:
            raise Unavailable("just started: Ray has not said yet which nodes have GPUs")
        lease = self.placer.lease(app, replica, node, pid, self.state, self.rollouts.records)
        return None if lease is None else lease.to_dict()

    # What an operator calls.

    async def apply(self, raw: Mapping[str, Any], *, dry_run: bool, **who: str) -> dict[str, Any]:
        """See `Operations.apply`."""
        plan = await self.operations.apply(raw, dry_run=dry_run, **who)
        self._wake.set()
        return plan

    async def cost(self, by: Sequence[str], since_s: int | None) -> dict[str, Any]:
        """What the last `since_s` seconds cost, or all; see `cost_view`. Raises `StoreError`."""
        await self.ledger.flush(at_once=True)
        now = self.clock.unix()
        since = None if since_s is None else now - since_s
        rollouts = [r.rollout for r in self.rollouts.records]
        return cost_view(
            await self.ledger.rows(since), by,
            since=since, now=now, grid_gco2e_per_kwh=self.config.cost.grid_gco2e_per_kwh,
            rollouts=[(r.model, r.stable, r.canary) for r in rollouts],
            budgets=self.budget_rows(),
        )  # fmt: skip

    def budget_rows(self) -> list[dict[str, Any]]:
        """Today's budgets; see `Budgets.rows`."""
        return self.budgets.rows(self.ledger.spending, self.clock.unix())

    def _own_price(self, model: str, version: str) -> float | None:
        """What the applied configuration says of a replica's price, in USD an hour."""
        configured = self.state.config.get("models", {}).get(model, {}).get("usd_per_hour")
        return None if configured is None else float(configured)

    def plan(self) -> dict[str, Any]:
        """Where what runs and is to run goes; see `Placer.preview`."""
        return self.placer.preview(self.state, self.rollouts.records)

    async def start_rollout(self, model: str, to: str, plan: Any, **who: str) -> dict[str, Any]:
        """See `Operations.start`."""
        started = await self.operations.start(model, to, plan, **who)
        self._look_now.set()
        return started

    async def plan_rollout(self, model: str, to: str, plan: Any) -> dict[str, Any]:
        """See `Operations.plan`."""
        return await self.operations.plan(model, to, plan, self.totals.rate(model))

    async def command_rollout(
        self, key: str, name: str, *, actor: str, reason: str, expected_state: str | None
    ) -> dict[str, Any]:
        """See `Operations.command`."""
        told = await self.operations.command(
            key, name, actor=actor, reason=reason, expected_state=expected_state
        )
        self._look_now.set()
        return told

    async def show_rollout(self, key: str) -> dict[str, Any]:
        """The rollout of an id, or a model's newest. Raises `NotFound` or `StoreError`."""
        return self.operations.shown(await self.rollouts.find(key))

    # The loops.

    async def _loop(self) -> None:
        ticks = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.control.tick_s):
                    await self._wake.wait()
            ticks += 1
            idle = ticks % IDLE_OBSERVE_TICKS == 1
            look = self._wake.is_set() or idle
            self._wake.clear()
            if idle:
                await self.problems.guard("node agents", self._watch_nodes())
            await self.problems.guard("reconcile tick", self.step(look=look))

    async def _watch_loop(self) -> None:
        """Rollouts have a loop of their own: no verdict waits for Ray Serve."""
        while True:
            pause = min(self.config.control.tick_s, self.rollouts.tick_s or math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._look_now.wait()
            self._look_now.clear()
            if self.rollouts.records:
                await self.problems.guard("rollout tick", self.watch())

    async def _watch_nodes(self) -> None:
        self.gpus.expect(await self._in_cluster(self._keep_agents))
        self.ledger.labels = await self._in_cluster(self._node_labels)

    async def step(self, *, look: bool) -> None:
        """Save totals, publish who is there, and take one step; a settled one only if `look`.

        Raises `StoreError` or `ClusterError`; what was not done is done by the next step.
        """
        await self.watch()
        if self.resumption.may_act:
            await self._scale()
        if self.resumption.may_act and (look or self.mover.due or not self.reconciler.settled):
            await self.reconciler.tick(gateways_known=self.totals_are_current)
            await self.mover.step()

    def _wake_model(self) -> None:
        self._woken = True
        self._wake.set()

    async def _scale(self) -> None:
        woken, self._woken = self._woken, False
        async with self.reconciler.lock:
            await self.scaler.tick(self.rollouts.records, at_once=woken)

    async def watch(self) -> None:
        """Save totals, look who is there, and let rollouts go on by it. Raises `StoreError`."""
        # A rollout is judged by what is in memory: it does not wait for what cannot be saved.
        await self.problems.guard("saving of totals", self._saving.flush())
        if self.resumption.may_act:
            async with self.reconciler.lock:
                self.reconciler.look()
                self.placer.tick(self.state, self.rollouts.records)
                await self.rollouts.tick(gateways_known=self.totals_are_current)

    @property
    def totals_are_current(self) -> bool:
        """See `Resumption.totals_are_current`."""
        return self.resumption.totals_are_current(self.totals)
