"""A web service that rollouts ask and tell: real HTTP, answers as a test says."""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def verdict(said: str, **more: str) -> Reply:
    return Reply(body=json.dumps({"verdict": said, **more}).encode())


class WebService:
    """`answer` maps a request to its reply; `received` has every request, in order."""

    def __init__(self) -> None:
        self.answer: Callable[[Received], Reply] = lambda _: Reply()
        self.received: queue.Queue[Received] = queue.Queue()
        self.stopping = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Received(self.command, self.path, dict(self.headers), body)
                service.received.put(request)
                reply = service.answer(request)
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body)
                except OSError:
                    pass  # who asked had no patience

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def next(self) -> Received:
        return self.received.get(timeout=PATIENCE_S)

    def silence(self, _: Received) -> Reply:
        """An answer that comes when the test is over."""
        self.stopping.wait()
        return Reply()

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def web_service() -> Iterator[WebService]:
    service = WebService()
    try:
        yield service
    finally:
        service.close()
