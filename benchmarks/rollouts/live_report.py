"""What live rollouts came to: tables, and targets beside the figures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Target, number, table, targets_table
from benchmarks.rollouts.live_scenarios import SCENARIOS, Scenario
from benchmarks.rollouts.live_throughput import CONNECTIONS, beside, ratios

Parts = Mapping[str, Mapping[str, Any]]

_MODES = {
    "none": "no rollout",
    "split": "5 % split",
    "triggers": "5 % split, all default triggers",
    "feedback": "the same, answers kept for labels",
}


def write(parts: Parts, directory: Path) -> Path:
    """Write live.json and live.md into the directory; returns the latter's path.

    A part is {"machine", "runs"} of a scenario, or {"machine", "rounds"} of the throughput.
    """
    named = list(targets(parts))
    document = {
        "benchmark": "live",
        "targets": [
            {"name": t.name, "figure": t.figure, "bound": t.bound, "unit": t.unit, "met": t.met}
            for t in named
        ],
        "parts": parts,
    }
    directory.mkdir(exist_ok=True)
    file = directory / "live.json"
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = "\n\n".join(
        [
            "# live",
            "Rollouts of real versions on `serving up`, under load. " + _machines(parts),
            *_rollouts(parts),
            *_throughput(parts),
            targets_table(named),
        ]
    )
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return file.with_suffix(".md")


def targets(parts: Parts) -> Iterator[Target]:
    """What was asked of the parts that were measured."""
    for scenario in _measured(parts):
        yield from _asked(scenario, parts[scenario.name]["runs"])
    if "throughput" in parts:
        rounds = parts["throughput"]["rounds"]
        for against, found in (("no rollout", ratios(rounds)), ("version 1's", beside(rounds))):
            for mode in ("split", "triggers"):
                if mode in found:
                    name = f"throughput, {_MODES[mode]}, against {against}, c={CONNECTIONS}"
                    yield Target(name, statistics.median(found[mode]), 0.97, True, "×")


def _asked(scenario: Scenario, runs: Sequence[Mapping[str, Any]]) -> Iterator[Target]:
    name = scenario.name
    ended = sum(run["state"] == scenario.ends for run in runs)
    yield Target(f"{name}: {_words(scenario.ends)}", ended, len(runs), True, f"of {len(runs)}")
    spans = [run["weight_s"] for run in runs if "weight_s" in run]
    if name == "failing" and spans:
        yield Target(f"{name}: weight until zero, median", statistics.median(spans), 15, False, "s")
    if name == "all-failing" and spans:
        yield Target(f"{name}: weight until zero, longest", max(spans), 2, False, "s")
    if name == "latency":
        zero = [run["zero_ms"] for run in runs if "zero_ms" in run]
        yield Target(f"{name}: verdict to last gateway, longest", max(zero), 250, False, "ms")
    yield Target(f"{name}: failed or lost for the canary's sake", _harm(runs), 0, False)


def _harm(runs: Sequence[Mapping[str, Any]]) -> int:
    """Failed requests that stable would not have failed, and connections without an answer."""
    return sum(sum(run["failed"].values()) - run["failed"]["stable"] for run in runs)


def _measured(parts: Parts) -> Iterator[Scenario]:
    return (scenario for scenario in SCENARIOS if scenario.name in parts)


def _rollouts(parts: Parts) -> Iterator[str]:
    measured = [(scenario, parts[scenario.name]["runs"]) for scenario in _measured(parts)]
    if not measured:
        return
    head = ["", "the canary", "load", "ended", "by", "seconds, median", "longest"]
    head += ["verdict to zero weight, median ms", "longest"]
    yield table(head, [_course(scenario, runs) for scenario, runs in measured])
    yield (
        "Seconds from the first answer of the canary to a probe to the first that is stable's "
        "again at every gateway; of `healthy` from its first weight to success. Requests with "
        "the probes' header go to the canary as long as the route table gives it weight. The "
        "verdict is the time of its entry in the audit log."
    )
    head = ["", "requests", "to the canary", "it failed", "clients saw of that", "stable failed"]
    head += ["p50 ms", "p99 ms", "p50 ms of the canary", "of stable"]
    yield table(head, [_clients(scenario, runs) for scenario, runs in measured])
    yield (
        "Requests from the first weight on, without probes. A failed response is put down to the "
        "version that fails such a request by itself; a lost connection to the canary. The last "
        "two are what the gateways measured."
    )


def _course(scenario: Scenario, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    spans = [run.get("weight_s", run.get("rollout_s")) for run in runs]
    ended = Counter(_words(run["state"]) for run in runs)
    by = Counter(run["reason"].partition(":")[0] for run in runs)
    return [
        scenario.name,
        scenario.about,
        f"{scenario.rate:g}/s",
        ", ".join(f"{state} {n}" for state, n in ended.items()),
        ", ".join(f"{reason} {n}" for reason, n in by.items()),
        *_median_and_longest([span for span in spans if span is not None]),
        *_median_and_longest([run["zero_ms"] for run in runs if "zero_ms" in run]),
    ]


def _clients(scenario: Scenario, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    def arm(name: str, key: str) -> list[float]:
        return [run["arms"][name][key] or 0 for run in runs]

    return [
        scenario.name,
        f"{sum(run['requests'] for run in runs):,}",
        f"{sum(arm('canary', 'requests')):,}",
        f"{sum(arm('canary', 'failed')):,}",
        str(_harm(runs)),
        str(sum(run["failed"]["stable"] for run in runs)),
        *(number(statistics.median(run[key] for run in runs)) for key in ("p50_ms", "p99_ms")),
        *(number(1e3 * statistics.median(arm(name, "p50_s"))) for name in ("canary", "stable")),
    ]


def _median_and_longest(figures: Sequence[float]) -> list[str]:
    if not figures:
        return ["–", "–"]
    return [number(statistics.median(figures)), number(max(figures))]


def _throughput(parts: Parts) -> Iterator[str]:
    if "throughput" not in parts:
        return
    rounds = parts["throughput"]["rounds"]
    against, pairs = ratios(rounds), beside(rounds)
    rows = [
        [
            _MODES[mode],
            *(number(statistics.median(r[mode][key] for r in rounds)) for key in _COLUMNS),
            number(statistics.median(sum(r[mode]["cpu_us"].values()) for r in rounds)),
            *_median_and_range(against.get(mode)),
            *_median_and_range(pairs.get(mode)),
        ]
        for mode in rounds[0]
    ]
    head = ["MLP, one gateway", "rps", "p50 ms", "p99 ms", "CPU µs", "× no rollout", "rounds"]
    yield table([*head, "× version 1", "pairs"], rows)
    others = max(r[mode]["others_cpu"] for r in rounds for mode in r)
    yield (
        f"Medians of {len(rounds)} rounds, each of which goes through all rows, every other one "
        f"backwards; c={CONNECTIONS}. × version 1: against requests that name version 1 in their "
        "path, which no split concerns, in the same seconds by turns. Other programs took at most "
        f"{others:.0%} of the machine's CPU. The canary is the same model; triggers only recorded "
        f"what they found, and some spoke against it in {_accused(rounds)}."
    )


def _accused(rounds: Sequence[Mapping[str, Any]]) -> str:
    found = [mode["rollout"]["against"] for r in rounds for mode in r.values() if "rollout" in mode]
    names = sorted({sentence.partition(":")[0] for against in found for sentence in against})
    text = f"{sum(map(bool, found))} of {len(found)} rollouts"
    return text + (f" ({', '.join(names)})" if names else "")


def _median_and_range(found: Sequence[float] | None) -> list[str]:
    if found is None:
        return ["–", "–"]
    return [f"{statistics.median(found):.3f}", f"{min(found):.3f} to {max(found):.3f}"]


_COLUMNS = ("rps", "p50_ms", "p99_ms")


def _machines(parts: Parts) -> str:
    """Where the parts were measured, each machine once, with its commands."""
    commands: dict[str, list[str]] = {}
    for part in parts.values():
        m = part["machine"]
        where = (
            f"{m['date']}, {m['cpu']}, {m['cores']} cores, kernel {m['kernel']}, "
            f"Python {m['python']}, commit {m['commit']}"
        )
        commands.setdefault(where, [])
        if m["command"] not in commands[where]:
            commands[where].append(m["command"])
    return " ".join(
        f"{where}: {', '.join(f'`{command}`' for command in each)}."
        for where, each in commands.items()
    )


def _words(state: str) -> str:
    return state.replace("_", " ")
