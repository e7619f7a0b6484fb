"""Long-polls, artifacts, layouts and the registry's child process."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from serving import artifacts
from serving.config import parse_config
from serving.control.board import RouteBoard
from serving.control.layout import build_layout
from serving.control.resolver import RegistryResolver
from serving.control.state import Resolved
from serving.core.routing import Arm, ModelRoute, RouteTable
from serving.core.types import Batch, Signature
from serving.errors import ArtifactError, RegistryError
from serving.registry.mlflow import Registry
from tests.bundles import write_bundle
from tests.control.world import SIGNATURE, World

# MLflow 3.17 with SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


def table(revision: int, version: str) -> RouteTable:
    arm = Arm("m", version, "sha256:0", "onnxruntime_onnx", SIGNATURE)
    return RouteTable(revision, {"m": ModelRoute("m", version, {version: arm})})


def test_a_poll_answers_when_the_table_changes_and_not_before() -> None:
    async def scenario() -> None:
        board = RouteBoard(RouteTable())
        assert await board.poll(0, 0.01) is None
        polls = [asyncio.create_task(board.poll(0, 30.0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(p.done() for p in polls)
        board.publish(table(1, "1"))
        for plain in await asyncio.gather(*polls):
            assert plain is not None
            assert RouteTable.from_dict(plain) == table(1, "1")
        late = await board.poll(0, 30.0)
        assert late is not None
        assert late["revision"] == 1
        assert await board.poll(1, 0.01) is None

    asyncio.run(scenario())


def test_a_table_differs_by_its_routes_not_by_its_revision() -> None:
    board = RouteBoard(table(3, "1"))
    assert not board.differs(table(9, "1"))
    assert board.differs(table(3, "2"))


def test_artifacts_are_read_in_parts_and_nothing_else_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        digest = write_bundle(tmp_path / "bundle")
        world = World(tmp_path)
        controller = await world.controller()
        with pytest.raises(ArtifactError, match="not in the controller's cache"):
            controller.bundles.manifest(digest)
        artifacts.place_copy(tmp_path, digest, tmp_path / "bundle")
        files = {f["path"]: f for f in controller.bundles.manifest(digest)["files"]}
        size = files["model.pt2"]["size"]
        parts = [
            await controller.bundles.read(digest, "model.pt2", at, 3000)
            for at in range(0, size, 3000)
        ]
        assert b"".join(parts) == (tmp_path / "bundle" / "model.pt2").read_bytes()
        for path in ("../../store.db", "/etc/passwd", "nested", ""):
            with pytest.raises(ArtifactError, match="has no file"):
                await controller.bundles.read(digest, path, 0, 10)
        with pytest.raises(ArtifactError):
            controller.bundles.manifest("../../etc")

    asyncio.run(scenario())


def test_a_layout_has_what_replicas_and_gateways_need() -> None:
    config = parse_config(
        {
            "home": "/srv",
            "models": {
                "m": {
                    "version": "@champion",
                    "also_serve": ["2", "3"],
                    "replicas": 4,
                    "timeout_ms": 1500,
                    "batching": {"max_size": 16, "max_delay_ms": 2, "buckets": [4, 16]},
                    "queue": {"max_rows": 99, "max_wait_ms": 250, "hold_ms": 5000},
                    "onnx": {"intra_op_threads": 2},
                }
            },
        },
        source="test",
    )
    pins = {
        ("m", "@champion"): Resolved("3", "sha256:3", "onnxruntime_onnx", SIGNATURE),
        ("m", "2"): Resolved("2", "sha256:2", "pytorch_export", SIGNATURE),
        ("m", "3"): Resolved("3", "sha256:3", "onnxruntime_onnx", SIGNATURE),
    }
    model = build_layout(config, pins, listen_tcp=True).models["m"]
    assert model.version == "3"
    assert sorted(model.versions) == ["2", "3"], "one application for both names of version 3"
    app, arm = model.versions["3"].app, model.versions["3"].arm
    assert (app.count, app.replica.digest, app.replica.max_size) == (4, "sha256:3", 16)
    assert app.replica.listen_tcp
    assert (app.replica.onnx["intra_op_threads"], app.replica.torch) == (2, {})
    assert model.versions["2"].app.replica.onnx == {}
    assert (arm.timeout_s, arm.max_delay_s, arm.buckets) == (1.5, 0.002, (4, 16))
    assert (arm.queue_max_rows, arm.queue_max_wait_s, arm.queue_hold_s) == (99, 0.25, 5.0)


@pytest.mark.parametrize(
    ("batch", "rows", "expected"),
    [(Batch.NONE, 0, 1), (Batch.FIXED, 8, 8), (Batch.FIXED, 500, 64), (Batch.DYNAMIC, 0, 64)],
)
def test_a_batch_is_no_larger_than_the_graph(batch: Batch, rows: int, expected: int) -> None:
    signature = Signature(SIGNATURE.inputs, SIGNATURE.outputs, batch, rows)
    config = parse_config({"home": "/srv", "models": {"m": {"version": "1"}}}, source="test")
    pins = {("m", "1"): Resolved("1", "sha256:1", "onnxruntime_onnx", signature)}
    served = build_layout(config, pins, listen_tcp=False).models["m"].versions["1"]
    assert (served.arm.max_size, served.app.replica.max_size) == (expected, expected)


def test_the_registry_is_asked_in_a_child_process(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    digest = write_bundle(tmp_path / "bundle")
    Registry(uri).register("m", tmp_path / "bundle", alias="champion")
    home = tmp_path / "home"
    found = RegistryResolver(uri, home).resolve([("m", "@champion"), ("m", "1")])
    assert {ref: pin.version for (_, ref), pin in found.items()} == {"@champion": "1", "1": "1"}
    assert {pin.digest for pin in found.values()} == {digest}
    artifacts.verify(artifacts.cache_dir(home, digest), digest)
    with pytest.raises(RegistryError, match="no alias @nobody"):
        RegistryResolver(uri, home).resolve([("m", "@nobody")])


def test_a_tampered_artifact_is_named(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    write_bundle(tmp_path / "bundle")
    source = Registry(uri).register("m", tmp_path / "bundle").source.removeprefix("file://")
    (Path(source) / "model.pt2").write_bytes(b"tampered" * 875)
    with pytest.raises(ArtifactError, match=r"model\.pt2"):
        RegistryResolver(uri, tmp_path / "home").resolve([("m", "1")])


def test_an_unreadable_registry_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(RegistryError) as caught:
        RegistryResolver(f"sqlite:///{path}", tmp_path / "home").resolve([("m", "1")])
    assert "\n" not in str(caught.value)


def test_nothing_to_resolve_asks_nobody(tmp_path: Path) -> None:
    assert RegistryResolver("sqlite:////nonexistent/x.db", tmp_path).resolve([]) == {}
