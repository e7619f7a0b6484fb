"""PromQL triggers against a real Prometheus, and against servers that answer like a broken one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from serving.cli.preflight import free_port
from serving.control import promql
from serving.control.outbound import NoAnswer, fetch
from serving.core.rollout_spec import Trigger
from serving.core.rollout_types import ProviderState
from tests.control.rollouts import rollout
from tests.control.web_service import Reply, WebService
from tests.gateway.harness import eventually
from tests.services import missing


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Scrapes an exporter whose series test_errors{model, version} has values for two versions."""
    program = shutil.which("prometheus")
    if program is None:
        missing("Prometheus is not installed")
    registry = CollectorRegistry()
    errors = Gauge("test_errors", "Share of failures", ["model", "version"], registry=registry)
    errors.labels("digits", "1").set(0.01)
    errors.labels("digits", "2").set(0.25)
    exporter, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    directory: Path = tmp_path_factory.mktemp("prometheus")
    (directory / "prometheus.yml").write_text(
        "global: {scrape_interval: 100ms}\n"
        "scrape_configs:\n"
        "  - job_name: models\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{exporter.server_port}']}}]\n"
    )
    url = f"http://127.0.0.1:{free_port()}/prefix"
    server = subprocess.Popen(
        [
            program,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={url.split('/')[2]}",
            f"--web.external-url={url}",
        ],
        stderr=subprocess.DEVNULL,
    )

    def scraped() -> bool:
        assert server.poll() is None, "Prometheus ended"
        try:
            body = fetch("GET", f"{url}/api/v1/query?query=test_errors", timeout_s=5).body
        except NoAnswer:
            return False
        return b"digits" in body

    try:
        eventually(scraped, "Prometheus scrapes the exporter")
        yield url
    finally:
        server.terminate()
        server.wait(30)
        exporter.shutdown()
        exporter.server_close()
        thread.join()


def asked(url: str, query: str, **settings: object) -> ProviderState:
    trigger = Trigger("errors", "promql", url=url, query=query, **settings)  # type: ignore[arg-type]
    return promql.ask(trigger, rollout())


BY_VERSION = 'test_errors{{model="{{model}}", version="{{{arm}}}"}}'


def test_a_query_names_the_rollouts_versions(prometheus: str) -> None:
    canary = asked(prometheus, BY_VERSION.format(arm="canary"), threshold=0.1)
    stable = asked(prometheus, BY_VERSION.format(arm="stable"), threshold=0.1)
    assert (canary.outcome, canary.value) == ("fail", 0.25)
    assert canary.message == "the query gives 0.25, bad is > 0.1"
    assert (stable.outcome, stable.value) == ("ok", 0.01)


@pytest.mark.parametrize(
    ("operator", "at", "above"),
    [(">", "ok", "fail"), (">=", "fail", "fail"), ("<", "ok", "ok"), ("<=", "fail", "ok")],
)
def test_operators(prometheus: str, operator: str, at: str, above: str) -> None:
    assert asked(prometheus, "scalar(vector(2))", operator=operator, threshold=2).outcome == at
    assert asked(prometheus, "3", operator=operator, threshold=2).outcome == above


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("no_such_series", "the query matches no series"),
        ("test_errors", "the query gives 2 series; aggregate them to one"),
        ("vector(0) / 0", "the query gives NaN, which is no finite number"),
        ("1 / 0", "the query gives +Inf, which is no finite number"),
        (
            "test_errors[5m]",
            "the query gives a matrix that is no number; allowed: scalar, vector",
        ),
        ('"text"', "the query gives a string that is no number; allowed: scalar, vector"),
    ],
)
def test_what_is_not_one_number_is_unknown(prometheus: str, query: str, message: str) -> None:
    assert asked(prometheus, query) == ProviderState("unknown", message=message)


def test_a_query_that_prometheus_cannot_read(prometheus: str) -> None:
    answer = asked(prometheus, "sum(")
    assert answer.outcome == "unknown"
    host = prometheus.removesuffix("/prefix")
    assert answer.message.startswith(f"Prometheus at {host} refused the query (400): ")
    assert "parse error" in answer.message


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(503, b"<html>busy"), "Prometheus at {url} refused the query (503)"),
        (
            Reply(200, b'{"status": "error", "error": "no\\nluck"}'),
            "Prometheus at {url} refused the query (200): no luck",
        ),
        (Reply(200, b"<html>a login page"), "Prometheus answered with something that is no JSON"),
        (Reply(200, b"[]"), "Prometheus answered with something that is no JSON object"),
        (Reply(200, b'{"status": "success"}'), "Prometheus answered without a result"),
        (Reply(200, b'{"status": "success", "data": {"resultType": 3}}'), "without a result"),
        (
            Reply(
                body=orjson.dumps(
                    {
                        "status": "success",
                        "data": {
                            "resultType": "vector",
                            "result": [{"metric": {}, "histogram": [0, {"count": "4"}]}],
                        },
                    }
                )
            ),
            "the query gives a vector that is no number",
        ),
        (
            Reply(
                body=b'{"status": "success", "data": {"resultType": "scalar", "result": [0, "x"]}}'
            ),
            "the query gives x, which is no finite number",
        ),
    ],
)
def test_answers_that_cannot_be_used(service: WebService, reply: Reply, message: str) -> None:
    service.answer = lambda _: reply
    answer = asked(service.url, "up")
    assert (answer.outcome, answer.value) == ("unknown", None)
    assert message.format(url=service.url) in answer.message


def test_no_answer_in_time(service: WebService) -> None:
    service.answer = service.silence
    answer = asked(service.url, "up", timeout_s=0.2)
    assert answer == ProviderState("unknown", message=f"{service.url} did not answer within 0.2 s")


def test_a_token_is_sent_and_never_said(
    service: WebService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METRICS_TOKEN", "hunter2")
    service.answer = lambda _: Reply(401)
    answer = asked(service.url, "up", secret_env="METRICS_TOKEN")
    assert service.next().headers["Authorization"] == "Bearer hunter2"
    assert answer.message == f"Prometheus at {service.url} refused the query (401)"


def test_a_token_that_is_not_set_is_not_replaced_by_none(service: WebService) -> None:
    answer = asked(service.url, "up", secret_env="NO_SUCH_TOKEN")
    assert answer.outcome == "unknown"
    assert "NO_SUCH_TOKEN" in answer.message
    assert service.received.empty()


def test_a_value_cannot_leave_its_string() -> None:
    odd = rollout(model='a"} or vector(9) #')
    assert promql.rendered('x{m="{model}"} {other}', odd) == ('x{m="a\\"} or vector(9) #"} {other}')
