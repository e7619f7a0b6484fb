"""`serving plan`: which GPU each replica is on or goes to, or why to none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from serving.cli.cluster import ConfigFile, Url
from serving.cli.models import AsJson


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(
    wanted: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="Where this configuration would go; default: what runs.",
            show_default=False,
        ),
    ] = None,
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show which GPU each replica is on or would go to, its memory, and what does not fit."""
    from serving.cli.client import Admin
    from serving.cli.home import admin_url
    from serving.cli.plan_render import placement_view, refuse_what_does_not_fit
    from serving.cli.render import show_view
    from serving.config import load_config

    admin = Admin(admin_url(url, file or wanted))
    if wanted is None:
        found = admin.plan()
    else:
        config = load_config(wanted)
        config = config.model_copy(update={"home": config.home_dir})
        found = admin.apply(config.model_dump(mode="json"), dry_run=True)["placement"]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show_view(placement_view(found))
    refuse_what_does_not_fit(found)
