"""What the zoo can build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from models.zoo import graphs, vision


@dataclass(frozen=True)
class Entry:
    """A model: what it is, and how its file is written into a directory."""

    about: str
    write: Callable[[Path], Path]


def _transformer(directory: Path) -> Path:
    from models.zoo.transformer import write

    return write(directory)


def _vision(name: str) -> Callable[[Path], Path]:
    return lambda directory: vision.write(name, directory)


def _echo(datatype: str) -> Callable[[Path], Path]:
    return lambda directory: graphs.write_echo(datatype, directory)


CATALOGUE: Final = {
    "mlp": Entry("64-128-10 perceptron, ONNX; the benchmarks' small model", graphs.write_mlp),
    **{
        name: Entry(f"{about}, ONNX, random weights", _vision(name))
        for name, about in vision.ARCHITECTURES.items()
    },
    "transformer": Entry(
        "encoder, 6 layers of width 256, up to 512 tokens, torch.export, random weights",
        _transformer,
    ),
    "simple": Entry("INT32[16] pairs to sum and difference, ONNX", graphs.write_simple),
    "simple_string": Entry("as simple, on decimal strings", graphs.write_simple_string),
    "simple_identity": Entry("BYTES as they came", graphs.write_simple_identity),
    **{
        f"echo_{datatype.lower()}": Entry(f"{datatype} as it came", _echo(datatype))
        for datatype in graphs.ECHO_DATATYPES
    },
}


def build(name: str, directory: Path) -> Path:
    """Write model `name` into `directory`, made if need be, and return its file.

    Raises `KeyError` if the zoo has no such model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return CATALOGUE[name].write(directory)
