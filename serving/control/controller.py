"""The controller: owns the store, the route table and what runs. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from serving import artifacts
from serving.config import ServingConfig, parse_config
from serving.control.board import RouteBoard
from serving.control.fleet import Fleet
from serving.control.layout import Pins, build_layout, check_fixed_settings, references
from serving.control.reconcile import Blocking, Clock, Reconciler
from serving.control.state import Cluster, Resolver, State
from serving.control.totals import BASE, Totals
from serving.core.plan import compare
from serving.core.routing import RouteTable
from serving.errors import ArtifactError, ClusterError, OperatorError, RegistryError, ServingError
from serving.store.sql import PinRow, Store

log = logging.getLogger(__name__)

REANNOUNCE_WAIT_S: Final = 6.0
"""After a restart: three announcement periods, to hear the stored table's replicas again."""
CLUSTER_TIMEOUT_S: Final = 10.0
REPORT_WAIT_TICKS: Final = 4
IDLE_OBSERVE_TICKS: Final = 5
MAX_CHUNK: Final = 4 << 20


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
        listen_tcp: bool = False,
    ) -> None:
        self.config = config
        self.deployment = deployment
        self.clock = clock
        self.errors = 0
        self.last_error = ""
        self._store, self._cluster, self._resolver = store, cluster, resolver
        self._listen_tcp = listen_tcp
        self._in_store, self._in_registry = _thread("store"), _thread("registry")
        self._in_cluster = _thread("cluster", timeout_s=CLUSTER_TIMEOUT_S)
        self._wake = asyncio.Event()
        self._apply_lock = asyncio.Lock()
        self._step_lock = asyncio.Lock()
        self._loop_task: asyncio.Task[None] | None = None
        self.started_at = clock.unix()
        self._awaited: set[str] = set()
        self._started = clock.monotonic()
        self._resumed = False

    async def start(self) -> None:
        """Load what was saved and start the loop. Raises `StoreError`."""
        await self.load()
        self._loop_task = asyncio.create_task(self._loop(), name="reconcile")

    async def load(self) -> None:
        """Take up what was saved. Raises `StoreError`."""
        stored = await self._in_store(self._store.desired)
        state = State.from_dict(stored) if stored else State()
        table = RouteTable(complete=False)
        saved_table = await self._in_store(self._store.route_table)
        if state.deployment != self.deployment:
            # Another `serving up` left this: nothing of it runs. Its counters stay.
            state = State(deployment=self.deployment, apply_id=state.apply_id)
            await self._in_store(self._store.save_desired, state.to_dict())
        else:
            self._resumed = stored is not None
            if saved_table is not None:
                table = RouteTable.from_dict(saved_table)
        self.fleet = Fleet()
        self.totals = Totals(await self._in_store(self._store.counters))
        self.board = RouteBoard(table)
        self._awaited = {
            e.replica for m in table.models.values() for a in m.arms.values() for e in a.endpoints
        }
        self.reconciler = Reconciler(
            state, self.board, self.fleet, self.totals,
            store=self._store, in_store=self._in_store,
            cluster=self._cluster, in_cluster=self._in_cluster,
            clock=self.clock, tick_s=self.config.control.tick_s,
            drain_s=self.config.gateway.drain_s,
        )  # fmt: skip

    async def stop(self) -> None:
        """End the loop and write what is unsaved."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
            await self._flush()

    @property
    def state(self) -> State:
        """The last apply and how far it has come."""
        return self.reconciler.state

    @property
    def alive(self) -> bool:
        """Whether the reconcile loop runs."""
        return self._loop_task is not None and not self._loop_task.done()

    # What replicas and gateways call.

    def announce(self, info: Mapping[str, Any]) -> None:
        """A replica says that it is there, and in what state."""
        if self.fleet.announce(info, self.clock.monotonic()):
            self._wake.set()
        if self._awaited:
            self._awaited.discard(str(info["replica"]))
            if not self._awaited:
                self._wake.set()

    async def poll_routes(self, revision: int, timeout_s: float) -> Mapping[str, Any] | None:
        """The route table once it is newer than `revision`, or None after `timeout_s`."""
        return await self.board.poll(revision, min(timeout_s, 60.0))

    def report(self, payload: Mapping[str, Any]) -> None:
        """A gateway's totals since its start."""
        self.totals.report(payload, self.clock.monotonic())

    def manifest(self, digest: str) -> dict[str, Any]:
        """The files of a cached artifact. Raises `ArtifactError`."""
        return artifacts.read_manifest(self._cached(digest)).to_dict()

    async def read_artifact(self, digest: str, path: str, offset: int, size: int) -> bytes:
        """At most 4 MiB of one file of a cached artifact. Raises `ArtifactError`."""
        directory = self._cached(digest)
        listed = {f.path for f in artifacts.read_manifest(directory).files}
        if path not in listed | {artifacts.MANIFEST_FILE}:
            raise ArtifactError(f"{digest}: it has no file {path!r}")
        return await asyncio.to_thread(_read, directory / path, offset, min(size, MAX_CHUNK))

    def _cached(self, digest: str) -> Path:
        directory = artifacts.cache_dir(self.config.home_dir, digest)
        if not directory.is_dir():
            raise ArtifactError(f"{digest}: not in the controller's cache")
        return directory

    # What an operator calls.

    async def apply(self, raw: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
        """Resolve a configuration, and unless `dry_run` make it the one to converge to.

        Returns the plan. One apply at a time: the next one sees this one's result. Raises
        `OperatorError`.
        """
        async with self._apply_lock:
            config = parse_config(dict(raw), source="configuration")
            check_fixed_settings(config, self.config)
            pins = await self._in_registry(self._resolver.resolve, references(config))
            await self._check_pins(pins)
            layout = build_layout(config, pins, listen_tcp=self._listen_tcp)
            async with self._step_lock:
                before = self.state
                rows = compare(layout, before.desired, before.routed, before.given_up)
                plan = {
                    "apply": before.apply_id if dry_run else before.apply_id + 1,
                    "dry_run": dry_run,
                    "changes": [asdict(row) for row in rows],
                }
                if not dry_run:
                    state = replace(
                        before,
                        config=config.model_dump(mode="json"),
                        desired=layout,
                        given_up={},
                        apply_id=before.apply_id + 1,
                        applied_at=self.clock.unix(),
                    )
                    pinned = [
                        PinRow(model, ref, pin.version, pin.digest, state.applied_at)
                        for (model, ref), pin in pins.items()
                    ]
                    await self._in_store(
                        self._store.apply, state.to_dict(), pinned, ("apply", plan)
                    )
                    self.reconciler.adopt(state)
                    self.fleet.forget_failed(layout.apps())
        self._wake.set()
        return plan

    async def _check_pins(self, pins: Pins) -> None:
        """A version number is never given twice: with another digest it is not the same version."""
        known = await self._in_store(self._store.digests)
        for (model, _), pin in pins.items():
            if (digest := known.get((model, pin.version), pin.digest)) != pin.digest:
                raise RegistryError(
                    f"model {model!r} version {pin.version} has digest {pin.digest} in the "
                    f"registry, but it was {digest} when it was first applied: it was replaced; "
                    "register the file as another version"
                )

    # The loop.

    async def _loop(self) -> None:
        ticks = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.control.tick_s):
                    await self._wake.wait()
            ticks += 1
            look = self._wake.is_set() or not ticks % IDLE_OBSERVE_TICKS
            self._wake.clear()
            try:
                await self.step(look=look)
                self.last_error = ""
            except ServingError as error:
                self._failed(error)
            except Exception as error:
                log.exception("reconcile tick")
                self._failed(error)

    async def step(self, *, look: bool) -> None:
        """Save totals, publish who is there, and take one step; a settled one only if `look`.

        Raises `StoreError` or `ClusterError`; what was not done is done by the next step.
        """
        await self._flush()
        if self._may_act():
            async with self._step_lock:
                await self.reconciler.refresh()
                if look or not self.reconciler.settled:
                    await self.reconciler.tick(gateways_known=self.totals_are_current)

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        if str(error) != self.last_error and isinstance(error, OperatorError):
            log.error("%s", error)
        self.last_error = str(error) or type(error).__name__

    @property
    def totals_are_current(self) -> bool:
        """Whether what the store has of the gateways is overtaken by their own reports.

        Stored totals are up to a tick old. To show them after a restart would let counters go
        backwards, which a reader of counters takes for a restart of everything that was counted.
        """
        waited = self.clock.monotonic() - self._started
        patience = REPORT_WAIT_TICKS * max(1.0, self.config.control.tick_s)
        return not (self._resumed and self.totals.unheard) or waited > patience

    def _may_act(self) -> bool:
        """After a restart, first hear the stored table's replicas: else they'd leave the routes."""
        return not self._awaited or self.clock.monotonic() - self._started > REANNOUNCE_WAIT_S

    async def _flush(self) -> None:
        now, tick_s = self.clock.monotonic(), self.config.control.tick_s
        if past := self.totals.excess(now, tick_s):
            base = self.totals.folded(past)
            await self._in_store(self._store.fold_counters, BASE, base, past)
            self.totals.fold(base, past)
        for instance, row in self.totals.unsaved().items():
            await self._in_store(self._store.save_counters, instance, dict(row))
            self.totals.saved(instance, row)


def _thread(name: str, timeout_s: float | None = None) -> Blocking:
    """A thread that does one blocking call after the other.

    Raises `ClusterError` after a timeout: the call goes on, what was queued behind it does not.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(call: Any, *args: Any) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(pool, call, *args)
        except TimeoutError:
            raise ClusterError(f"the {name} did not answer within {timeout_s:g} s") from None

    return run


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
