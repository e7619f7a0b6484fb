"""The registry as the command line names it: NAME, NAME@ALIAS or NAME/VERSION."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.registry.mlflow import Registry


def split(text: str) -> tuple[str, str | None]:
    """The name, and the reference ("@alias" or a version) if there is one. Raises `ConfigError`."""
    for mark in "@/":
        name, found, ref = text.partition(mark)
        if found and (not name or not ref):
            raise ConfigError(f"{text!r}: expected NAME, NAME@ALIAS or NAME/VERSION")
        if found:
            return name, f"@{ref}" if mark == "@" else ref
    return text, None


def open_registry(file: Path | None) -> Registry:
    """The registry that a configuration file, or the default one, names."""
    from serving.config import load_config
    from serving.registry.mlflow import Registry

    config = load_config(file)
    config.home_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Registry(config.registry_uri)
