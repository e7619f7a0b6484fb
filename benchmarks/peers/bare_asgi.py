"""The bare peer: an ASGI app that runs the model in its own process, with nothing around it.

No batching, metrics, validation, routing or deadlines: the least that a Python HTTP server can do
for a request of the Open Inference Protocol.

    python -m benchmarks.peers.bare_asgi mlp.onnx 18010
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn

from benchmarks.models import cpu_session

Message = MutableMapping[str, Any]


class BareApp:
    """POST an infer body to any path; the answer has the first output as a flat FP32 list."""

    def __init__(self, model: Path) -> None:
        self._session = cpu_session(model)
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """One request, from its first body part to its last reply part."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        tensor = orjson.loads(body)["inputs"][0]
        rows = np.asarray(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
        result = self._session.run(None, {self._input: rows})[0]
        reply = orjson.dumps(
            {
                "model_name": "mlp",
                "model_version": "1",
                "outputs": [
                    {
                        "name": self._output,
                        "datatype": "FP32",
                        "shape": list(result.shape),
                        "data": result.ravel(),
                    }
                ],
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(reply)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": reply})


def main() -> None:
    """Serve until stopped."""
    uvicorn.run(
        BareApp(Path(sys.argv[1])),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
