"""Requests to services outside, against real sockets that behave badly."""

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from serving import tls
from serving.control.outbound import MAX_ANSWER, NoAnswer, fetch
from serving.core.urls import place
from tests.control.web_service import Reply, WebService, web_service


@contextmanager
def raw_server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            with suppress(OSError):  # who asked had no patience
                behave(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hunter2?token=hunter2"
        server.shutdown()


def refusal(url: str, timeout_s: float = 10.0) -> str:
    with pytest.raises(NoAnswer) as caught:
        fetch("GET", url, timeout_s=timeout_s)
    assert "hunter2" not in str(caught.value)
    return str(caught.value)


def test_an_answer_with_any_status(service: WebService) -> None:
    service.answer = lambda _: Reply(418, b"short and stout")
    answer = fetch("POST", f"{service.url}/a?b=c", body=b"x", timeout_s=10)
    assert (answer.status, answer.body, answer.ok) == (418, b"short and stout", False)
    received = service.next()
    assert (received.method, received.path, received.body) == ("POST", "/a?b=c", b"x")
    assert received.headers["User-Agent"].startswith("serving/")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "host:80", "", "http://", "http://[::1", "http://h/ö"],
)
def test_only_http_and_https(url: str) -> None:
    assert "the URL" in refusal(url)


def test_credentials_in_a_url_are_refused() -> None:
    assert refusal("http://me:hunter2@host/") == (
        "the URL of http://host holds a user name; use secret_env instead"
    )


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert refusal(f"{url}/hunter2") == f"{url} cannot be reached: Connection refused"


def test_a_host_that_does_not_exist() -> None:
    assert "http://nowhere.invalid cannot be reached" in refusal("http://nowhere.invalid/")


def test_the_time_limit_is_for_the_whole_answer() -> None:
    """A byte now and then keeps every single read short of its own time limit."""
    over = threading.Event()

    def drip(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not over.wait(0.02):
            client.sendall(b"x")

    with raw_server(drip) as url:
        started = time.monotonic()
        assert refusal(url, timeout_s=0.3) == f"{place(url)} did not answer within 0.3 s"
        assert time.monotonic() - started < 5
        over.set()


def test_silence(service: WebService) -> None:
    service.answer = service.silence
    assert "did not answer within 0.2 s" in refusal(service.url, timeout_s=0.2)


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"verd',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_what_is_no_complete_answer(sent: bytes) -> None:
    with raw_server(lambda client: client.sendall(sent)) as url:
        assert refusal(url) == f"{place(url)} sent no complete HTTP answer"


def test_the_size_is_bounded(service: WebService) -> None:
    service.answer = lambda _: Reply(body=b"x" * MAX_ANSWER)
    assert len(fetch("GET", service.url, timeout_s=10).body) == MAX_ANSWER
    service.answer = lambda _: Reply(body=b"x" * (MAX_ANSWER + 1))
    assert refusal(service.url) == f"{service.url} answered with more than 256 KiB"


def test_redirects_within_the_host_are_followed(service: WebService) -> None:
    service.answer = lambda request: (
        Reply(307, headers={"Location": "/new"}) if request.path == "/old" else Reply(body=b"here")
    )
    assert fetch("POST", f"{service.url}/old", body=b"x", timeout_s=10).body == b"here"
    assert [service.next().body for _ in range(2)] == [b"x", b"x"]


def test_redirects_to_another_host_are_not(service: WebService) -> None:
    with web_service() as other:
        service.answer = lambda _: Reply(302, headers={"Location": f"{other.url}/hunter2"})
        assert refusal(service.url) == (
            f"{service.url} redirects to {other.url}, which is not followed"
        )
        assert other.received.empty()


def test_a_redirect_that_would_turn_a_post_into_a_get_is_an_answer(service: WebService) -> None:
    service.answer = lambda _: Reply(302, headers={"Location": "/new"})
    assert fetch("POST", service.url, body=b"x", timeout_s=10).status == 302
    assert service.received.qsize() == 1


def test_redirects_end(service: WebService) -> None:
    service.answer = lambda _: Reply(302, headers={"Location": "/again"})
    assert refusal(service.url) == f"{service.url} redirects more than 3 times"


def test_a_certificate_that_nobody_vouches_for_is_refused(
    tmp_path: Path,
) -> None:
    authority = tls.ensure_ca(tmp_path)
    key, request = tls.make_csr("127.0.0.1")
    context = tls.server_context(key, tls.sign_csr(tmp_path, request), authority)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            client, _ = listener.accept()
            try:
                context.wrap_socket(client, server_side=True).close()
            except OSError:
                client.close()

        accepting = threading.Thread(target=accept)
        accepting.start()
        sentence = refusal(f"https://127.0.0.1:{listener.getsockname()[1]}/hunter2")
        accepting.join()
    assert "certificate" in sentence
