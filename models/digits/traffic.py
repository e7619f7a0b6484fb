"""Clients of the demo: they post digits for as long as it lasts, and say later what was right."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from models.digits.data import Images, Labels
from models.digits.train import INPUT, OUTPUT
from serving.errors import ClusterError

_CLIENTS: Final = 8
_PAUSE_S: Final = 0.02
_FEEDBACK_S: Final = 1.0
_TIMEOUT_S: Final = 30.0


class Traffic:
    """`with Traffic(…)`: `_CLIENTS` connections post images, one a request, in turn.

    `answers` and `right` count by the version that answered; `failures` are those that did not get
    an answer. The right labels follow once a second, as feedback by request id.
    """

    def __init__(
        self, inference: str, admin: str, model: str, images: Images, labels: Labels
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.failures: list[str] = []
        self._address = urlsplit(inference).netloc
        self._path = f"/v2/models/{model}/infer"
        self._feedback_url = f"{admin}/v1/feedback"
        self._work = list(zip(images, labels, strict=True))
        self._learnt: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._post, args=(i,), daemon=True) for i in range(_CLIENTS)
        ]
        self._threads.append(threading.Thread(target=self._tell, daemon=True))

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _post(self, client: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=_TIMEOUT_S)
        work: Iterator[Any] = islice(cycle(self._work), client, None, _CLIENTS)
        with contextlib.closing(connection):
            for image, label in work:
                if self._stop.wait(_PAUSE_S):
                    return
                try:
                    self._ask(connection, image, int(label))
                except (OSError, http.client.HTTPException, ClusterError) as error:
                    connection.close()
                    with self._lock:
                        self.failures.append(str(error))

    def _ask(self, connection: http.client.HTTPConnection, image: Any, label: int) -> None:
        tensor = {"name": INPUT, "shape": [1, image.size], "datatype": "FP32"}
        body = json.dumps({"inputs": [{**tensor, "data": image.tolist()}]})
        connection.request("POST", self._path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != http.client.OK:
            raise ClusterError(f"HTTP {reply.status} {text.decode()[:200]}")
        (answer,) = (o for o in json.loads(text)["outputs"] if o["name"] == OUTPUT)
        version = reply.headers["x-model-version"]
        with self._lock:
            self.answers[version] += 1
            self.right[version] += int(np.argmax(answer["data"])) == label
            self._learnt.append({"request_id": reply.headers["x-request-id"], "label": label})

    def _tell(self) -> None:
        """Post what was right, once a second."""
        while not self._stop.wait(_FEEDBACK_S):
            with self._lock:
                learnt, self._learnt = self._learnt[:1000], self._learnt[1000:]
            if not learnt:
                continue
            request = urllib.request.Request(
                self._feedback_url,
                json.dumps(learnt).encode(),
                {"Content-Type": "application/json"},
            )
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
