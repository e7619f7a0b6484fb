"""Roll versions out on a real deployment under load, and measure what clients and gateways see.

Each part has a deployment of its own kind: `serving up`, real replicas, HTTP load at a steady rate
that does not wait for answers. Runs of a part follow one another on it. A part's figures replace
those it had in `benchmarks/rollouts/results/live.json`; the others stay.

python -m benchmarks.rollouts.live [--only failing,all-failing,healthy,slower,latency,throughput]
                                   [--runs 10] [--rounds 5] [--seconds 5] [--modes none,split,…]
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.errors import BenchmarkError
from benchmarks.rollouts import live_models, live_report, live_throughput
from benchmarks.rollouts.live_scenarios import SCENARIOS, Scenario, measure
from benchmarks.rollouts.live_site import Site, site
from models.zoo import catalogue as zoo

RESULTS = Path(__file__).parent / "results"
THROUGHPUT = "throughput"
PARTS = (*(scenario.name for scenario in SCENARIOS), THROUGHPUT)
_SETTINGS: dict[str, list[dict[str, Any]]] = {  # the versions of each model, version 1 first
    "double": [{}, {}, {"fails_below": 0.05}, {"fails_below": 1.0}],
    "steady": [{"work": 26, "stable_fails": False}, {"work": 39, "stable_fails": False}],
}

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 where a client met a failure that the canary caused."""
    options = _parse(arguments)
    try:
        return _run(options)
    except BenchmarkError as error:
        print(f"live: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("live: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def chosen(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := set(names) - set(allowed):
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))}: not in {', '.join(allowed)}"
                )
            return names

        return parse

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is allowed")
        return int(text)

    modes = list(live_throughput.MODES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollouts.live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=chosen(PARTS), default=list(PARTS))
    parser.add_argument("--runs", type=positive, default=10, help="of each rollout")
    parser.add_argument("--rounds", type=positive, default=5, help="of the throughput")
    parser.add_argument("--seconds", type=positive, default=5, help="of load in each mode")
    parser.add_argument("--modes", type=chosen(modes), default=modes[:3], help=", ".join(modes))
    parser.add_argument("--results", type=Path, default=RESULTS, help="a directory")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    file = options.results / "live.json"
    parts: dict[str, Figures] = {}
    if file.exists():
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
    for name, measured in _parts(options):
        parts[name] = {"machine": _machine(), **measured}
        # In the order of `PARTS`, whichever was measured last.
        parts = {part: parts[part] for part in PARTS if part in parts}
        written = live_report.write(parts, options.results)
        print(f"written to {written}", flush=True)
    harm = [t for t in live_report.targets(parts) if "canary's sake" in t.name and not t.met]
    return 1 if harm else 0


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, Figures]]:
    for gateways in (1, 2):
        wanted = [s for s in SCENARIOS if s.name in options.only and s.gateways == gateways]
        if wanted:
            with _versions(wanted, gateways) as running:
                for scenario in wanted:
                    yield scenario.name, _scenario(running, scenario, options.runs)
    if THROUGHPUT in options.only:
        yield THROUGHPUT, _throughput(options)


@contextmanager
def _versions(scenarios: Sequence[Scenario], gateways: int) -> Iterator[Site]:
    """A deployment of the models that these scenarios roll out."""
    with tempfile.TemporaryDirectory(prefix="live-") as directory:
        scratch = Path(directory)
        versions = {
            model: [
                live_models.write(scratch / f"{model}-{number}.ts", **settings)
                for number, settings in enumerate(_SETTINGS[model], start=1)
            ]
            for model in dict.fromkeys(scenario.model for scenario in scenarios)
        }
        sample = live_models.write_sample(scratch / "sample.npz")
        with site(scratch, versions, gateways=gateways, sample=sample) as running:
            yield running


def _scenario(running: Site, scenario: Scenario, count: int) -> Figures:
    runs = []
    for number in range(1, count + 1):
        found = measure(running, scenario, seed=number)
        runs.append(found)
        told = {key: round(value, 2) for key, value in found.items() if isinstance(value, float)}
        print(
            f"{scenario.name} {number}/{count}: {found['state']}, {told}, failed {found['failed']} "
            f"of {found['requests']}; {found['reason']}",
            flush=True,
        )
    return {"about": scenario.about, "plan": scenario.plan, "rate": scenario.rate, "runs": runs}


def _throughput(options: argparse.Namespace) -> Figures:
    modes = list(dict.fromkeys(["none", *options.modes]))
    rounds = []
    with tempfile.TemporaryDirectory(prefix="live-") as directory:
        scratch = Path(directory)
        model = zoo.build("mlp", scratch / "mlp")
        with site(scratch, {live_throughput.MODEL: [model, model]}) as running:
            for number in range(1, options.rounds + 1):
                # Every other one backwards: a machine that slows down is no mode's fault.
                order = modes if number % 2 else modes[::-1]
                measured = live_throughput.measure(running, scratch, order, options.seconds)
                found = {mode: measured[mode] for mode in modes}
                rounds.append(found)
                rps = {mode: round(figures["rps"]) for mode, figures in found.items()}
                pairs = live_throughput.beside(rounds[-1:])
                ratios = {mode: round(statistics.median(p), 3) for mode, p in pairs.items()}
                print(f"throughput {number}/{options.rounds}: {rps}, pairs {ratios}", flush=True)
    return {"seconds": options.seconds, "rounds": rounds}


def _machine() -> Figures:
    described = machine.describe()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = " ".join(["python -m benchmarks.rollouts.live", *sys.argv[1:]])
    return {"date": today, **described, "command": command}


if __name__ == "__main__":
    sys.exit(main())
