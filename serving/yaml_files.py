"""Reading a YAML file, and why that failed as one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from serving.errors import ConfigError


def one_line(error: Exception) -> str:
    """What a parser says, without its line breaks."""
    return " ".join(str(error).split())


def read_yaml(path: Path, explain: Callable[[Exception], str] = one_line) -> Any:
    """What the file holds; None if that is nothing.

    Raises `ConfigError` where it cannot be read, or is not valid YAML for the reason that `explain`
    makes of the parser's error.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {explain(error)}") from error
