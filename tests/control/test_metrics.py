"""What a scrape and the status say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from serving.control.controller import Controller
from serving.control.metrics import exposition
from serving.control.status import status
from serving.metrics import METRICS
from tests.control.world import World, gateway_report, model_row


def serve(world: World, reports: list[dict[str, Any]]) -> Controller:
    async def scenario() -> Controller:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1", "also_serve": ["2"], "replicas": 2}})
        await world.settle(controller)
        for report in reports:
            controller.report(report)
        return controller

    return asyncio.run(scenario())


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


def labels(version: str, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model": "m", "version": version, **more}.items()))


def test_every_metric_is_exposed_and_nothing_else(tmp_path: Path) -> None:
    reports = [gateway_report("g1", models=[model_row("1", 3)], unrouted={"not_found": 2})]
    text = exposition(serve(World(tmp_path), reports), "2.60").decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    expected = {m.name: m for m in METRICS}
    assert families.keys() == expected.keys()
    for name, metric in expected.items():
        found = families[name]
        assert found.documentation == metric.help
        # The text format knows no info type: it is a gauge of 1.
        assert found.type == ("gauge" if metric.kind == "info" else metric.kind)
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), name


def test_batches_that_ran_out_of_memory_are_counted_by_replica(tmp_path: Path) -> None:
    world = World(tmp_path)
    controller = serve(world, [])
    first, *_ = found = [a for a in world.cluster.announcements() if a["version"] == "1"]
    controller.announce({**first, "oom_batches": 3})
    values = samples(exposition(controller, "2.60"))
    name = "serving_replica_out_of_memory_batches_total"
    assert [values[name, labels("1", replica=a["replica"])] for a in found] == [3.0, 0.0]


def test_counts_are_summed_over_gateways(tmp_path: Path) -> None:
    failed = model_row("1", 4)
    failed["requests"] = {"success": 4, "deadline_exceeded": 1}
    reports = [
        gateway_report("g1", models=[model_row("1", 3, queue_depth=2)]),
        gateway_report("g2", models=[failed, model_row("2", 1, in_flight=5)], connections=7),
    ]
    found = samples(exposition(serve(World(tmp_path), reports), "2.60"))
    assert found["serving_requests_total", labels("1", outcome="success")] == 7
    assert found["serving_requests_total", labels("1", outcome="deadline_exceeded")] == 1
    assert found["serving_requests_total", labels("2", outcome="success")] == 1
    assert found["serving_queue_depth", labels("1")] == 2
    assert found["serving_requests_in_flight", labels("2")] == 5
    for part in ("latency", "gateway", "queue", "compute"):
        name = f"serving_request_{part}_seconds"
        assert found[f"{name}_bucket", labels("1", le="0.001")] == 0
        assert found[f"{name}_bucket", labels("1", le="0.01")] == 7
        assert found[f"{name}_bucket", labels("1", le="+Inf")] == 7
        assert found[f"{name}_count", labels("1")] == 7
    assert found["serving_batch_rows_sum", labels("1")] == 7
    assert found["serving_gateway_connections", (("gateway", "g2"),)] == 7
    assert found["serving_replicas", labels("1", state="wanted")] == 2
    assert found["serving_replicas", labels("1", state="ready")] == 2
    assert found["serving_gateways", ()] == 2
    info = [k for k in found if k[0] == "serving_model_info" and ("version", "1") in k[1]]
    assert dict(info[0][1])["digest"] == "sha256:" + "1" * 64
    assert dict(info[0][1])["default"] == "true"


def test_the_status_of_a_version(tmp_path: Path) -> None:
    row = model_row("1", 4, queue_depth=1, in_flight=2)
    row["requests"] = {"success": 4, "overloaded": 3, "cancelled": 1}
    found = status(serve(World(tmp_path), [gateway_report("g1", models=[row])]))
    (model,) = found["models"]
    first, second = model["versions"]
    assert (model["name"], model["version"]) == ("m", "1")
    assert (first["state"], first["ready"], first["wanted"]) == ("ready", 2, 2)
    assert (first["requests"], first["errors"]) == (8, 3)
    assert (first["queue_depth"], first["in_flight"], first["mean_batch"]) == (1, 2, 1.0)
    assert 0.001 < first["p50_s"] < first["p99_s"] <= 0.01
    assert [r["state"] for r in first["replicas"]] == ["ready", "ready"]
    assert (second["requests"], second["p50_s"]) == (0, None)
    assert found["apply"]["state"] == "converged"


def test_the_status_of_a_rollout_that_failed(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def scenario() -> dict[str, Any]:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        world.cluster.broken = {"2"}
        await world.apply(controller, {"m": {"version": "2"}})
        assert status(controller)["apply"]["state"] == "converging"
        await world.settle(controller)
        return status(controller)

    found = asyncio.run(scenario())
    assert found["apply"]["state"] == "failed"
    assert found["errors"] == [
        {
            "app": found["errors"][0]["app"],
            "model": "m",
            "version": "2",
            "error": "the golden outputs differ",
        }
    ]
    (model,) = found["models"]
    assert (model["version"], model["wanted_version"]) == ("1", "2")
    states = {v["version"]: (v["state"], v["last_error"]) for v in model["versions"]}
    assert states == {"1": ("leaving", ""), "2": ("failed", "the golden outputs differ")}
