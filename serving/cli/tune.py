"""`serving tune`: how a version is best run on this machine's device, by measuring it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from serving.cli.models import AsJson, ConfigFile
from serving.cli.registry import open_registry, split
from serving.errors import ConfigError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import ServingConfig
    from serving.core.replica import ReplicaSpec
    from serving.core.tuning import Objective
    from serving.model_settings import ModelConfig
    from serving.registry.pin import Pin
    from serving.replica.tuning import Space

_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m)")
_PLOTS: Final = (".png", ".svg", ".pdf")


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION.")],
    slo: Annotated[
        str | None, typer.Option(help="The latency to keep, such as p99=50ms.", show_default=False)
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Most USD a million rows.", show_default=False)
    ] = None,
    budget: Annotated[str, typer.Option(help="How long to measure; loading not counted.")] = "60s",
    max_size: Annotated[int, typer.Option(help="Largest batch to try.", min=1, max=65536)] = 64,
    instances: Annotated[
        str | None,
        typer.Option(
            help="How many replicas to try, such as 1,2,4. Default: 1, 2 and 4, as many as there "
            "are cores for.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of a Torch model, such as float32,bfloat16. Default: as exported, and on a GPU "
            "float16 and bfloat16 too.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was measured: a .png, .svg or .pdf file.")
    ] = None,
    file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure batch sizes, replicas and precisions of a model here, and say which to use."""
    objective = _objective(slo, max_cost)
    seconds = _seconds("--budget", budget)
    counts, precisions = _counts(instances), _precisions(precision)
    _check_plot(plot)

    from serving.cli.render import show_view
    from serving.cli.tune_render import report, tuned_view
    from serving.config import load_config
    from serving.core.tuning import choose, why_none
    from serving.replica.tuning import tune as measure

    config = load_config(file)
    name, pin = _pinned(model, config, file)
    settings = config.models.get(name) or _defaults()
    space = _space(pin, settings, config, max_size, counts, precisions)
    tuned = measure(space, seconds, _prices(pin, settings, config), _progress)
    chosen = choose(tuned.found, objective)
    found = report(name, pin.version, tuned, objective, chosen, space.buckets)
    if plot is not None:
        _draw(found, plot)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show_view(tuned_view(found))
    if chosen is None:
        why = why_none(tuned.found, objective)
        raise ConflictError(f"nothing that was measured meets {found['objective']}: {why}")


def _progress(line: str) -> None:
    typer.echo(line, err=True)


def _objective(slo: str | None, max_cost: float | None) -> Objective:
    from serving.core.tuning import PERCENTILES, Objective

    if max_cost is not None and not 0 < max_cost < float("inf"):
        raise ConfigError(f"--max-cost {max_cost:g}; expected USD a million rows, more than 0")
    if slo is None:
        return Objective(max_usd_per_million=max_cost)
    percentile, _, limit = slo.partition("=")
    if percentile not in PERCENTILES:
        raise ConfigError(
            f"--slo {slo!r}; expected PERCENTILE=TIME such as p99=50ms, "
            f"PERCENTILE one of {', '.join(PERCENTILES)}"
        )
    if not limit:
        raise ConfigError(f"--slo {slo!r}: no time; expected such as {percentile}=50ms")
    return Objective(percentile, _seconds("--slo", limit), max_cost)


def _seconds(option: str, text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(
            f"{option}: {text!r} is no time above 0; allowed: such as 500us, 50ms, 60s or 2m"
        )
    return float(match[1]) * _UNITS[match[2]]


def _defaults() -> ModelConfig:
    from serving.model_settings import ModelConfig

    return ModelConfig()


def _pinned(model: str, config: ServingConfig, file: Path | None) -> tuple[str, Pin]:
    from serving.registry.pin import resolve

    name, ref = split(model)
    configured = config.models.get(name) or _defaults()
    return name, resolve(open_registry(file), name, ref or configured.version)


def _space(
    pin: Pin,
    settings: ModelConfig,
    config: ServingConfig,
    max_size: int,
    counts: tuple[int, ...],
    precisions: tuple[str, ...],
) -> Space:
    from serving.artifacts import ONNX_PLATFORM
    from serving.core.tuning import AS_EXPORTED, sizes_up_to
    from serving.core.types import Batch
    from serving.registry.mlflow import Registry
    from serving.registry.pin import materialise
    from serving.replica.tuning import Space

    if pin.signature.batch is Batch.NONE:
        max_size = 1
    elif pin.signature.batch is Batch.FIXED:
        max_size = min(max_size, pin.signature.fixed_rows)
    on_gpu, is_onnx = _on_gpu(settings), pin.platform == ONNX_PLATFORM
    if is_onnx and precisions:
        raise ConfigError("--precision: an ONNX model runs as it was exported; leave it out")
    most = 4 if on_gpu else max(1, _cores() // _replica(pin, settings).cores(_cores()))
    casts = ("float16", "bfloat16") if on_gpu and not is_onnx else ()
    return Space(
        bundle=materialise(Registry(config.registry_uri), pin, config.home_dir),
        device="cuda" if on_gpu else "cpu",
        onnx=settings.onnx.model_dump(mode="json"),
        torch=settings.torch.model_dump(mode="json"),
        buckets=settings.batching.buckets,
        precisions=precisions or (AS_EXPORTED, *casts),
        max_sizes=sizes_up_to(max_size),
        instances=counts or tuple(n for n in (1, 2, 4) if n <= most),
    )


def _on_gpu(settings: ModelConfig) -> bool:
    from serving.replica.backends.cuda import missing_cuda, require_cuda

    if settings.device == "cuda":
        require_cuda("device: cuda")
    return settings.device != "cpu" and missing_cuda() is None


def _precisions(text: str | None) -> tuple[str, ...]:
    """Those asked for; none for the usual ones."""
    wanted = tuple(dict.fromkeys(text.split(","))) if text is not None else ()
    allowed = ("float32", "float16", "bfloat16")
    for one in wanted:
        if one not in allowed:
            raise ConfigError(f"--precision {one!r}; allowed: {', '.join(allowed)}")
    return wanted


def _counts(text: str | None) -> tuple[int, ...]:
    """Those asked for, ascending; none for the usual ones."""
    parts = text.split(",") if text is not None else []
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 64 for part in parts):
        raise ConfigError(f"--instances {text!r}; expected numbers from 1 to 64, such as 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _replica(pin: Pin, settings: ModelConfig) -> ReplicaSpec:
    from serving.artifacts import ONNX_PLATFORM
    from serving.core.replica import ReplicaSpec

    is_onnx = pin.platform == ONNX_PLATFORM
    return ReplicaSpec(
        model=pin.model,
        version=pin.version,
        digest=pin.digest,
        home="",
        run_dir="",
        onnx=settings.onnx.model_dump(mode="json") if is_onnx else {},
        torch={} if is_onnx else settings.torch.model_dump(mode="json"),
    )


def _prices(
    pin: Pin, settings: ModelConfig, config: ServingConfig
) -> Callable[[str, int], float | None]:
    """USD an hour of a number of instances on a device: a whole GPU, or their cores."""

    def price(device: str, count: int) -> float | None:
        if settings.usd_per_hour is not None:
            return count * settings.usd_per_hour
        book = config.cost.price_book
        if device != "cpu":
            whole = book.gpu(device, {})
            return None if whole is None else whole.usd_per_hour
        core = book.core({})
        cores = _replica(pin, settings).cores(_cores())
        return None if core is None else count * cores * core.usd_per_hour

    return price


def _check_plot(plot: Path | None) -> None:
    """Before minutes of measuring, not after."""
    if plot is None:
        return
    if plot.suffix not in _PLOTS:
        raise ConfigError(f"--plot {plot}: expected a file that ends in {', '.join(_PLOTS)}")
    if not plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot {plot}: {plot.absolute().parent} is no directory")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None


def _draw(found: dict[str, object], plot: Path) -> None:
    from serving.cli.tune_plot import draw

    try:
        draw(found, plot)
    except OSError as error:
        raise ConfigError(f"--plot {plot}: {error.strerror}") from None
