"""Announcements and artifact fetches against controllers that are away, slow or wrong."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serving.artifacts import SIGNATURE_FILE, build_manifest, cache_dir, place, write_manifest
from serving.control_link import ControlLink
from serving.errors import ArtifactError, ClusterError
from serving.replica import control
from serving.replica.control import Announcer, ArtifactFetcher, GpuShare


class Method:
    """Looks like a method of a Serve handle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Controller:
    """Looks like the controller's handle: hears announcements and holds one bundle."""

    def __init__(self, bundle: Path | None = None) -> None:
        self.heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.failures = 0
        self.hanging = False
        self.bundle = bundle
        self.lookups = 0

    @property
    def announce(self) -> Method:
        self.lookups += 1
        return Method(self._announce)

    @property
    def manifest(self) -> Method:
        return Method(self._manifest)

    @property
    def read_artifact(self) -> Method:
        return Method(self._read)

    async def _misbehave(self) -> None:
        if self.hanging:
            await asyncio.Event().wait()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("The actor died unexpectedly")

    async def _announce(self, info: dict[str, Any]) -> None:
        await self._misbehave()
        self.heard.put_nowait(info)

    async def _manifest(self, digest: str) -> dict[str, Any]:
        await self._misbehave()
        assert self.bundle is not None
        return build_manifest(self.bundle).to_dict()

    async def _read(self, digest: str, path: str, offset: int, size: int) -> bytes:
        await self._misbehave()
        assert self.bundle is not None
        return (self.bundle / path).read_bytes()[offset : offset + size]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ANNOUNCE_PERIOD_S", 0.05)


def test_it_announces_periodically_with_the_current_state() -> None:
    async def scenario() -> None:
        controller, state = Controller(), {"state": "ready"}
        announcer = Announcer(ControlLink(lambda: controller), lambda: dict(state))
        announcer.start()
        for _ in range(3):
            assert await asyncio.wait_for(controller.heard.get(), 10) == {"state": "ready"}
        state["state"] = "draining"
        while (await asyncio.wait_for(controller.heard.get(), 10))["state"] != "draining":
            pass
        await announcer.stop()
        # Each `handle.method` is a new handle in Serve: one is kept.
        assert controller.lookups == 1

    asyncio.run(scenario())


class Draining:
    """A server that has requests until the controller was told a few times that it drains."""

    def __init__(self) -> None:
        self.told, self.in_time = threading.Semaphore(0), False

    def drain(self, limit_s: float) -> None:
        self.in_time = all(self.told.acquire(timeout=limit_s) for _ in range(4))

    def stop(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore")
def test_it_announces_while_it_drains_and_ends_with_its_last_word() -> None:
    # With Ray, whose import warns.
    from serving.replica.deployment import ModelReplica

    async def scenario() -> None:
        controller, server = Controller(), Draining()
        heard: list[tuple[str, bool]] = []
        # It is itself only on Ray Serve; nobody is to call this at the end of the test.
        replica = SimpleNamespace(_state="ready", _ended=False, _server=server, _watchdog=server)

        async def announce(info: dict[str, Any]) -> None:
            heard.append((info["state"], info["ended"]))
            server.told.release()

        controller._announce = announce  # type: ignore[method-assign]
        link = ControlLink(lambda: controller)
        replica._announcer = Announcer(
            link, lambda: {"state": replica._state, "ended": replica._ended}
        )
        replica._share = GpuShare(link, ("a", "r", "n", 1))
        deployment: Any = ModelReplica
        await deployment.func_or_class.__del__(replica)
        assert server.in_time, "its lease lapses while it drains"
        assert set(heard[:-1]) == {("draining", False)}
        assert heard[-1] == ("draining", True)

    asyncio.run(scenario())


def test_a_controller_that_dies_or_hangs_hears_again_when_it_is_back() -> None:
    async def scenario() -> None:
        controller = Controller()
        connects = 0

        def connect() -> Controller:
            nonlocal connects
            connects += 1
            if connects < 3:
                raise RuntimeError("Application 'controller' does not exist.")
            return controller

        announcer = Announcer(ControlLink(connect), lambda: {"n": 1})
        announcer.start()
        await asyncio.wait_for(controller.heard.get(), 10)
        controller.failures = 2
        await asyncio.wait_for(controller.heard.get(), 10)
        controller.hanging = True
        while not controller.heard.empty():
            controller.heard.get_nowait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(controller.heard.get(), 0.3)
        controller.hanging = False
        await asyncio.wait_for(controller.heard.get(), 10)
        await announcer.stop()
        assert connects == 3

    asyncio.run(scenario())


def test_telling_once_tries_again_and_gives_up_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        controller = Controller()
        announcer = Announcer(ControlLink(lambda: controller), lambda: {"state": "failed"})
        controller.failures = 2
        await announcer.tell(patience_s=10)
        assert controller.heard.get_nowait() == {"state": "failed"}
        controller.failures = 1000
        await announcer.tell(patience_s=0.3)
        assert controller.heard.empty()

    asyncio.run(scenario())
    assert "could not announce itself: the controller failed on announce" in caplog.text


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "data").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"m" * 10)
    (directory / "data" / "weights.bin").write_bytes(np.arange(1_500_000).tobytes())
    (directory / "empty").touch()
    (directory / SIGNATURE_FILE).write_text("{}")
    return directory


def fetch(controller: Controller, home: Path, digest: str) -> Path:
    async def scenario() -> Path:
        fetcher = ArtifactFetcher(
            ControlLink(lambda: controller), digest, asyncio.get_running_loop()
        )
        return await asyncio.to_thread(place, home, digest, fetcher)

    return asyncio.run(scenario())


def test_an_artifact_is_copied_in_pieces_and_verified(tmp_path: Path, bundle: Path) -> None:
    controller = Controller(bundle)
    controller.failures = 2
    digest = build_manifest(bundle).digest
    copy = fetch(controller, tmp_path / "home", digest)
    for path in ("model.onnx", "data/weights.bin", "empty", SIGNATURE_FILE):
        assert (copy / path).read_bytes() == (bundle / path).read_bytes()
    for path in (tmp_path / "home").rglob("*"):
        path.chmod(0o700)


def test_another_bundle_under_the_digest_is_refused(tmp_path: Path, bundle: Path) -> None:
    digest = "sha256:" + "1" * 64
    with pytest.raises(ArtifactError, match=r"sent the manifest of .*, expected sha256:1111"):
        fetch(Controller(bundle), tmp_path / "home", digest)
    assert not cache_dir(tmp_path / "home", digest).exists()


def test_bytes_that_changed_on_the_way_are_refused(tmp_path: Path, bundle: Path) -> None:
    class Corrupting(Controller):
        async def _read(self, digest: str, path: str, offset: int, size: int) -> bytes:
            chunk = await super()._read(digest, path, offset, size)
            return b"x" * len(chunk) if path == "model.onnx" else chunk

    digest = build_manifest(bundle).digest
    with pytest.raises(ArtifactError, match=r"model\.onnx: "):
        fetch(Corrupting(bundle), tmp_path / "home", digest)
    assert not cache_dir(tmp_path / "home", digest).exists()


def test_a_short_answer_is_refused(tmp_path: Path, bundle: Path) -> None:
    manifest = build_manifest(bundle)
    write_manifest(bundle, manifest)

    class Short(Controller):
        async def _read(self, digest: str, path: str, offset: int, size: int) -> bytes:
            return (await super()._read(digest, path, offset, size))[:-1]

    with pytest.raises(ArtifactError, match=r"the controller sent .* bytes of .*, not "):
        fetch(Short(bundle), tmp_path / "home", manifest.digest)


def test_a_controller_that_stays_away_is_one_clear_error(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_FETCH_PATIENCE_S", 0.3)
    controller = Controller(bundle)
    controller.failures = 1000
    with pytest.raises(ClusterError, match="failed on manifest: The actor died unexpectedly"):
        fetch(controller, tmp_path / "home", build_manifest(bundle).digest)
    shutil.rmtree(tmp_path / "home")
