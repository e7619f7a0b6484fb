"""What the registry holds, and what may be put in. Knows nothing of MLflow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from serving.config_types import MODEL_NAME_PATTERN
from serving.core.types import Signature
from serving.errors import RegistryError

_ALIAS: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_RESERVED_ALIAS: Final = re.compile(r"latest|v[0-9]+", re.IGNORECASE)


class Dataset(NamedTuple):
    """The data that a version was trained and measured on. `uri` says where it comes from."""

    name: str
    uri: str
    digest: str


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One registered version. It never changes but for its aliases.

    `digest`, `platform` and `signature` are empty or None for a version that another MLflow client
    registered: such a one is listed and cannot be served. `training_time_s` is in seconds, None
    where it is not known; `created_at` is UTC.
    """

    name: str
    version: str
    digest: str
    source: str
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    dataset: Dataset | None
    training_time_s: float | None
    created_at: datetime
    platform: str
    signature: Signature | None


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A model's name, its versions in order, and which version each alias names."""

    name: str
    versions: tuple[ModelVersion, ...]
    aliases: Mapping[str, str]


def check_name(name: str) -> None:
    """Raise `RegistryError` unless `name` can name a model."""
    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise RegistryError(
            f"{name!r} is not a model name; allowed: letters, digits, '_', '.', '-', at most 100"
        )


def check_alias(alias: str) -> None:
    """Raise `RegistryError` unless `alias` (without "@") can name a version."""
    if _RESERVED_ALIAS.fullmatch(alias):
        raise RegistryError(f"alias {alias!r} is reserved: 'latest' and 'v<number>' name versions")
    if not _ALIAS.fullmatch(alias):
        raise RegistryError(
            f"{alias!r} is not an alias; allowed: a letter, then letters, digits, '_', '-', "
            "at most 64"
        )


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as floats. Raises `RegistryError` if one is not finite."""
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise RegistryError(f"metric {key!r} is {value}; expected a finite number")
    return {key: float(value) for key, value in metrics.items()}
