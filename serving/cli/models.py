"""`serving register`, `models` and `show`: what the registry holds."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.registry import open_registry, split
from serving.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from serving.registry.model import Dataset, ModelVersion

ConfigFile = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="Configuration file that names home and registry."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (register, models, show):
        app.command()(command)


def register(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    path: Annotated[Path, typer.Argument(help="A .onnx, .pt2, or TorchScript .ts or .pt file.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="A measured number, KEY=VALUE. Repeatable.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="What it was trained on, NAME=URI@DIGEST.")
    ] = None,
    training_time: Annotated[
        float | None, typer.Option(help="Seconds that the training took.")
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help="Inputs for warm-up and golden outputs, .npz.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="Names, datatypes and shapes, where the file has none.")
    ] = None,
    batch: Annotated[
        str, typer.Option(help="How the first dimension is treated: auto, dynamic, fixed, none.")
    ] = "auto",
    alias: Annotated[str | None, typer.Option(help="Let @ALIAS name this version.")] = None,
    file: ConfigFile = None,
) -> None:
    """Check a model file in a child process and register it as the next version."""
    metrics = dict(_metric(text) for text in metric or ())
    _check(name, metrics, alias)
    data = None if dataset is None else _dataset(dataset)
    if batch not in ("auto", "dynamic", "fixed", "none"):
        raise ConfigError(f"--batch {batch!r}; allowed: auto, dynamic, fixed, none")
    if training_time is not None and not 0 <= training_time < math.inf:
        raise ConfigError(f"--training-time {training_time:g}; expected seconds, 0 or more")
    for given in (path, sample, signature):
        if given is not None and not given.is_file():
            raise ConfigError(f"{given}: {'is not a file' if given.exists() else 'does not exist'}")

    from serving.replica.inspect import inspect_in_child

    with tempfile.TemporaryDirectory(prefix="serving-register-") as directory:
        bundle = Path(directory) / "bundle"
        typer.echo(f"loading and running {path}", err=True)
        inspect_in_child(path, bundle, sample=sample, signature=signature, batch=batch)
        typer.echo(f"registering {name}", err=True)
        registered = open_registry(file).register(
            name,
            bundle,
            metrics=metrics,
            dataset=data,
            training_time=_interval(training_time),
            alias=alias,
        )
    named = f" @{alias}" if alias else ""
    typer.echo(f"{name} version {registered.version}{named} {registered.digest}")


def models(as_json: AsJson = False, file: ConfigFile = None) -> None:
    """List every registered version."""
    from serving.cli.render import registry_table, show_view

    found = open_registry(file).models()
    rows = [_to_dict(version) for model in found for version in model.versions]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo("no models; add one with `serving register`")
    else:
        show_view(registry_table(rows))


def show(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION.")],
    as_json: AsJson = False,
    file: ConfigFile = None,
) -> None:
    """Show one version; of a bare NAME, @champion or else the newest."""
    from serving.cli.render import show_view, version_view

    name, ref = split(model)
    registry = open_registry(file)
    if ref is None:
        known = registry.model(name)
        if not known.versions:
            raise ConfigError(f"model {name!r} has no version")
        ref = known.aliases.get("champion", known.versions[-1].version)
    found = _to_dict(registry.get(name, ref))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show_view(version_view(found))


def _check(name: str, metrics: dict[str, float], alias: str | None) -> None:
    """What the registry would refuse, before a model that takes long is loaded."""
    from serving.registry.model import check_alias, check_metrics, check_name

    try:
        check_name(name)
        check_metrics(metrics)
        if alias is not None:
            check_alias(alias)
    except RegistryError as error:
        raise ConfigError(str(error)) from error


def _metric(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), float(value)
    except ValueError:
        raise ConfigError(f"--metric {text!r}: expected KEY=NUMBER") from None


def _dataset(text: str) -> Dataset:
    from serving.registry.model import Dataset

    name, equals, rest = text.partition("=")
    uri, at, digest = rest.rpartition("@")
    if not (name and equals and uri and at and digest):
        raise ConfigError(f"--dataset {text!r}: expected NAME=URI@DIGEST")
    return Dataset(name, uri, digest)


def _interval(seconds: float | None) -> tuple[int, int] | None:
    """Start and end in Unix milliseconds of a training that took `seconds`."""
    if seconds is None:
        return None
    end = time.time_ns() // 1_000_000
    return end - round(seconds * 1e3), end


def _to_dict(version: ModelVersion) -> dict[str, Any]:
    data = version.dataset
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "digest": version.digest,
        "platform": version.platform,
        "metrics": dict(version.metrics),
        "dataset": data and {"name": data.name, "uri": data.uri, "digest": data.digest},
        "training_time_s": version.training_time_s,
        "created_at": version.created_at.isoformat(timespec="seconds"),
        "source": version.source,
        "signature": version.signature and version.signature.to_dict(),
    }
