import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.client import Client, system_congestion
from benchmarks.errors import BenchmarkError
from benchmarks.wrk import Load


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        good = self.headers["Inference-Header-Content-Length"] == "2" and body == b"{}body"
        reply = b"fine" if good else b"not what was sent"
        self.send_response(200 if good else 400)
        self.send_header("Content-Length", str(len(reply)))
        if self.path == "/timed":
            self.send_header("Server-Timing", "queue;dur=0.100, compute;dur=0.250")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def body(tmp_path: Path) -> Path:
    path = tmp_path / "body"
    path.write_bytes(b"{}body")
    return path


@pytest.mark.parametrize("congestion", [None, "reno", system_congestion()])
def test_an_answer_has_its_latency_and_the_time_of_its_run(
    url: str, body: Path, congestion: str | None
):
    with Client(Load(f"{url}/timed", body, 2), congestion) as client:
        for _ in range(2):
            answer = client.post()
            assert answer.run_ms == 0.25
            assert answer.latency_ms > 0


def test_a_server_that_is_not_there_is_an_error(body: Path):
    with pytest.raises(BenchmarkError, match=r"cannot connect to .* refused"):
        Client(Load("http://127.0.0.1:1/", body))


@pytest.mark.parametrize(
    ("path", "json_bytes", "message"),
    [("/timed", 1, "/timed answers 400: b'not what"), ("/untimed", 2, "/untimed answers 200")],
)
def test_an_answer_that_says_nothing_of_a_run_is_an_error(
    url: str, body: Path, path: str, json_bytes: int, message: str
):
    with (
        Client(Load(url + path, body, json_bytes)) as client,
        pytest.raises(BenchmarkError, match=message),
    ):
        client.post()
