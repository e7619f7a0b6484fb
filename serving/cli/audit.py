"""`serving audit`: who did what and when, and whether the log is whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from serving.cli.cluster import ConfigFile, Url
from serving.cli.models import AsJson


def add_commands(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(
        help="Show the audit log, or check it.", invoke_without_command=True, no_args_is_help=False
    )
    group.callback()(show)
    group.command()(verify)
    app.add_typer(group, name="audit")


def show(
    context: typer.Context,
    after: Annotated[
        int | None, typer.Option(min=0, help="Entries after this number; default: the last ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the audit log, oldest entry first."""
    if context.invoked_subcommand is not None:
        refuse_options_before(context)
        return
    from serving.cli.client import Admin
    from serving.cli.home import admin_url

    entries = Admin(admin_url(url, file)).audit(after=after, limit=limit)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    from serving.cli.render import show_view
    from serving.cli.rollout_render import audit_table

    show_view(audit_table(entries))


def refuse_options_before(context: typer.Context) -> None:
    """What stands before a subcommand would not reach it. Raises `ConfigError`."""
    from serving.errors import ConfigError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            command, option = context.invoked_subcommand, parameter.opts[0]
            raise ConfigError(f"{option} stands before {command!r}; write it behind, if at all")


def verify(
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="HASH@COUNT",
            help="Where the log ended, as an earlier check printed it: it must still have that.",
        ),
    ] = None,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Check that no entry of the audit log was changed, removed, cut off or put between."""
    from serving.cli.client import Admin
    from serving.cli.home import admin_url

    found = Admin(admin_url(url, file)).verify_audit(expect)
    typer.echo(json.dumps(found, indent=2) if as_json else found["sentence"])
