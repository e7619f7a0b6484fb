"""Words, numbers and bars for what a rollout is and does. Pure: text in a terminal's cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from serving.core.rollout_spec import counted_by

_LN_10: Final = math.log(10)
_CELLS_A_POWER: Final = 6
_UNITS: Final = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))

ENDED: Final = ("succeeded", "rolled_back")
"""States that nothing but a person changes."""
TAKEN_BACK: Final = ("rolling_back", "rolled_back", "rollback_failed")
_TIMEOUTS: Final = {
    "pause": "it is paused",
    "rollback": "it is rolled back",
    "proceed": "it goes on without",
}
_PREPARE, _SHADOW = -2, -1  # positions in a plan before its steps, which count from 0


def duration(seconds: float) -> str:
    """A time span by its two largest units: "0.5 s", "45 s", "2 min 5 s", "3 d 4 h"."""
    if 0 < seconds < 1:
        return f"{seconds:.1g} s"
    left, parts = max(0, round(seconds)), []
    for name, size in _UNITS:
        whole, left = divmod(left, size)
        if whole:
            parts.append(f"{whole} {name}")
    return " ".join(parts[:2]) or "0 s"


def moment(at: float) -> str:
    """Unix seconds as local date and time."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def percent(share: float) -> str:
    """A share of 1."""
    return f"{share * 100:.3g} %"


def count(number: float) -> str:
    """A count; with a fraction where it was weighed."""
    return f"{number:,.0f}" if number == round(number) else f"{number:,.1f}"


def rate(counts: Sequence[float]) -> str:
    """(units, events) as "4/80 (5 %)"."""
    units, events = counts
    return f"{count(events)}/{count(units)} ({percent(events / units)})" if units else "–"


def power(log_e: float) -> str:
    """A natural logarithm as a power of ten."""
    # + 0.0: minus zero is zero.
    return f"10^{round(log_e / _LN_10, 1) + 0.0:.1f}"


def bar(log_e: float | None, threshold: float | None) -> tuple[str, str]:
    """Evidence on its way to its threshold: the cells that are filled, and those still empty.

    One power of ten is as long in every bar, so bars of several triggers compare; a bar ends where
    its threshold is.
    """
    if log_e is None or threshold is None or threshold <= 0:
        return "", ""
    cells = max(1, round(threshold / _LN_10 * _CELLS_A_POWER))
    filled = math.floor(cells * min(1.0, max(0.0, log_e / threshold)))
    return "━" * filled, "─" * (cells - filled)


def scale() -> str:
    """The head of a column of bars: 1, 10, 100, 1000 where they begin."""
    return "".join(f"{10**n:<{_CELLS_A_POWER}}" for n in range(4)).rstrip()


def sentence(verdict: Mapping[str, Any]) -> str:
    """A verdict's sentence without the trigger's name before it."""
    return str(verdict["sentence"]).removeprefix(f"{verdict['trigger']}: ")


def evidence(verdict: Mapping[str, Any]) -> str:
    """Evidence and threshold: "10^1.2 of 10^2.5". A dash where a trigger counts, not bets."""
    if verdict["log_e"] is None:
        return "–"
    if verdict["threshold"] is None:
        return power(verdict["log_e"])
    return f"{power(verdict['log_e'])} of {power(verdict['threshold'])}"


def state(rollout: Mapping[str, Any]) -> str:
    """The state in words."""
    return str(rollout["state"]).replace("_", " ")


def stage(rollout: Mapping[str, Any]) -> str:
    """The state, or the one that a paused rollout goes back to."""
    return str(rollout["resume_to"] or rollout["state"])


def place(rollout: Mapping[str, Any]) -> str:
    """Where in its plan it is: "step 2 of 4", or nothing."""
    if stage(rollout) not in ("observing", "awaiting_gate") or rollout["step"] < 0:
        return ""
    return f"step {rollout['step'] + 1} of {len(rollout['spec']['steps'])}"


def progress(rollout: Mapping[str, Any]) -> str:
    """State and place: "observing, step 2 of 4"."""
    return ", ".join(part for part in (state(rollout), place(rollout)) if part)


def headline(rollout: Mapping[str, Any]) -> str:
    """State, place and weight: "observing, step 2 of 4, 5 % to version 2"."""
    if rollout["state"] in ENDED:
        return progress(rollout)
    return f"{progress(rollout)}, {percent(rollout['weight'])} to version {rollout['canary']}"


def compared(shadowed: Mapping[str, int]) -> str:
    """How the answers to copies compared: "shadow: 80 pairs, 4 differ (5 %)"; "" without any."""
    pairs, differ, dropped = (shadowed[key] for key in ("pairs", "disagreements", "dropped"))
    if not pairs and not dropped:
        return ""
    share = f" ({percent(differ / pairs)})" if pairs else ""
    left_out = f", {count(dropped)} copies dropped" if dropped else ""
    return f"shadow: {count(pairs)} pairs of answers, {count(differ)} differ{share}{left_out}"


def news(rollout: Mapping[str, Any]) -> str:
    """Of a listed rollout that runs what happens next, else who ended it and why."""
    if rollout["next"] is not None:
        return str(rollout["next"])
    return f"{rollout['actor']}: {rollout['reason'] or 'no reason given'}"


def changed(rows: Sequence[Mapping[str, Any]]) -> str:
    """What an apply changed: "digits: stop 1, start 2; mlp: held 3"."""
    models: dict[str, list[str]] = {}
    for row in rows:
        if row["change"] != "unchanged":
            models.setdefault(row["model"], []).append(f"{row['change']} {row['version']}")
    said = "; ".join(f"{model}: {', '.join(parts)}" for model, parts in models.items())
    return said or "nothing changed"


def rollback(rollout: Mapping[str, Any]) -> str:
    """A line about how long a rollback took, or nothing."""
    took_ms = rollout["rollback_ms"]
    if took_ms is None:
        return ""
    return f"\ntaken back {took_ms:.0f} ms after the verdict, by when the last gateway had it"


Mark = Literal["done", "now", "failed", "skipped", "ahead"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plan and how far it has come."""

    mark: Mark
    what: str


def outline(spec: Mapping[str, Any], stable: str, canary: str) -> list[tuple[int, str]]:
    """A plan in words, line by line; each with the position of `_position` that it stands for."""
    end = len(spec["steps"])
    shadows = [(_SHADOW, shadow(spec["shadow"]))] if spec["shadow"] else []
    return [
        (_PREPARE, f"prepare version {canary}: fetch, verify, load and warm it"),
        *shadows,
        *((i, f"step {i + 1}: {step(s)}") for i, s in enumerate(spec["steps"])),
        (end, f"promote, and bake for {duration(spec['bake']['duration_s'])}"),
        (end + 1, f"keep version {stable} for {duration(spec['keep_previous_s'])}"),
    ]


def plan_lines(rollout: Mapping[str, Any]) -> list[Line]:
    """The outline of a rollout's plan, each line with how far it has come."""
    here, entered = _position(rollout), {e["step"] for e in rollout["epochs"]}
    ended: Mark = "failed" if rollout["state"] in TAKEN_BACK else "now"

    def mark(position: int) -> Mark:
        if position == here:
            return ended
        if position > here:
            return "ahead"
        is_step = 0 <= position < len(rollout["spec"]["steps"])
        return "skipped" if is_step and position not in entered else "done"

    lines = outline(rollout["spec"], rollout["stable"], rollout["canary"])
    return [Line(mark(position), what) for position, what in lines]


def _position(rollout: Mapping[str, Any]) -> int:
    """Where it is: preparing, in the shadow, a step, at their number the promotion, then kept."""
    steps, now = len(rollout["spec"]["steps"]), stage(rollout)
    if now in ("pending", "preparing"):
        return _PREPARE
    if now == "succeeded":
        return steps + 1
    if now in ("promoting", "baking"):
        return steps
    if rollout["step"] >= 0 or now == "shadowing":
        return int(rollout["step"])
    # Taken back before the first step: with something counted it had come to the shadow.
    return _SHADOW if any(v["canary"][0] for v in rollout["verdicts"]) else _PREPARE


def shadow(plan: Mapping[str, Any]) -> str:
    """A plan's shadow traffic."""
    compare = plan["compare"]
    how = "not compared" if compare["kind"] == "none" else f"compared by {compare['kind']}"
    return (
        f"shadow: copies of {plan['percent']:g} % of requests, {how}, until "
        f"{count(plan['min_pairs'])} pairs or {duration(plan['max_duration_s'])}"
    )


def step(plan: Mapping[str, Any]) -> str:
    """One weighted step of a plan."""
    parts = [f"{plan['weight']:g} % for {duration(plan['hold_s'])}"]
    if plan["require_pass"]:
        parts.append(f"until {', '.join(plan['require_pass'])} pass")
    if gate := plan["gate"]:
        who = "a person" if gate["type"] == "manual" else gate["url"]
        limit = f"{gate['on_timeout']} after {duration(gate['timeout_s'])}"
        parts.append(f"then {who} must approve ({limit})")
    return ", ".join(parts)


def expected(plan: Mapping[str, Any], time: Mapping[str, Any]) -> str:
    """How long a step or the shadow takes at today's traffic, where that is not its hold."""
    spec = plan["spec"]
    shadow = time["step"] < 0
    if shadow and time["timeout"] is None:
        return f"; {duration(time['seconds'])} at this traffic"
    hold = spec["shadow"]["max_duration_s"] if shadow else spec["steps"][time["step"]]["hold_s"]
    units = "pairs" if shadow else counted_by(spec["assignment"]["unit"])
    needs = f"{count(time['needs'])} {units}"
    if time["timeout"] is None:
        return (
            f"; {duration(time['seconds'])}, until it had {needs}" if time["seconds"] > hold else ""
        )
    after = duration(hold + spec["analysis"]["on_insufficient_data"]["after_s"])
    return f"; too little traffic for its {needs}: {_TIMEOUTS[time['timeout']]} after {after}"


def length(plan: Mapping[str, Any]) -> str:
    """How long a plan takes at today's traffic if nothing speaks against it, as a sentence."""
    spec, times = plan["spec"], plan["steps"]
    bake = duration(spec["bake"]["duration_s"])
    for time in times:
        if time["seconds"] is None:
            ends = _TIMEOUTS[time["timeout"]]
            where = f"step {time['step'] + 1}" if time["step"] >= 0 else "the shadow traffic"
            return f"traffic is too low for this plan: {ends} in {where}, see below"
    gates = sum(1 for s in spec["steps"] if s["gate"])
    waits = f", {gates} gate{'s' * (gates > 1)} not counted" if gates else ""
    required = any(s["require_pass"] for s in spec["steps"])
    least = "at least " if required else ""
    seconds = sum(time["seconds"] for time in times)
    return f"{least}{duration(seconds)} to the promotion{waits}, then {bake} of bake"
