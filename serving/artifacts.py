"""Model bundles: what identifies one, how it is checked, and the cache that replicas load from.

A bundle is a plain directory:

    model.onnx | model.pt2 | model.ts   (+ external data)
    signature.json    Signature.to_dict() with "platform" and "model_file"
    sample.npz        inputs for warm-up, one array per input
    golden.npz        what those inputs gave when the bundle was made
    MANIFEST.json     [{"path", "sha256", "size"}, …], sorted by path, of every other file

The registry lets a registered file be overwritten, so a model's identity is its digest: "sha256:"
and the SHA-256 of MANIFEST.json, which is written in canonical form (`sha256sum MANIFEST.json`
shows it). `verify` reads every file. The cache is keyed by digest, written once, read-only, and
filled under a lock: two processes of a node fetch an artifact once, and neither sees half of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Final

from serving.core.onnx_external import external_locations
from serving.core.types import Signature
from serving.errors import ArtifactError

MANIFEST_FILE: Final = "MANIFEST.json"
SIGNATURE_FILE: Final = "signature.json"
SAMPLE_FILE: Final = "sample.npz"
GOLDEN_FILE: Final = "golden.npz"

ONNX_PLATFORM: Final = "onnxruntime_onnx"
EXPORT_PLATFORM: Final = "pytorch_export"
TORCHSCRIPT_PLATFORM: Final = "pytorch_torchscript"
PLATFORMS: Final = (ONNX_PLATFORM, EXPORT_PLATFORM, TORCHSCRIPT_PLATFORM)

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a bundle. `path` is relative, with forward slashes; `size` is in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a bundle but MANIFEST.json, sorted by path."""

    files: tuple[FileEntry, ...]

    def canonical(self) -> bytes:
        """The bytes of MANIFEST.json: sorted keys, no spaces, UTF-8."""
        rows = [asdict(f) for f in self.files]
        text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return text.encode()

    @property
    def digest(self) -> str:
        """The text `sha256:` and 64 hexadecimal digits."""
        return "sha256:" + hashlib.sha256(self.canonical()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON form for control calls."""
        return {"files": [asdict(f) for f in self.files]}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Manifest:
        """Read `to_dict`'s form, from a peer that need not be honest.

        Raises `ArtifactError` on a path that leaves the bundle, a duplicate, or a malformed row.
        """
        try:
            rows = [(row["path"], row["size"], row["sha256"]) for row in raw["files"]]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"manifest is malformed: {error!r}") from error
        for path, size, sha256 in rows:
            if not isinstance(path, str) or path == MANIFEST_FILE:
                raise ArtifactError(f"manifest: {path!r} is not the path of a bundle file")
            check_path(path, "manifest")
            if type(size) is not int or size < 0:
                raise ArtifactError(f"manifest: {path} has size {size!r}")
            if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
                raise ArtifactError(f"manifest: {path} has sha256 {sha256!r}")
        if not rows or len({path for path, _, _ in rows}) != len(rows):
            raise ArtifactError("manifest: it lists no file, or one file twice")
        return cls(tuple(FileEntry(*row) for row in sorted(rows)))


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What signature.json says."""

    signature: Signature
    platform: str
    model_file: str


def check_path(path: str, where: str) -> None:
    """Raise `ArtifactError` unless `path` is relative, plain and stays inside its directory."""
    parts = path.split("/")
    if (
        not path
        # Control characters, and the lone surrogates of names that are not UTF-8.
        or not path.isprintable()
        or "\\" in path
        or PurePosixPath(path).is_absolute()
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ArtifactError(
            f"{where}: {path!r} is refused; only plain paths inside the bundle are allowed"
        )


def build_manifest(directory: Path) -> Manifest:
    """Read every file under `directory` except MANIFEST.json.

    Raises `ArtifactError` on a link, a special file, an unreadable file, an empty bundle, or an
    ONNX file whose external data is not in the bundle.
    """
    found = _list(directory)
    found.pop(MANIFEST_FILE, None)
    if not found:
        raise ArtifactError(f"{directory}: no model file in it")
    for path in found:
        if path.endswith(".onnx"):
            base = PurePosixPath(path).parent
            for location in onnx_external_data(directory / path):
                if str(base / location) not in found:
                    raise ArtifactError(
                        f"{directory / path}: its external data {location!r} is not in the bundle"
                    )
    return Manifest(tuple(FileEntry(p, found[p], _sha256(directory / p)) for p in sorted(found)))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json. Raises `ArtifactError`."""
    with _as_artifact_error(directory):
        (directory / MANIFEST_FILE).write_bytes(manifest.canonical())


def read_manifest(directory: Path, *, shown_as: str = "") -> Manifest:
    """What MANIFEST.json claims, checked for form only: `verify` checks it against the files.

    `shown_as` is what errors call `directory`. Raises `ArtifactError`.
    """
    path = directory / MANIFEST_FILE
    shown = f"{shown_as or directory}/{MANIFEST_FILE}"
    if not path.exists():
        raise ArtifactError(f"{shown}: is missing")
    try:
        raw = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{shown}: is not valid JSON: {error}") from error
    return Manifest.from_dict({"files": raw})


def verify(directory: Path, digest: str, *, shown_as: str = "") -> Manifest:
    """Read every file of a bundle and check it against `digest`.

    `shown_as` is what errors call `directory`.

    Raises `ArtifactError` naming the first file that is missing, extra, or differs in size or
    content.
    """
    _hex(digest)
    manifest = read_manifest(directory, shown_as=shown_as)
    where = shown_as or str(directory)
    if manifest.digest != digest:
        raise ArtifactError(
            f"{where}/{MANIFEST_FILE}: its digest is {manifest.digest}, expected {digest}"
        )
    found = _list(directory)
    found.pop(MANIFEST_FILE, None)
    if extra := sorted(found.keys() - {f.path for f in manifest.files}):
        raise ArtifactError(f"{where}/{extra[0]}: is not part of the bundle {digest}")
    for file in manifest.files:
        if file.path not in found:
            raise ArtifactError(f"{where}/{file.path}: is missing from the bundle {digest}")
        size = found[file.path]
        sha256 = _sha256(directory / file.path) if size == file.size else ""
        if sha256 != file.sha256:
            raise ArtifactError(
                f"{where}/{file.path}: was changed after it was registered: expected "
                f"{file.size} bytes with SHA-256 {file.sha256}, found {size} bytes"
                + (f" with {sha256}" if sha256 else "")
            )
    return manifest


def write_signature(
    directory: Path, signature: Signature, *, platform: str, model_file: str
) -> None:
    """Write signature.json. Raises `ArtifactError`."""
    body = {**signature.to_dict(), "platform": platform, "model_file": model_file}
    with _as_artifact_error(directory):
        (directory / SIGNATURE_FILE).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def read_signature(directory: Path) -> BundleInfo:
    """Read signature.json. Raises `ArtifactError` where it is missing or malformed."""
    path = directory / SIGNATURE_FILE
    try:
        raw = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path}: expected a JSON object")
    platform, model_file = raw.get("platform"), raw.get("model_file")
    if platform not in PLATFORMS:
        raise ArtifactError(f"{path}: platform {platform!r}; allowed: {', '.join(PLATFORMS)}")
    if not isinstance(model_file, str):
        raise ArtifactError(f"{path}: model_file is {model_file!r}")
    check_path(model_file, str(path))
    return BundleInfo(Signature.from_dict(raw), platform, model_file)


def onnx_external_data(model: Path) -> tuple[str, ...]:
    """The files beside `model` that hold its external data, as relative paths, sorted.

    Raises `ArtifactError` if `model` is not an ONNX file, or refers to a path outside its
    directory.
    """
    with _as_artifact_error(model), _open_plain(model) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ArtifactError(f"{model}: is empty")
        # Not closed by hand: an error's traceback may still hold views into the map.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        locations = external_locations(memoryview(mapped))
    except ArtifactError as error:
        raise ArtifactError(f"{model}: {error}") from error
    for location in locations:
        check_path(location, f"{model}: external data")
    return tuple(sorted(locations))


def cache_dir(home: Path, digest: str) -> Path:
    """Where the bundle with `digest` lies in the cache of `home`, whether or not it is there."""
    return home / "artifacts" / _hex(digest)


def place(
    home: Path, digest: str, fill: Callable[[Path], None], *, shown_as: str = "the fetched bundle"
) -> Path:
    """The verified bundle with `digest` in the cache; if it is not there, `fill` writes it first.

    `fill` gets an empty directory. What it wrote is verified, made durable and read-only, and then
    appears in the cache in one step. Of several callers at once, one fills and the others wait.
    `shown_as` is what errors call the place that `fill` copies from.

    Raises `ArtifactError` if the bundle does not match `digest`, or the disk refuses; and what
    `fill` raises.
    """
    target = cache_dir(home, digest)
    if not target.exists():
        with _as_artifact_error(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.parent / f".{target.name}.lock"):
                if not target.exists():
                    _fill(target, digest, fill, shown_as)
                    return target
    try:
        verify(target, digest)
    except ArtifactError as error:
        raise ArtifactError(f"{error} (remove {target} to have it fetched again)") from error
    return target


def place_copy(home: Path, digest: str, source: Path) -> Path:
    """`place` with a copy of the bundle in `source`."""

    def fill(directory: Path) -> None:
        for path in _list(source):
            destination = directory / path
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, destination, follow_symlinks=False)

    return place(home, digest, fill, shown_as=str(source))


def _fill(target: Path, digest: str, fill: Callable[[Path], None], shown_as: str) -> None:
    # Only the holder of the lock gets here: what has this name was left by a process that died.
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        _unseal_and_remove(partial)
    partial.mkdir(mode=0o700)
    try:
        fill(partial)
        verify(partial, digest, shown_as=shown_as)
        make_durable(partial, read_only=True)
        partial.rename(target)
    except BaseException:
        _unseal_and_remove(partial)
        raise
    _fsync(target.parent)


def make_durable(directory: Path, *, read_only: bool = False) -> None:
    """Flush every file under `directory`, then the directories, deepest first, to the disk."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            _fsync(os.path.join(parent, name), 0o444 if read_only else None)
        _fsync(parent, 0o555 if read_only else None)


def _unseal_and_remove(directory: Path) -> None:
    for parent, _, _ in os.walk(directory):
        os.chmod(parent, 0o700)
    shutil.rmtree(directory)


def _list(directory: Path) -> dict[str, int]:
    """Relative path → size of every file under `directory`; anything else is an error."""
    found: dict[str, int] = {}
    waiting = [""]
    with _as_artifact_error(directory):
        while waiting:
            prefix = waiting.pop()
            with os.scandir(directory / prefix) as entries:
                for entry in entries:
                    path = prefix + entry.name
                    if entry.is_symlink():
                        raise ArtifactError(f"{entry.path}: is a link; links are refused")
                    if entry.is_dir():
                        waiting.append(path + "/")
                    elif entry.is_file():
                        check_path(path, str(directory))
                        found[path] = entry.stat(follow_symlinks=False).st_size
                    else:
                        raise ArtifactError(f"{entry.path}: is not a regular file")
    return found


def _sha256(path: Path) -> str:
    with _as_artifact_error(path), _open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> bytes:
    with _as_artifact_error(path), _open_plain(path) as file:
        return file.read()


def _open_plain(path: Path) -> BufferedReader:
    """Open for reading; a link put there since the directory was listed is an error."""
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


@contextmanager
def _as_artifact_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename or path}: is missing") from error
    except OSError as error:
        raise ArtifactError(f"{error.filename or path}: {error.strerror or error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock between processes and threads; the kernel frees a dead holder's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _fsync(path: Path | str, mode: int | None = None) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mode is not None:
            os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)


def _hex(digest: str) -> str:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ArtifactError(f"{digest!r} is not a digest; expected sha256: and 64 hex digits")
    return match[1]
