"""A replica on a GPU with an embedding of 8 entries: an index past its end breaks CUDA's context.

`python -m tests.gpu.breaking_child SOCKET WORDS`: WORDS is the file that stands for the controller.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from serving.artifacts import TORCHSCRIPT_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import RuntimeOptions, load_model
from serving.replica.backends.faults import FatalDeviceError
from serving.replica.engine import Engine
from serving.replica.leaving import LastWords
from serving.replica.rules import rules_for
from serving.replica.server import ReplicaServer

SIGNATURE = Signature(
    (TensorSpec("i", "INT64", (-1,)),), (TensorSpec("y", "FP32", (-1, 2)),), Batch.DYNAMIC
)


class Lookup(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(8, 2)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.table(i)


def main(path: str, words: str) -> None:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Path(directory) / "m.ts"
        torch.jit.script(Lookup().eval()).save(str(model))
        backend = load_model(model, TORCHSCRIPT_PLATFORM, RuntimeOptions("cuda"), SIGNATURE)

    heard = Path(words)

    async def tell(error: FatalDeviceError) -> None:
        heard.write_text(str(error))  # noqa: ASYNC240

    loop = asyncio.new_event_loop()
    engine = Engine(backend, rules_for(backend, 8))
    server = ReplicaServer(engine, path, {"replica": "r"})
    engine.on_fatal = LastWords(server.stop, tell, loop)
    server.start()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
