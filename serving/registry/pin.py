"""From a reference to a bundle that may be loaded: resolve, pin, fetch into the cache, verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import artifacts
from serving.core.types import Signature
from serving.errors import RegistryError
from serving.registry.mlflow import Registry


@dataclass(frozen=True, slots=True)
class Pin:
    """A reference made definite. `ref` is what was asked for: a number or an @alias.

    `digest` is what the version's files must have; `source` is where the registry keeps them.
    """

    model: str
    ref: str
    version: str
    digest: str
    source: str
    platform: str
    signature: Signature

    def to_dict(self) -> dict[str, Any]:
        """A JSON form that `from_dict` reads."""
        return {
            "model": self.model,
            "ref": self.ref,
            "version": self.version,
            "digest": self.digest,
            "source": self.source,
            "platform": self.platform,
            "signature": self.signature.to_dict(),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Pin:
        """Read `to_dict`'s form. Raises `ArtifactError` on a malformed signature."""
        return cls(**{**raw, "signature": Signature.from_dict(raw["signature"])})


def resolve(registry: Registry, model: str, ref: str) -> Pin:
    """What `ref` names now. Raises `RegistryError`, also for a version without a digest."""
    found = registry.get(model, ref)
    if not found.digest or found.signature is None:
        raise RegistryError(
            f"model {model!r} version {found.version} was not registered with `serving register`: "
            "it has no digest, so it cannot be served; register its file"
        )
    return Pin(
        model=model,
        ref=ref,
        version=found.version,
        digest=found.digest,
        source=found.source,
        platform=found.platform,
        signature=found.signature,
    )


def materialise(registry: Registry, pin: Pin, home: Path) -> Path:
    """The pinned bundle's directory in the cache of `home`, verified, fetched if it is not there.

    The registry is not touched where the cache has the bundle. Raises `ArtifactError` naming the
    file if what the registry holds is not what was registered, `RegistryError` if it cannot be had.
    """
    return artifacts.place(
        home,
        pin.digest,
        lambda directory: registry.fetch(pin.source, directory),
        shown_as=pin.source.removeprefix("file://"),
    )
