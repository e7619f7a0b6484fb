"""The controller's cache of model bundles, which replicas on other nodes copy from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from serving import artifacts
from serving.errors import ArtifactError

MAX_CHUNK: Final = 4 << 20


class Bundles:
    """The bundles that are cached in `home`, by digest."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def manifest(self, digest: str) -> dict[str, Any]:
        """The files of a bundle. Raises `ArtifactError`."""
        return artifacts.read_manifest(self._cached(digest)).to_dict()

    async def read(self, digest: str, path: str, offset: int, size: int) -> bytes:
        """At most 4 MiB of one file of a bundle. Raises `ArtifactError`."""
        directory = self._cached(digest)
        listed = {f.path for f in artifacts.read_manifest(directory).files}
        if path not in listed | {artifacts.MANIFEST_FILE}:
            raise ArtifactError(f"{digest}: it has no file {path!r}")
        return await asyncio.to_thread(_read, directory / path, offset, min(size, MAX_CHUNK))

    def size(self, digest: str) -> int | None:
        """The bytes of a bundle's files; None if they are not in the cache."""
        try:
            return sum(f.size for f in artifacts.read_manifest(self._cached(digest)).files)
        except ArtifactError:
            return None

    def _cached(self, digest: str) -> Path:
        directory = artifacts.cache_dir(self._home, digest)
        if not directory.is_dir():
            raise ArtifactError(f"{digest}: not in the controller's cache")
        return directory


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
