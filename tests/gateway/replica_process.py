"""A replica in a process of its own. Standard input shuts and opens the gate of its model."""

from __future__ import annotations

import json
import sys

from serving.core.types import Signature
from serving.replica.engine import Engine
from serving.replica.rules import rules_for
from serving.replica.server import ReplicaServer
from tests.gateway.models import ScriptedBackend


def main() -> None:
    spec = json.loads(sys.argv[1])
    backend = ScriptedBackend(Signature.from_dict(spec["signature"]), mortal=True)
    identity = {"model": "m", "version": "1", "digest": "sha256:" + "0" * 64, "replica": "p"}
    ReplicaServer(Engine(backend, rules_for(backend, 64, None)), spec["path"], identity).start()
    print("up", flush=True)
    # The end of its input is the end of the test.
    for line in sys.stdin:
        word = line.strip()
        {"shut": backend.gate.clear, "open": backend.gate.set}[word]()
        print(word, flush=True)


if __name__ == "__main__":
    main()
