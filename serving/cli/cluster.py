"""`serving up`, `down`, `apply` and `status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

_INTERRUPTED: Final = 130

ConfigFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="Configuration file (YAML).", show_default=False)
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="Admin API; default: what runs on the home, else its configured port."
    ),
]
Reason = Annotated[str, typer.Option(help="Why; goes into the audit log.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (up, down, apply, status):
        app.command()(command)


def up(
    file: ConfigFile = None,
    timeout: Annotated[float, typer.Option(help="Seconds until everything must be ready.")] = 600.0,
) -> None:
    """Start serving and stay until Ctrl-C; with RAY_ADDRESS set, deploy there and return.

    SIGTERM and SIGHUP end it as Ctrl-C does. A systemd unit of it needs KillMode=mixed: Ray must
    run until everything has drained.
    """
    from serving.cli.up import run

    run(file, timeout)


def down(file: ConfigFile = None) -> None:
    """Stop what `serving up` started: the process on this home, or what runs on RAY_ADDRESS."""
    from serving.cli.down import run

    run(file)


def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="Configuration file (YAML).")],
    url: Url = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, change nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait until it runs.")] = True,
    stop_all: Annotated[
        bool, typer.Option("--stop-all", help="Allow a file without models to stop all that run.")
    ] = False,
    reason: Reason = "",
) -> None:
    """Resolve aliases, print the plan, then make what runs equal to the file."""
    from serving.cli.changes import notes
    from serving.cli.client import Admin
    from serving.cli.home import admin_url
    from serving.cli.render import Progress, plan_table, show_view
    from serving.config import load_config

    admin = Admin(admin_url(url, file))
    config = load_config(file)
    config = config.model_copy(update={"home": config.home_dir})
    raw = config.model_dump(mode="json")
    if not config.models and not (dry_run or stop_all):
        _refuse_to_stop_all(file, admin.status())
    plan = admin.apply(raw, dry_run=dry_run, reason=reason)
    show_view(plan_table(plan))
    if dry_run:
        _show_placement(plan["placement"])
    if not dry_run and wait:
        try:
            admin.wait_converged(plan["apply"], Progress())
        except KeyboardInterrupt:
            typer.echo("the apply goes on; serving status shows how far it is", err=True)
            raise typer.Exit(_INTERRUPTED) from None
        typer.echo("done")
    for line in notes(plan):
        typer.echo(line)


def _show_placement(placement: dict[str, Any]) -> None:
    """Where it would go, if there are GPUs; an error if something has no room."""
    from serving.cli.plan_render import placement_view, refuse_what_does_not_fit
    from serving.cli.render import show_view

    if placement["gpus"]:
        show_view(placement_view(placement))
    refuse_what_does_not_fit(placement)


def _refuse_to_stop_all(file: Path, status: dict[str, Any]) -> None:
    from serving.errors import ConfigError

    if stopped := sorted(m["name"] for m in status["models"] if m["wanted_version"] is not None):
        raise ConfigError(
            f"{file}: it has no models, so this would stop all that run: {', '.join(stopped)}; "
            "add models, or say --stop-all"
        )


def status(
    file: ConfigFile = None,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show models, versions, replicas, traffic and errors."""
    from serving.cli.client import Admin
    from serving.cli.home import admin_url
    from serving.cli.render import show_view, status_view

    found = Admin(admin_url(url, file)).status()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show_view(status_view(found))
