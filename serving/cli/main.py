"""The `serving` command: one module a group of commands, and one way to fail."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final

import typer
import typer.core

from serving import __version__
from serving.cli import (
    audit,
    cluster,
    config,
    cost,
    doctor,
    gpus,
    infer,
    models,
    plan,
    rollout,
    tune,
)
from serving.errors import OperatorError

INTERRUPTED: Final = 130
INTERNAL: Final = 70


class _Commands(typer.core.TyperGroup):
    """Lets an interrupt through: Typer would make it an exit code, and say nothing."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None


app = typer.Typer(
    name="serving",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"serving {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """GPU-aware model serving gateway."""


cluster.add_commands(app)
models.add_commands(app)
infer.add_commands(app)
rollout.add_commands(app)
gpus.add_commands(app)
cost.add_commands(app)
plan.add_commands(app)
tune.add_commands(app)
audit.add_commands(app)
doctor.add_commands(app)
config.add_commands(app)


def main() -> None:
    """Run the command line. An error is one line on stderr and an exit code, never a traceback.

    With SERVING_DEBUG set, the traceback too.
    """
    try:
        # Standalone, it would print a usage error as a box.
        sys.exit(app(standalone_mode=False))
    except OperatorError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        _fail_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output is gone: nothing is left to say, to nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("SERVING_DEBUG"):
            raise
        sentence = str(error).strip() or "no message"
        _fail(
            f"internal error: {type(error).__name__}: {sentence.splitlines()[0]} "
            "(SERVING_DEBUG=1 shows where)",
            INTERNAL,
        )


def _fail_usage(error: typer.TyperException) -> None:
    sentence = " ".join(error.format_message().split()).rstrip(".")
    if not sentence:  # a group without a command: its help has been printed
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "serving"
    _fail(f"{sentence}; see `{path} --help`", error.exit_code)


def _fail(sentence: str, code: int) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
