import json
from pathlib import Path

import pytest

from benchmarks import machine, results
from benchmarks.results import Target
from benchmarks.run import _parse, _targets


def test_median_goes_into_nested_figures():
    rounds = [{"rps": r, "cpu_us": {"all": r / 10}} for r in (100.0, 900.0, 300.0)]
    assert results.median_of(rounds) == {"rps": 300.0, "cpu_us": {"all": 30.0}}


def test_a_process_absent_from_most_rounds_counts_as_nothing():
    rounds = [{"cpu_us": {"gateway": 20.0, "helper": 9.0}}, *[{"cpu_us": {"gateway": 20.0}}] * 2]
    assert results.median_of(rounds) == {"cpu_us": {"gateway": 20.0, "helper": 0.0}}


@pytest.mark.parametrize(
    ("figure", "at_least", "met"),
    [(2.0, True, True), (1.99, True, False), (2.0, False, True), (2.01, False, False)],
)
def test_a_target_is_met_on_its_side_of_the_bound(figure: float, at_least: bool, met: bool):
    target = Target("ratio", figure, 2, at_least, "×")
    assert target.met is met
    assert target.row()[-1] == ("met" if met else "MISSED")


def test_targets_compare_the_gateway_with_each_peer_that_was_measured():
    def figures(rps: float, p50_ms: float) -> dict[str, object]:
        return {"rps": rps, "p50_ms": p50_ms, "cpu_us": {"all": 40.0}}

    summary = {
        "gateway": {1: figures(3000, 0.3), 64: figures(40_000, 1.5)},
        "bare": {1: figures(5000, 0.2), 64: figures(16_000, 4)},
        "ray-default": {1: figures(60, 15), 64: figures(100, 600)},
    }
    found = {target.name: target.figure for target in _targets(summary)}
    assert found == {
        "throughput against bare, c=64": 2.5,
        "throughput against ray-default, c=64": 400,
        "CPU per request, all processes, c=64": 40.0,
        "p50 against bare, c=1": pytest.approx(1.5),
    }


def test_an_unknown_system_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        _parse(["--systems", "gateway,triton"])
    assert "triton: not in gateway, bare" in capsys.readouterr().err


def test_a_machine_without_git_or_one_of_the_packages_is_described(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(machine, "_PACKAGES", ("ray", "no-such-package"))
    monkeypatch.setattr("sys.argv", [str(results.ROOT / "benchmarks" / "run.py")])
    found = machine.describe()
    assert found["commit"] == "none"
    assert found["packages"]["no-such-package"] is None
    assert found["packages"]["ray"]


def test_table_is_aligned_markdown():
    text = results.table(["system", "rps"], [["bare", "13,508"], ["gateway", "9"]])
    assert text.splitlines() == [
        "| system  | rps    |",
        "| ------- | ------ |",
        "| bare    | 13,508 |",
        "| gateway | 9      |",
    ]


def test_result_files_name_machine_commit_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [str(results.ROOT / "benchmarks" / "run.py"), "--rounds", "1"])
    path = results.write("mlp", {"summary": {}}, [Target("t", 1, 2, True)], "text")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["machine"]["command"] == "python -m benchmarks.run --rounds 1"
    assert document["machine"]["cpu"]
    assert document["machine"]["packages"]["ray"]
    assert document["targets"][0]["met"] is False
    assert path.with_suffix(".md").read_text(encoding="utf-8").endswith("text\n")
