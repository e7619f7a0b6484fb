"""What the settings of the configuration are built from: names, versions, ports, resources."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    StringConstraints,
)

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
VERSION_PATTERN = r"^(@[A-Za-z][A-Za-z0-9_-]{0,63}|[1-9][0-9]{0,8})$"

ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME_PATTERN)]


def _version_number(value: object) -> object:
    """A version written without quotes is a number in YAML."""
    return str(value) if type(value) is int else value


VersionRef = Annotated[
    str, BeforeValidator(_version_number), StringConstraints(pattern=VERSION_PATTERN)
]
Port = Annotated[int, Field(ge=0, le=65535)]

# Ray keeps these for itself, or this project gives them.
_RESERVED_RESOURCES: Final = frozenset({"CPU", "GPU", "memory", "object_store_memory", ""})


def _own_resources(value: dict[str, float]) -> dict[str, float]:
    if reserved := sorted(_RESERVED_RESOURCES & value.keys()):
        raise ValueError(f"{reserved[0]!r} cannot be asked for here; name a custom Ray resource")
    return value


Resources = Annotated[dict[str, PositiveFloat], AfterValidator(_own_resources)]


class Frozen(BaseModel):
    """Settings that do not change, and in which nothing unknown is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
