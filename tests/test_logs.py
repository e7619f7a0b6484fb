"""Logs as lines for people or as JSON."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from serving.logs import configure_logging


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The `serving` logger, put back as it was."""
    found = logging.getLogger("serving")
    before = (found.handlers, found.propagate, found.level)
    yield found
    found.handlers, found.propagate, found.level = before


def logged(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    configure_logging(stream)
    configure_logging(stream)
    log = logging.getLogger("serving.test")
    log.info("replica %s is ready", "r1", extra={"model": "m"})
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("tick")
    log.debug("detail")
    return stream.getvalue()


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, logger: logging.Logger) -> None:
    text = logged(monkeypatch)
    assert text.count("INFO serving.test: replica r1 is ready\n") == 1, "one handler, not two"
    assert "ValueError: broken" in text
    assert "detail" not in text


def test_json_lines(monkeypatch: pytest.MonkeyPatch, logger: logging.Logger) -> None:
    lines = logged(monkeypatch, SERVING_LOG="json", SERVING_LOG_LEVEL="debug").splitlines()
    first, second, third = (json.loads(line) for line in lines)
    assert first["message"] == "replica r1 is ready"
    assert (first["level"], first["logger"], first["model"]) == ("info", "serving.test", "m")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert "ValueError: broken" in second["exception"]
    assert third["message"] == "detail"


def test_an_unknown_level_means_info(
    monkeypatch: pytest.MonkeyPatch, logger: logging.Logger
) -> None:
    assert "ready" in logged(monkeypatch, SERVING_LOG_LEVEL="loud")
