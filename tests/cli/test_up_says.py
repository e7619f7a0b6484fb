"""What `serving up` says of its first apply, against the real admin API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from serving import compose
from serving.cli import up
from serving.cli.client import Admin
from serving.config import parse_config
from tests.cli.rollout_api import Desk


def test_up_says_which_version_is_held_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    with desk.serve():
        desk.start()
        desk.until("observing")
        admin = Admin(desk.url)
        admin.command_rollout("digits", "abort", {"actor": "ann", "reason": "odd"})
        desk.until("rolled_back")
        deployment = admin.status()["controller"]["deployment"]

        def time_passes() -> dict[str, Any]:
            desk.pass_time()
            return {}

        # It asks Ray Serve at every look.
        monkeypatch.setattr(compose, "deployed_apps", time_passes)
        raw = {"models": {"digits": {"version": "2", "replicas": 2}}, "home": str(tmp_path)}
        config = parse_config(raw, source="test")
        view = up._View(live=False)
        up._until_ready(config, deployment, admin, view, time.monotonic() + 60.0)
    assert (
        "digits: version 1 answers: version 2 was taken back by rollout digits:1 (odd) and is not "
        "tried again; to try it again: serving rollout start digits --to 2\n"
    ) in capsys.readouterr().out
