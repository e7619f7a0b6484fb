"""What the rollout commands print. It imports rich, so the commands import it when they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from serving.cli import rollout_text as words
from serving.cli.render import grid, milliseconds, short
from serving.core.rollout_spec import counted_by

_STATE_STYLES: Final = {
    "succeeded": "green",
    "paused": "yellow",
    "awaiting_gate": "yellow",
    "rolling_back": "red",
    "rolled_back": "red",
    "rollback_failed": "bold red",
}
_OUTCOME_STYLES: Final = {"pass": "green", "hold": "", "unknown": "magenta", "fail": "bold red"}
_MARKS: Final = {
    "done": ("✓", "green"),
    "now": ("▶", "bold"),
    "failed": ("✗", "red"),
    "skipped": ("↷", "yellow"),
    "ahead": ("·", "dim"),
}
_ARMS: Final = ("stable", "canary")

Plain = Mapping[str, Any]


def rollouts_table(rollouts: Sequence[Plain], now: float) -> RenderableType:
    """Rollouts, one a line."""
    table = _grid("id", "model", "versions", "plan", "state", "weight", "started", "took", "what")
    for r in rollouts:
        end = now if r["finished_at"] is None else r["finished_at"]
        table.add_row(
            r["id"],
            r["model"],
            f"{r['stable']} → {r['canary']}",
            Text(r["spec"]["plan"]),
            Text(words.progress(r), style=_STATE_STYLES.get(r["state"], "")),
            words.percent(r["weight"]),
            words.moment(r["created_at"]),
            words.duration(int(end - r["created_at"])),
            _one_line(Text(words.news(r))),
        )
    return table


def status_view(rollout: Plain, now: float) -> RenderableType:
    """Where a rollout is, its traffic, and what happens next."""
    return Group(*_headline(rollout, now), _next(rollout), Text(""), _traffic(rollout))


def explain_view(rollout: Plain, audit: Sequence[Plain], now: float) -> RenderableType:
    """Why a rollout is where it is."""
    return Group(
        *_headline(rollout, now),
        _next(rollout),
        *_section("rollout", _identity(rollout)),
        *_section("plan", _plan_view(rollout)),
        *_section("traffic", _traffic(rollout)),
        *_section("verdicts", _verdicts_view(rollout)),
        *_section("audit", audit_table(audit)),
    )


class WatchView:
    """The live view, as much of it as the terminal is high.

    `events` are the last audit entries, oldest first, `notice` says what is wrong with the view.
    Where there is too little room the oldest events go first, then blank lines, then what is past
    the first line of the reason and how the shadow compared; triggers stay.
    """

    def __init__(self, rollout: Plain, events: Sequence[Plain], now: float, notice: str) -> None:
        self._rollout, self._events = rollout, events
        self._now, self._notice = now, notice

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(height=None)
        for view in self._views():
            if len(console.render_lines(view, unbounded, pad=False)) <= options.size.height:
                break
        yield view

    def _views(self) -> Iterator[RenderableType]:
        """From the fullest to the shortest."""
        yield self._view(self._events)
        for blanks, cut in ((True, False), (False, False), (False, True)):
            for first in range(max(1, len(self._events))):
                yield self._view(self._events[first:], blanks=blanks, cut=cut, short=True)
        yield self._view((), blanks=False, cut=True)

    def _view(
        self,
        events: Sequence[Plain],
        *,
        blanks: bool = True,
        cut: bool = False,
        short: bool = False,
    ) -> RenderableType:
        """`cut` leaves the head one line a sentence and the shadow none, `short` each event one."""
        rollout = self._rollout
        blank = (Text(""),) if blanks else ()
        head = [*_headline(rollout, self._now), _next(rollout)]
        return Group(
            *(_one_line(text) if cut else text for text in head),
            *((Text(self._notice, style="yellow"),) if self._notice else ()),
            _weight_bar(rollout),
            _arms_table(rollout) if cut else _traffic(rollout),
            *blank,
            _evidence_table(rollout),
            *blank,
            *(_one_line(_event(e)) if short else _event(e) for e in events),
        )


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def plan_view(plan: Plain) -> RenderableType:
    """What a rollout would do, and how soon it would notice which regression."""
    spec, per_s = plan["spec"], plan["requests_per_s"]
    outline = words.outline(spec, plan["stable"], plan["canary"])
    times = {time["step"]: words.expected(plan, time) for time in plan["steps"]}
    title = f"{plan['model']}: version {plan['stable']} → {plan['canary']} by plan {spec['plan']}"
    return Group(
        Text(title, style="bold"),
        Text(f"{words.length(plan)}; {per_s:.3g} requests a second now"),
        *_section("plan", Group(*(Text(f"· {what}{times.get(at, '')}") for at, what in outline))),
        *_section(f"noticed at {per_s:.3g} requests a second", _detections(plan)),
    )


def audit_table(entries: Sequence[Plain]) -> RenderableType:
    """Audit entries, one a line."""
    if not entries:
        return Text("no entry")
    table = _grid("seq", "at", "by", "action", "subject", "what")
    for e in entries:
        table.add_row(
            str(e["seq"]),
            words.moment(e["at"]),
            Text(e["actor"]),
            e["action"],
            Text(e["subject"]),
            Text(_gist(e)),
        )
    return table


def _detections(plan: Plain) -> RenderableType:
    if not plan["detections"]:
        return Text("nothing: what stable answers now is too little to tell")
    table = _grid("if", "is noticed by", "after", "in", numbers=("bad answers",))
    for d in plan["detections"]:
        noticed = d["seconds"] is not None
        table.add_row(
            d["regression"],
            d["trigger"]
            if noticed
            else Text("nothing: too small, or too little traffic", style="yellow"),
            words.duration(d["seconds"]) if noticed else "–",
            "–"
            if d["step"] is None
            else "the shadow"
            if d["step"] < 0
            else f"step {d['step'] + 1}",
            words.count(round(d["bad_answers"])),
        )
    shield = "stable answers what the canary fails" if plan["spec"]["shield"] else "no shield"
    about = f"as expected on average; about half of all rollouts are faster; {shield}"
    return Group(Text(about), *_by_user(plan["spec"]["assignment"]["unit"]), Text(""), table)


def _by_user(unit: str) -> tuple[Text, ...]:
    """What estimates leave out, where the split is by what sends several requests."""
    if counted_by(unit) == "requests":
        return ()
    return (
        Text(
            f"split by {unit}, so errors are counted by user: estimates of errors are by request, "
            "and hold for users with one request each",
            style="yellow",
        ),
    )


def _headline(rollout: Plain, now: float) -> tuple[Text, Text]:
    since = words.duration(int(now - rollout["changed_at"]))
    title = f"{rollout['model']}: version {rollout['stable']} → {rollout['canary']}, "
    text = Text.assemble(
        (title, "bold"),
        (words.headline(rollout), _STATE_STYLES.get(rollout["state"], "bold")),
        f", since {words.moment(rollout['changed_at'])} ({since})",
    )
    why = rollout["reason"] or "no reason given"
    return text, Text(f"by {rollout['actor'] or '–'}: {why}")


def _identity(rollout: Plain) -> RenderableType:
    spec = rollout["spec"]
    return Text(
        f"{rollout['id']}, started {words.moment(rollout['created_at'])}, by plan {spec['plan']}, "
        f"split by {spec['assignment']['unit']}\n"
        f"version {rollout['stable']} is {short(rollout['stable_digest'])}, "
        f"version {rollout['canary']} is {short(rollout['canary_digest'])}"
        + words.rollback(rollout)
    )


def _grid(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = grid(*columns, numbers=numbers)
    table.show_edge = False
    return table


def _section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    return Text(""), Text(title, style="bold"), Padding(body, (0, 0, 0, 2), expand=False)


def _plan_view(rollout: Plain) -> RenderableType:
    lines = []
    for line in words.plan_lines(rollout):
        sign, style = _MARKS[line.mark]
        lines.append(Text(f"{sign} {line.what}", style=style))
    return Group(*lines)


def _traffic(rollout: Plain) -> RenderableType:
    """What each arm answered and, where requests were copied, how the answers compared."""
    compared = words.compared(rollout["shadowed"])
    return Group(_arms_table(rollout), *((Text(compared),) if compared else ()))


def _arms_table(rollout: Plain) -> RenderableType:
    units = counted_by(rollout["spec"]["assignment"]["unit"])
    numbers = ("weight", "ready", units, "failed", "p50 ms", "p99 ms", "$/1000")
    table = _grid("arm", "version", numbers=numbers)
    for name in _ARMS:
        arm = rollout["arms"][name]
        table.add_row(
            name,
            arm["version"],
            words.percent(arm["weight"]),
            f"{arm['ready']}/{arm['wanted']}",
            words.count(arm["requests"]),
            _failed(arm),
            milliseconds(arm["p50_s"]),
            milliseconds(arm["p99_s"]),
            _cost(arm),
        )
    return table


def _cost(arm: Plain) -> str:
    """Direct cost; "unpriced" where something ran that has no price."""
    if arm["usd_per_1000"] is None:
        return "–" if arm["device_s_per_1000"] is None else "unpriced"
    return f"{arm['usd_per_1000']:.3g}"


def _failed(arm: Plain) -> str:
    requests, failed = arm["requests"], arm["failed"]
    return f"{words.count(failed)} ({words.percent(failed / requests)})" if requests else "–"


def _weight_bar(rollout: Plain) -> RenderableType:
    if rollout["state"] in words.ENDED and not any(a["weight"] for a in rollout["arms"].values()):
        return Text(f"version {rollout['answering'] or 'none'} answers now")
    cells = 40
    weight = rollout["arms"]["canary"]["weight"]
    filled = round(weight * cells)
    copies = f", copies of {words.percent(rollout['shadow'])}" if rollout["shadow"] else ""
    return Text.assemble(
        f"version {rollout['stable']} ",
        ("━" * (cells - filled), "blue"),
        ("━" * filled, "cyan"),
        f" version {rollout['canary']} {words.percent(weight)}{copies}",
    )


def _evidence_table(rollout: Plain) -> RenderableType:
    if not rollout["verdicts"]:
        return Text("no trigger has been judged yet", style="dim")
    table = _grid("trigger", "verdict", "evidence", words.scale())
    for v in rollout["verdicts"]:
        table.add_row(v["trigger"], _outcome(v), words.evidence(v), _bar(v))
    return table


def _outcome(verdict: Plain) -> Text:
    return Text(verdict["verdict"], style=_OUTCOME_STYLES.get(verdict["verdict"], ""))


def _bar(verdict: Plain) -> Text:
    if verdict["threshold"] is None:
        sentence = words.sentence(verdict)
        return Text(sentence, style="dim", no_wrap=True, overflow="ellipsis")
    filled, empty = words.bar(verdict["log_e"], verdict["threshold"])
    return Text.assemble((filled, "yellow" if empty else "red"), (empty, "dim"), "┃")


def _verdicts_view(rollout: Plain) -> RenderableType:
    if not rollout["verdicts"]:
        return Text("none yet")
    table = _grid("trigger", "verdict", "canary", "stable", "evidence", "on fail")
    for v in rollout["verdicts"]:
        counts = words.rate(v["canary"]), words.rate(v["baseline"])
        table.add_row(v["trigger"], _outcome(v), *counts, words.evidence(v), v["action"])
    sentences = Table(box=None, show_header=False, pad_edge=False)
    for v in rollout["verdicts"]:
        sentences.add_row(v["trigger"], Text(words.sentence(v)))
    return Group(Text(_about_verdicts(rollout)), Text(""), table, Text(""), sentences)


def _about_verdicts(rollout: Plain) -> str:
    analysis = rollout["spec"]["analysis"]
    if analysis["dry_run"]:
        return "a dry run: verdicts are recorded, and nothing is done about them"
    return (
        f"evidence against version {rollout['canary']}, in powers of ten; all together take a "
        f"healthy version back with a chance of {words.percent(analysis['alpha'])} at most"
    )


def _next(rollout: Plain) -> Text:
    return Text(f"next: {rollout['next']}")


def _event(entry: Plain) -> Text:
    at = words.moment(entry["at"]).partition(" ")[2]
    return Text(f"{at}  {entry['action']} by {entry['actor']}: {_gist(entry)}", style="dim")


def _gist(entry: Plain) -> str:
    """What an audit entry says beside its action: an apply's changes or the weight; and why."""
    body = entry["body"]
    if entry["action"] == "apply":
        return ": ".join(
            part for part in (words.changed(body["changes"]), body.get("reason")) if part
        )
    weight = f"{words.percent(body['weight'])}: " if "weight" in body else ""
    return f"{weight}{body.get('reason') or '–'}"
