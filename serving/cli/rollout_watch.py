"""Follows a rollout to its end: a live view on a terminal, one line a change elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from rich.live import Live

from serving.cli import rollout_text as words
from serving.cli.client import Admin
from serving.cli.render import console
from serving.cli.rollout_render import WatchView
from serving.errors import ClusterError

POLL_S: Final = 0.5
PATIENCE_S: Final = 60.0
_EVENTS: Final = 5


@dataclass(frozen=True, slots=True)
class Sight:
    """A rollout at one moment, its last audit entries, and what is wrong with what is shown."""

    rollout: dict[str, Any]
    events: list[dict[str, Any]]
    notice: str = ""


def follow(
    admin: Admin, name: str, *, as_json: bool, until: Collection[str], timeout_s: float
) -> dict[str, Any]:
    """Show a rollout until it ends, is in a state of `until`, or `timeout_s` have passed.

    Returns what it was like then. Raises `OperatorError`.
    """
    sights = look(admin, name, {*words.ENDED, *until}, timeout_s)
    if as_json or not sys.stdout.isatty():
        return _print_changes(sights, _document if as_json else None)
    return _live(sights)


def look(admin: Admin, name: str, ends: Collection[str], timeout_s: float) -> Iterator[Sight]:
    """The rollout of a model, or of an id, again and again, until its state is one of `ends`.

    For `timeout_s` at most, but once in any case.

    A controller that is away for a while is waited for, as it resumes by itself; then raises
    `ClusterError`.
    """
    # A later rollout of the same model is another one.
    rollout_id = admin.rollout(name)["id"]
    sight: Sight | None = None
    began = time.monotonic()
    patience = began + PATIENCE_S
    while sight is None or sight.notice or sight.rollout["state"] not in ends:
        if sight is not None:
            left = began + timeout_s - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(POLL_S, left))
        try:
            rollout = admin.rollout(rollout_id)
            sight = Sight(rollout, admin.audit(subject=rollout_id, limit=_EVENTS))
            patience = time.monotonic() + PATIENCE_S
        except ClusterError:
            if sight is None or time.monotonic() > patience:
                raise
            sight = replace(
                sight, notice="the controller does not answer; this is what it said last"
            )
        yield sight


def _live(sights: Iterator[Sight]) -> dict[str, Any]:
    with Live(console=console(), auto_refresh=False) as live:
        for sight in sights:
            live.update(
                WatchView(sight.rollout, sight.events, time.time(), sight.notice), refresh=True
            )
    return sight.rollout


def _print_changes(
    sights: Iterator[Sight], form: Callable[[dict[str, Any]], str] | None
) -> dict[str, Any]:
    changes = Changes()
    for sight in sights:
        lines = changes(sight)
        if lines and form is not None:
            lines = [form(sight.rollout)]
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return sight.rollout


def _document(rollout: dict[str, Any]) -> str:
    return json.dumps(rollout)


class Changes:
    """What is different from the sight before, one line each."""

    def __init__(self) -> None:
        self._transition: tuple[Any, ...] = ()
        self._weight: float | None = None
        self._verdicts: dict[str, str] = {}
        self._notice = ""

    def __call__(self, sight: Sight) -> list[str]:
        """Take the next sight; the lines that say what has changed."""
        rollout, now = sight.rollout, words.moment(time.time())
        lines = [
            f"{now} {rollout['model']}: {v['trigger']}: {words.sentence(v)}"
            for v in rollout["verdicts"]
            # Undecided is how every trigger begins.
            if self._verdicts.get(v["trigger"], "hold") != v["verdict"]
        ]
        transition = tuple(rollout[key] for key in ("state", "step", "changed_at"))
        headline = f"{rollout['model']}: {words.headline(rollout)}"
        if transition != self._transition:
            why = f" ({rollout['reason']})" if rollout["reason"] else ""
            lines.append(f"{words.moment(rollout['changed_at'])} {headline}{why}")
        elif rollout["weight"] != self._weight:
            # An arm is away, or back: no transition, and so not for the reason of the last one.
            lines.append(f"{now} {headline} ({rollout['next']})")
        if sight.notice and sight.notice != self._notice:
            lines.append(f"{now} {rollout['model']}: {sight.notice}")
        self._transition, self._weight = transition, rollout["weight"]
        self._notice = sight.notice
        self._verdicts = {v["trigger"]: v["verdict"] for v in rollout["verdicts"]}
        return lines
