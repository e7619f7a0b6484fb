"""Tables and pictures of results, from their JSON files alone: on any machine, whenever.

    python -m benchmarks.gpu.report FILE.json …

writes FILE.md and FILE.png beside each. Results that were cut short are told as far as they go.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.errors import BenchmarkError
from benchmarks.gpu.record import PREFIX
from benchmarks.results import Target

Result = Mapping[str, Any]


def main(files: Sequence[str]) -> int:
    """Render each; 1 where one cannot be."""
    if not files:
        print("bench: usage: python -m benchmarks.gpu.report FILE.json …", file=sys.stderr)
        return 2
    done = [render(Path(file)) for file in files]
    return 0 if all(done) else 1


def render(path: Path) -> bool:
    """Write tables and picture of the result in `path`, and print the tables; whether it went well.

    The picture comes last: if it cannot be drawn, nothing else is lost.
    """
    try:
        found = _read(path)
        text = _text(found)
        path.with_suffix(".md").write_text(results.markdown(found, text), encoding="utf-8")
    except (BenchmarkError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return False
    print(f"\n{text}\n\nwritten to {path}", flush=True)
    try:
        from benchmarks.gpu import plots

        plots.draw(_title(found), found["summary"], path.with_suffix(".png"))
    except (ImportError, OSError) as error:
        again = f"python -m benchmarks.gpu.report {path}"
        print(f"bench: no picture: {error}; draw it elsewhere: {again}", file=sys.stderr)
        return False
    return True


def _read(path: Path) -> Result:
    """The document, its curves by number. Raises `BenchmarkError` where it is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        curves = {
            side: {int(count): each for count, each in found["summary"].get(side, {}).items()}
            for side in ("bare", "gateway")
        }
        if not found["benchmark"].startswith(PREFIX):
            raise ValueError(f"it is of {found['benchmark']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path} is no result of benchmarks.gpu: {error!r}") from error
    return {**found, "summary": curves}


def _title(found: Result) -> str:
    return f"{found['what']}, on {found['gpu']}"


def _text(found: Result) -> str:
    summary = found["summary"]
    bare = [
        [str(n), results.number(each["rows_per_s"]), results.number(each["run_ms"])]
        for n, each in sorted(summary["bare"].items())
    ]
    columns = ("rows_per_s", "p50_ms", "p99_ms")
    served = [
        [str(n), *(results.number(each[key]) for key in columns)]
        for n, each in sorted(summary["gateway"].items())
    ]
    targets = [
        Target(**{key: of for key, of in each.items() if key != "met"}) for each in found["targets"]
    ]
    parts = [
        f"{_title(found)}, driver {found['driver'] or 'none'}; {found['request_rows']} rows a "
        f"request. {_extent(found)}",
        results.table(["rows in a bare run", "rows/s", "run ms"], bare),
    ]
    if served:
        parts.append(results.table(["connections", "rows/s", "p50 ms", "p99 ms"], served))
    if targets:
        parts.append(results.targets_table(targets))
    return "\n\n".join(parts)


def _extent(found: Result) -> str:
    """How much of what was asked for was measured."""
    done, asked = len(found["rounds"]), found["settings"]["rounds"]
    if found["failure"]:
        return f"{done} of {asked} rounds, then it failed: {found['failure']}"
    if done < asked:
        return f"Cut short: {done} of {asked} rounds."
    return "Failed requests: 0."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
