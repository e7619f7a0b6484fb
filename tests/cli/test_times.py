"""What people read of times: local ones, in one form, whatever command prints them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console, RenderableType

from serving.cli.render import registry_table, version_view
from serving.cli.rollout_text import moment

VERSION = {
    "name": "m",
    "version": "1",
    "aliases": [],
    "digest": "sha256:0",
    "platform": "onnx",
    "metrics": {},
    "dataset": None,
    "training_time_s": None,
    "created_at": "2026-01-31T22:30:00+00:00",
    "source": "file",
    "signature": None,
}


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("in_tokyo")
@pytest.mark.parametrize("view", [lambda: registry_table([VERSION]), lambda: version_view(VERSION)])
def test_when_a_version_was_made_is_local_time_as_in_other_commands(
    view: Callable[[], RenderableType],
) -> None:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(view())
    assert "2026-02-01 07:30:00" in capture.get()
    assert moment(1769898600) == "2026-02-01 07:30:00"
