"""`serving tune` with real models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.cli import tune_plot
from serving.cli.main import app
from serving.config import load_config
from serving.core.tuning import AS_EXPORTED
from serving.errors import ArtifactError, OperatorError
from serving.model_settings import ModelConfig
from serving.replica.tuning import Space, tune
from tests.e2e.deployment import serving

UTF8 = {"LC_ALL": "C.UTF-8"}


def test_it_prints_the_frontier_and_a_patch_that_the_configuration_takes(home: Path) -> None:
    plot = home / "tune.png"
    done = serving(
        "tune", "mlp@champion", "--slo", "p99=10s", "--budget", "500ms", "--max-size", "4",
        "--instances", "1,2", "--plot", plot, home=home, env=UTF8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loading 2 instances, precision as exported" in done.stderr
    assert "as exported, 2 instances, max_size 4, 16 in flight: " in done.stderr
    assert "mlp version 1 on cpu" in done.stdout
    assert "$ a million" in done.stdout
    assert "cheapest for p99 ≤ 10000 ms: " in done.stdout
    patch = done.stdout[done.stdout.index("models:") :]
    config = home / "serving.yaml"
    config.write_text(patch)
    chosen = load_config(config).models["mlp"]
    assert chosen.replicas in (1, 2)
    assert chosen.batching.max_size in (1, 2, 4)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_precisions_of_a_torch_model_and_a_price_of_ones_own(home: Path) -> None:
    config = home / "serving.yaml"
    config.write_text(
        yaml.safe_dump({"models": {"sleeper": {"version": "1", "usd_per_hour": 36.0}}})
    )
    done = serving(
        "tune", "sleeper", "-f", config, "--budget", "300ms", "--max-size", "2", "--instances", "1",
        "--precision", "float32,bfloat16", "--json", home=home, env=UTF8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["precision"] for row in found["measured"]} == {"float32", "bfloat16"}
    assert {(row["max_size"], row["concurrency"]) for row in found["measured"]} == {
        (1, 1), (1, 2), (2, 2), (2, 4),
    }  # fmt: skip
    for row in found["measured"]:
        assert row["usd_per_million"] == pytest.approx(36e6 / 3600 / row["throughput"], rel=1e-3)
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
        # Little's law: what is in flight is what comes in a second times how long it stays.
        assert row["requests"] >= row["concurrency"]
        assert 1 <= row["mean_rows"] <= row["max_size"]
    alone = [r["mean_rows"] for r in found["measured"] if r["max_size"] == 1]
    assert set(alone) == {1.0}
    ModelConfig.model_validate({"version": "1", **found["patch"]["models"]["sleeper"]})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlp", "--slo", "p98=5ms"], "--slo 'p98=5ms'; expected PERCENTILE=TIME such as p99=50ms"),
        (["mlp", "--slo", "p99=5"], "--slo: '5' is no time above 0; allowed: such as 500us"),
        (["mlp", "--slo", "p99"], "--slo 'p99': no time; expected such as p99=50ms"),
        (["mlp", "--budget", "0s"], "--budget: '0s' is no time above 0"),
        (["mlp", "--max-cost", "-1"], "--max-cost -1; expected USD a million rows"),
        (["mlp", "--instances", "0,2"], "--instances '0,2'; expected numbers from 1 to 64"),
        (["mlp", "--precision", "int8"], "--precision 'int8'; allowed: float32, float16"),
        (["mlp", "--plot", "x.gif"], "--plot x.gif: expected a file that ends in .png"),
        (["mlp", "--plot", "nowhere/x.png"], "nowhere is no directory"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    arguments: list[str], words: str
) -> None:
    with pytest.raises(OperatorError, match=re.escape(words)):
        app(["tune", *arguments], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlp", "--precision", "float16"], "--precision: an ONNX model runs as it was exported"),
        (["nobody"], "no model 'nobody' in the registry"),
    ],
)
def test_what_the_registry_knows_better(home: Path, arguments: list[str], words: str) -> None:
    done = serving("tune", *arguments, home=home)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_objective_that_nothing_meets_is_an_error_with_the_table(home: Path) -> None:
    done = serving(
        "tune", "mlp", "--slo", "p50=1us", "--budget", "100ms", "--max-size", "1",
        "--instances", "1", home=home, env=UTF8,
    )  # fmt: skip
    assert done.returncode == 1
    assert "$ a million" in done.stdout
    assert "models:" not in done.stdout
    assert "error: nothing that was measured meets p50 ≤ 0.001 ms" in done.stderr


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    space = Space(tmp_path, "cpu", {}, {}, None, (AS_EXPORTED,), (1,), (1, 2))
    with pytest.raises(ArtifactError, match=r"^nothing could be measured: as exported, 1 instance"):
        tune(space, 1.0, lambda device, count: None, lambda line: None)


def test_the_frontier_is_drawn_for_each_number_of_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What more replicas gain is no point between those that fewer have.
    points = [(1, 100.0, 1.0), (1, 300.0, 3.0), (2, 200.0, 2.0), (2, 400.0, 2.5)]
    rows = [
        {"precision": "as exported", "instances": n, "throughput": x, "latency_ms": {"p99": y}}
        for n, x, y in points
    ]
    drawn: list[list[tuple[float, float]]] = []
    closed = tune_plot.plt.close

    def close(figure: Any) -> None:
        lines = figure.axes[0].lines
        drawn.extend([*zip(*x.get_data(), strict=True)] for x in lines if x.get_linestyle() == "-")
        closed(figure)

    monkeypatch.setattr(tune_plot.plt, "close", close)
    found = {"model": "m", "version": "1", "device": "cpu", "percentile": "p99", "chosen": None}
    tune_plot.draw({**found, "measured": rows, "frontier": rows}, tmp_path / "x.png")
    # An empty one is for the legend.
    assert [line for line in drawn if line] == [
        [(100.0, 1.0), (300.0, 3.0)],
        [(200.0, 2.0), (400.0, 2.5)],
    ]
