"""ResNet-50 and a transformer encoder on a GPU: the gateway against a bare loop on the same GPU.

The bare loop runs the replica's own backend at each batch size; its best throughput is what the
gateway is held against. Clients post batches of 8 images or 16 sequences as binary tensors at
growing numbers of connections. Loop and gateway take turns, so that both meet the same clocks; the
ratio is the median of the rounds' ratios. The models take turns too, and every figure is in DIR as
soon as it is measured: a run that is cut short leaves what it had. Tables and pictures come last.

    python -m benchmarks.gpu [--out DIR] [--models resnet50 transformer] [--rounds 3] [--seconds 10]
    python -m benchmarks.gpu.report FILE.json …    # tables and pictures of what is there, anywhere
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.gpu import preflight

_MODELS: Final = ("resnet50", "transformer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where something needed is absent, or where a model could not be measured."""
    options = _parse(arguments)
    if problem := preflight.problem():
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    # It imports what the preflight looks for.
    from benchmarks.gpu import rounds

    try:
        settings = rounds.Settings(options.rounds, options.seconds)
        failed = rounds.measure(options.models, settings, options.out)
    except KeyboardInterrupt:
        print(
            f"bench: interrupted; all that it started is stopped, its figures are in {options.out}",
            file=sys.stderr,
        )
        return 130
    if failed:
        print(f"bench: could not be measured: {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=_directory,
        default=Path(__file__).resolve().parents[1] / "results",
        help="where results go, made if need be (default: benchmarks/results)",
    )
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=list(_MODELS))
    parser.add_argument("--rounds", type=_rounds, default=3)
    parser.add_argument("--seconds", type=_seconds, default=10.0, help="of each measurement")
    return parser.parse_args(arguments)


def _directory(text: str) -> Path:
    """A directory that is there and can be written: to learn otherwise in the end is too late."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror or error}") from error
    return path


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return found


if __name__ == "__main__":
    sys.exit(main())
