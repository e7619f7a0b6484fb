"""Writes what can be read off the code: `python docs/generate.py`, or `--check` to compare only.

docs/metrics.md, docs/configuration.md, docs/cli.md and docs/errors.md, the table of modules in
docs/structure.md, the diagram in docs/rollouts.md, configs/serving.yaml and
configs/serving.schema.json. A test runs the check, so none of them can fall behind.
"""

from __future__ import annotations

import ast
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from serving import errors
from serving.cli.config import schema_document
from serving.cli.main import app
from serving.config import ServingConfig
from serving.core.rollout_states import EVENT_MEANING, mermaid
from serving.metrics import METRICS
from serving.metrics.family import Metric
from serving.model_settings import ModelConfig

ROOT: Final = Path(__file__).resolve().parent.parent
_NOTE: Final = "<!-- Written by docs/generate.py; change the code instead. -->\n"
_MODULES: Final = "## Modules\n"
_STATES: Final = "## States\n"
_YAML_HEAD: Final = """\
# yaml-language-server: $schema=serving.schema.json
# Every setting with its default. Written by docs/generate.py; copy what you change.
# SERVING_HOME overrides home.
"""
_ENVIRONMENT: Final = {
    "SERVING_HOME": "Overrides `home` of the configuration.",
    "SERVING_CONTROL_URL": "The admin API, where neither `--url` nor `-f` is given.",
    "SERVING_URL": "The gateway for `serving infer`, where neither `--url` nor `-f` is given.",
    "SERVING_API_KEY": "The API key that `serving infer` sends.",
    "SERVING_ACTOR": "Who the audit log names for a command; default: login name and machine.",
    "SERVING_LOG": "`plain` (default) or `json`.",
    "SERVING_LOG_LEVEL": "`debug`, `info` (default), `warning` or `error`.",
    "SERVING_DEBUG": "Set: an internal error shows its traceback.",
    "RAY_ADDRESS": "A Ray cluster to deploy on, instead of an embedded one.",
}


def documents() -> dict[Path, str]:
    """Every generated file by its path."""
    return {
        ROOT / "docs/structure.md": structure_page(),
        ROOT / "docs/rollouts.md": rollouts_page(),
        ROOT / "docs/metrics.md": metrics_page(),
        ROOT / "docs/configuration.md": configuration_page(),
        ROOT / "docs/cli.md": cli_page(),
        ROOT / "docs/errors.md": errors_page(),
        ROOT / "configs/serving.yaml": reference_yaml(),
        ROOT / "configs/serving.schema.json": json.dumps(schema_document(), indent=2) + "\n",
    }


def structure_page() -> str:
    """The page as it is, with its table of modules made anew from their docstrings."""
    text, _, _ = (ROOT / "docs/structure.md").read_text(encoding="utf-8").partition(_MODULES)
    rows = ["| module | |", "|---|---|"]
    for path in sorted((ROOT / "serving").rglob("*.py")):
        if path.parent.name == "versions":
            continue  # migrations
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append(f"| `{path.relative_to(ROOT)}` | {about.splitlines()[0]} |")
    return f"{text}{_MODULES}\n" + "\n".join(rows) + "\n"


def rollouts_page() -> str:
    """The page as it is, with its diagram made anew from the table of states."""
    text, _, _ = (ROOT / "docs/rollouts.md").read_text(encoding="utf-8").partition(_STATES)
    events = [f"| `{event}` | {meaning} |" for event, meaning in EVENT_MEANING.items()]
    rows = ["| event | when |", "|---|---|", *events]
    return f"{text}{_STATES}\n```mermaid\n{mermaid()}\n```\n\n" + "\n".join(rows) + "\n"


def metrics_page() -> str:
    """One row a metric family."""
    rows = [f"| `{_exposed(m)}` | {m.kind} | {_labels(m)} | {m.help} |" for m in METRICS]
    return "\n".join(
        [
            _NOTE,
            "# Metrics",
            "",
            "The controller serves them at `:8002/metrics`, one scrape target for the whole "
            "deployment: counters",
            "are sums over all gateways, and survive the restart of a gateway and of the "
            "controller.",
            "",
            "| name | type | labels | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _labels(metric: Metric) -> str:
    return ", ".join(f"`{label}`" for label in metric.labels) or "–"


def _exposed(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.kind == "counter" else metric.name


def configuration_page() -> str:
    """One row a setting."""
    lines = [
        _NOTE,
        "# Configuration",
        "",
        "A YAML file, given with `-f`. An unknown key or a bad value is an error that names file, "
        "key and what is",
        "allowed. `serving config schema` prints a JSON Schema for editors; "
        "`configs/serving.yaml` holds every default.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, field in _settings(ServingConfig, ""):
        default = "–" if field.is_required() else f"`{_plain(field)}`"
        lines.append(f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |")
    return "\n".join([*lines, ""])


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if model is ServingConfig and name == "models":
            yield from _settings(ModelConfig, "models.NAME.")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{key}.")
        else:
            yield key, field
        if (optional := _optional(field)) is not None:
            yield from _settings(optional, f"{key}.")


def _optional(field: FieldInfo) -> type[BaseModel] | None:
    """The settings of a section that may be left out."""
    if field.default is not None or typing.get_origin(field.annotation) is not types.UnionType:
        return None
    found = typing.get_args(field.annotation)[0]
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return ", ".join(_type(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{a}`" for a in typing.get_args(annotation))
    if typing.get_origin(annotation) is dict and typing.get_args(annotation)[1] is Any:
        return "mapping"
    if typing.get_origin(annotation) is dict:
        return f"mapping of name to {_type(typing.get_args(annotation)[1])}"
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {int: "integer", float: "number", str: "string", bool: "boolean", Path: "path"}[
        annotation
    ]


def _plain(field: FieldInfo) -> str:
    if field.is_required():
        return "…"
    value = field.get_default(call_default_factory=True)
    value = str(value) if isinstance(value, Path) else value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def reference_yaml() -> str:
    """The whole configuration with its defaults, each setting with its meaning above it."""
    lines = [_YAML_HEAD]
    _write_yaml(ServingConfig, 0, lines)
    return "\n".join(lines) + "\n"


def _write_yaml(model: type[BaseModel], depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    for name, field in model.model_fields.items():
        if model is ServingConfig and name == "models":
            lines += ["", "models: {}", "#  NAME:"]
            inner: list[str] = []
            _write_yaml(ModelConfig, 2, inner)
            lines += [f"#{line}" for line in inner]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += [] if depth else [""]
            lines.append(f"{indent}{name}:")
            _write_yaml(field.annotation, depth + 1, lines)
        else:
            lines += [f"{indent}# {field.description}", f"{indent}{name}: {_plain(field)}"]
        if (optional := _optional(field)) is not None:
            inner = []
            _write_yaml(optional, 1, inner)
            lines += [f"{indent}#{line}" for line in inner]


def cli_page() -> str:
    """Every command with its options."""
    command = typer.main.get_command(app)
    lines = [_NOTE, "# Command line", "", "| environment variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in _ENVIRONMENT.items()]
    lines.append("")
    for path, found in _commands(command, "serving"):
        lines += [f"## `{path}`", "", (found.help or "").strip(), ""]
        rows = [_option(p) for p in found.params]
        if rows:
            lines += ["| option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    if command.invoke_without_command:
        yield path, command
    for name, child in children.items():
        yield from _commands(child, f"{path} {name}")


def _option(parameter: click.Parameter) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = ", ".join(f"`{n.upper() if '-' not in n else n}`" for n in names)
    return f"| {shown} | {getattr(parameter, 'help', None) or ''} |"


def errors_page() -> str:
    """Every error with its slug and codes."""
    lines = [
        _NOTE,
        "# Errors",
        "",
        'Over HTTP an error is `{"error": sentence}`; the slug is the `outcome` label of '
        "`serving_requests_total`.",
        "The command line prints one line on stderr and exits with the code below.",
        "",
        "| slug | HTTP | gRPC | exit code | meaning |",
        "|---|---|---|---|---|",
    ]
    for error in _tree(errors.ServingError):
        meaning = " ".join((error.__doc__ or "").split("\n\n")[0].split())
        code = getattr(error, "exit_code", "–")
        lines.append(
            f"| `{error.slug}` | {error.http_status} | {error.grpc_code} | {code} | {meaning} |"
        )
    return "\n".join([*lines, ""])


def _tree(error: type[errors.ServingError]) -> Iterator[type[errors.ServingError]]:
    yield error
    for child in error.__subclasses__():
        yield from _tree(child)


def main(arguments: list[str]) -> int:
    """Write every document, or compare; 1 if one differs."""
    stale = [
        path
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" not in arguments:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(documents()[path], encoding="utf-8")
    for path in stale:
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
