"""`serving gpus`: every GPU, who runs on it and how well it is; and which of them may be used."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from serving.cli.cluster import ConfigFile, Reason, Url
from serving.cli.models import AsJson

Uuid = Annotated[
    str, typer.Argument(help="The GPU's UUID, or the beginning of it where that is unique.")
]
Why = Annotated[str, typer.Option("--reason", help="Why; is shown and goes into the audit log.")]


def add_commands(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(
        help="Show the GPUs, or take one out of use.",
        invoke_without_command=True,
        no_args_is_help=False,
    )
    group.callback()(show)
    group.command()(cordon)
    group.command()(uncordon)
    app.add_typer(group, name="gpus")


def show(
    context: typer.Context,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again each second, until Ctrl-C.")
    ] = False,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show every GPU: who runs on it, its memory, load, power, and health."""
    from serving.cli.audit import refuse_options_before

    if context.invoked_subcommand is not None:
        refuse_options_before(context)
        return
    from serving.cli.client import Admin
    from serving.cli.home import admin_url

    admin = Admin(admin_url(url, file))
    if watch:
        from serving.cli.gpus_render import follow

        follow(admin, as_json=as_json)
        return
    found = admin.gpus()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from serving.cli.gpus_render import gpus_table
    from serving.cli.render import show_view

    show_view(gpus_table(found))


def cordon(uuid: Uuid, reason: Why, file: ConfigFile = None, url: Url = None) -> None:
    """Let nothing new start on a GPU. What runs on it moves, as far as others have room."""
    _command(uuid, "cordon", reason, file, url)


def uncordon(uuid: Uuid, reason: Reason = "", file: ConfigFile = None, url: Url = None) -> None:
    """Put a GPU back to use; the errors held against it are forgotten."""
    _command(uuid, "uncordon", reason, file, url)


def _command(uuid: str, command: str, reason: str, file: ConfigFile, url: Url) -> None:
    from serving.cli.client import Admin, actor
    from serving.cli.home import admin_url

    body = {"actor": actor(), "reason": reason}
    told = Admin(admin_url(url, file)).command_gpu(uuid, command, body)
    typer.echo(f"{told['uuid']} is {command}ed")
