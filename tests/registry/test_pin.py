import json
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from serving.artifacts import build_manifest, cache_dir, verify, write_manifest
from serving.errors import ArtifactError, RegistryError
from serving.registry.mlflow import Registry
from serving.registry.pin import Pin, materialise, resolve
from tests.bundles import write_bundle

# MLflow 3.17 with SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture
def pin(registry: Registry, tmp_path: Path) -> Pin:
    write_bundle(tmp_path / "bundle")
    registry.register("digits", tmp_path / "bundle", alias="champion")
    return resolve(registry, "digits", "@champion")


def source_of(pin: Pin) -> Path:
    return Path(urlsplit(pin.source).path)


def test_a_pin_names_version_and_digest_and_survives_json(registry: Registry, pin: Pin) -> None:
    assert (pin.model, pin.ref, pin.version) == ("digits", "@champion", "1")
    assert verify(source_of(pin), pin.digest)
    assert Pin.from_dict(json.loads(json.dumps(pin.to_dict()))) == pin
    by_number = resolve(registry, "digits", "1")
    assert (by_number.ref, by_number.digest) == ("1", pin.digest)


def test_a_moved_alias_does_not_move_the_pin(
    registry: Registry, pin: Pin, tmp_path: Path, home: Path
) -> None:
    digest = write_bundle(tmp_path / "second", b"other weights")
    registry.register("digits", tmp_path / "second", alias="champion")
    assert (materialise(registry, pin, home) / "model.pt2").read_bytes() == b"weights" * 1000
    moved = resolve(registry, "digits", "@champion")
    assert (moved.version, moved.digest) == ("2", digest)
    assert (materialise(registry, moved, home) / "model.pt2").read_bytes() == b"other weights"


def test_the_bundle_in_the_cache_is_the_registered_one(
    registry: Registry, pin: Pin, home: Path
) -> None:
    placed = materialise(registry, pin, home)
    assert placed == cache_dir(home, pin.digest)
    assert verify(placed, pin.digest) == verify(source_of(pin), pin.digest)


def forge(directory: Path) -> None:
    (directory / "model.pt2").write_bytes(b"evil")
    write_manifest(directory, build_manifest(directory))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda d: (d / "model.pt2").write_bytes(b"w" * 7000), "model.pt2: was changed after"),
        (lambda d: (d / "nested/labels.txt").unlink(), "nested/labels.txt: is missing"),
        (lambda d: (d / "extra.py").write_text(""), "extra.py: is not part of the bundle"),
        (lambda d: (d / "MANIFEST.json").unlink(), "MANIFEST.json: is missing"),
        (forge, "MANIFEST.json: its digest is"),
    ],
)
def test_a_version_overwritten_in_the_registry_is_refused_by_file(
    registry: Registry, pin: Pin, home: Path, tamper: Callable[[Path], object], message: str
) -> None:
    tamper(source_of(pin))
    with pytest.raises(ArtifactError, match=message):
        materialise(registry, pin, home)
    assert not cache_dir(home, pin.digest).exists()


def test_a_version_whose_files_are_gone_is_one_clear_error(
    registry: Registry, pin: Pin, home: Path
) -> None:
    shutil.rmtree(source_of(pin))
    with pytest.raises((ArtifactError, RegistryError)) as caught:
        materialise(registry, pin, home)
    assert pin.source.removeprefix("file://") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cached_bundle_needs_no_registry(registry: Registry, pin: Pin, home: Path) -> None:
    materialise(registry, pin, home)
    (home / "registry.db").unlink()
    shutil.rmtree(source_of(pin))
    unreachable = Registry("http://127.0.0.1:9")
    assert verify(materialise(unreachable, pin, home), pin.digest)


def test_a_damaged_cache_is_refused(registry: Registry, pin: Pin, home: Path) -> None:
    placed = materialise(registry, pin, home)
    (placed / "model.pt2").chmod(0o644)
    (placed / "model.pt2").write_bytes(b"evil")
    with pytest.raises(ArtifactError, match=r"model.pt2: was changed .*to have it fetched again"):
        materialise(registry, pin, home)
