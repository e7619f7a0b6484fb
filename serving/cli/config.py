"""`serving config`."""

from __future__ import annotations

import json
from typing import Any

import typer


def add_commands(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(help="Look at configuration.", no_args_is_help=True)
    group.command()(schema)
    # A group of one command is that command, unless it has a callback.
    group.callback()(lambda: None)
    app.add_typer(group, name="config")


def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    typer.echo(json.dumps(schema_document(), indent=2))


def schema_document() -> dict[str, Any]:
    """The JSON Schema of the configuration file."""
    from serving.config import ServingConfig

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ServingConfig.model_json_schema(),
    }
