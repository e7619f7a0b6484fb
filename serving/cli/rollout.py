"""`serving rollout` and `serving rollback`: ship a new version, look at it, take it back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from serving.cli.cluster import ConfigFile, Reason, Url
from serving.cli.models import AsJson
from serving.core.rollout_states import State

if TYPE_CHECKING:
    from serving.cli.client import Admin

Name = Annotated[str, typer.Argument(help="A model, or the id of a rollout.")]
Model = Annotated[str, typer.Argument(help="The model's name.")]
To = Annotated[str, typer.Option("--to", help="The new version: a number or @ALIAS.")]
Plan = Annotated[
    str | None,
    typer.Option(
        help="canary, blue-green, shadow-only or fast, or a plan's file (.yaml); "
        "default: what the model's configuration says."
    ),
]

IfState = Annotated[
    State | None,
    typer.Option(
        metavar="STATE",
        help="Only if the rollout is in this state, as you saw it: else somebody was faster.",
    ),
]


def _duration(text: str) -> float:
    """Seconds from "30", "90s", "1h30m". Raises `typer.BadParameter`."""
    from pydantic import TypeAdapter, ValidationError

    from serving.rollout_settings import Duration

    number = text.replace(".", "", 1).isdigit()
    try:
        return TypeAdapter(Duration).validate_python(float(text) if number else text)
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} {error.errors()[0]['msg']}") from None


Until = Annotated[
    list[State] | None,
    typer.Option(
        metavar="STATE",
        help="End with 0 in this state, rather than when it has succeeded; may be repeated. One "
        "that lasts less than half a second may be missed.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="DURATION",
        parser=_duration,
        help='End with 124 after so long: seconds, or "90s", "2m", "1h30m". For ever without it.',
    ),
]

_EXPLAINED_ENTRIES: Final = 10
_INTERRUPTED: Final = 130
# As timeout(1) has it.
_TIMED_OUT: Final = 124
_COMMANDS: Final = {
    "pause": "Keep the weight as it is until `resume`; triggers still watch.",
    "resume": "Go on where it was paused.",
    "promote": "Skip the steps that are left: all traffic to the new version, then the bake.",
    "approve": "Pass the gate that the rollout waits at.",
    "abort": "Stop the rollout and take the new version back.",
}


def add_commands(app: typer.Typer) -> None:
    """Add the group of commands, and `rollback`."""
    group = typer.Typer(help="Ship a new version behind evidence.", no_args_is_help=True)
    for command in (start, plan, status, watch, explain):
        group.command()(command)
    group.command("list")(list_rollouts)
    group.command()(history)
    for name, about in _COMMANDS.items():
        group.command(name, help=about)(_commander(name))
    app.add_typer(group, name="rollout")
    about = "Go back to the previous version at once, after a success too while it is kept."
    app.command("rollback", help=about)(_commander("rollback"))


def start(
    model: Model,
    to: To,
    plan: Plan = None,
    reason: Reason = "",
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Start a rollout of one version in place of the one that runs."""
    from serving.cli.client import actor

    request = {**_wanted(model, to, plan), "actor": actor(), "reason": reason}
    started = _admin(url, file).start_rollout(request)
    if as_json:
        _print_json(started)
        return
    typer.echo(
        f"{model}: rollout {started['id']} from version {started['stable']} to "
        f"{started['canary']} by plan {started['spec']['plan']}\n"
        f"watch it: serving rollout watch {model}\n"
        f"before the next apply, let the file ask for version {started['canary']} too: else that "
        "apply takes it back"
    )


def plan(
    model: Model,
    to: To,
    plan: Plan = None,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show what a rollout would do, and how soon it would notice which fault; change nothing."""
    found = _admin(url, file).plan_rollout(_wanted(model, to, plan))
    if as_json:
        _print_json(found)
        return
    from serving.cli.render import show_view
    from serving.cli.rollout_render import plan_view

    show_view(plan_view(found))


def status(
    name: Annotated[str | None, typer.Argument(help="A model, or the id of a rollout.")] = None,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the rollouts that run, or where one is, its traffic, and what happens next."""
    admin = _admin(url, file)
    if name is None:
        _show_list(admin.rollouts(active=True), as_json, "no rollout runs")
        return
    found = admin.rollout(name)
    if as_json:
        _print_json(found)
        return
    from serving.cli.render import show_view
    from serving.cli.rollout_render import status_view

    show_view(status_view(found, time.time()))


def watch(
    name: Name,
    until: Until = None,
    timeout: Timeout = None,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Follow a rollout to its end; exit 1 if the new version was taken back.

    On a terminal, a live view; else one line a change, or with --json one document a change.
    Ctrl-C ends the view, not the rollout.

    Exit codes: 0, it succeeded, or is in a state of --until; 1, it ended in another; 124, neither
    before --timeout.
    """
    from serving.cli.rollout_watch import follow

    wanted = [state.value for state in until or (State.SUCCEEDED,)]
    again = f"serving rollout watch {name} shows it again"
    limit = math.inf if timeout is None else timeout
    try:
        last = follow(_admin(url, file), name, as_json=as_json, until=wanted, timeout_s=limit)
    except KeyboardInterrupt:
        typer.echo(f"the rollout goes on; {again}", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if last["state"] in wanted:
        return
    from serving.cli.rollout_text import ENDED

    if last["state"] in ENDED:
        raise typer.Exit(1)
    missed = f"{name}: not {' or '.join(wanted)} after {limit:g} s but {last['state']}"
    typer.echo(f"error: {missed}, and goes on; {again}", err=True)
    raise typer.Exit(_TIMED_OUT)


def explain(name: Name, file: ConfigFile = None, url: Url = None, as_json: AsJson = False) -> None:
    """Show why a rollout is where it is: plan, verdicts with their numbers, next, audit."""
    admin = _admin(url, file)
    found = admin.rollout(name)
    entries = admin.audit(subject=found["id"], limit=_EXPLAINED_ENTRIES)
    if as_json:
        _print_json({**found, "audit": entries})
        return
    from serving.cli.render import show_view
    from serving.cli.rollout_render import explain_view

    show_view(explain_view(found, entries, time.time()))


def list_rollouts(
    active: Annotated[bool, typer.Option("--active", help="Only those that run.")] = False,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List rollouts of all models, newest first."""
    found = _admin(url, file).rollouts(active=True if active else None)
    _show_list(found, as_json, "no rollout runs" if active else "no rollout yet")


def history(
    model: Model, file: ConfigFile = None, url: Url = None, as_json: AsJson = False
) -> None:
    """List the rollouts of one model, newest first."""
    _show_list(_admin(url, file).rollouts(model), as_json, f"{model}: no rollout yet")


def _commander(command: str) -> Callable[..., None]:
    def run(
        name: Name,
        reason: Reason = "",
        if_state: IfState = None,
        file: ConfigFile = None,
        url: Url = None,
        as_json: AsJson = False,
    ) -> None:
        from serving.cli.client import actor

        body = {"actor": actor(), "reason": reason}
        if if_state is not None:
            body["expected_state"] = if_state.value
        found = _admin(url, file).command_rollout(name, command, body)
        if as_json:
            _print_json(found)
            return
        from serving.cli.rollout_text import headline

        typer.echo(f"{found['model']}: {headline(found)}\nnext: {found['next']}")

    return run


def _admin(url: str | None, file: Path | None) -> Admin:
    from serving.cli.client import Admin
    from serving.cli.home import admin_url

    return Admin(admin_url(url, file))


def _wanted(model: str, to: str, plan: str | None) -> dict[str, Any]:
    wanted: dict[str, Any] = {"model": model, "to": to}
    return wanted if plan is None else {**wanted, "plan": _read_plan(plan)}


def _read_plan(given: str) -> Any:
    """A plan's name as it is, or what its file holds. Raises `ConfigError`."""
    path = Path(given)
    if path.suffix not in (".yaml", ".yml"):
        return given
    from serving.rollout_plans import parse_plan, read_plan

    raw = read_plan(path)
    # The controller checks it too, but cannot name the file.
    parse_plan(raw, source=given)
    return raw


def _show_list(rollouts: list[dict[str, Any]], as_json: bool, nothing: str) -> None:
    if as_json:
        _print_json(rollouts)
    elif not rollouts:
        typer.echo(nothing)
    else:
        from serving.cli.render import show_view
        from serving.cli.rollout_render import rollouts_table

        show_view(rollouts_table(rollouts, time.time()))


def _print_json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=2))
