"""Command line of the zoo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from models.zoo.catalogue import CATALOGUE, build


def main() -> int:
    """List the models or build some of them."""
    parser = argparse.ArgumentParser(prog="models.zoo", description="Build models to serve.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to build; none: list them")
    parser.add_argument("--out", type=Path, default=Path("zoo"), help="directory (default: zoo)")
    arguments = parser.parse_args()
    if not arguments.names:
        for name, entry in CATALOGUE.items():
            print(f"{name:16} {entry.about}")
        return 0
    if unknown := [n for n in arguments.names if n not in CATALOGUE]:
        print(f"no model {', '.join(unknown)}; there are: {', '.join(CATALOGUE)}", file=sys.stderr)
        return 2
    for name in arguments.names:
        print(build(name, arguments.out / name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
