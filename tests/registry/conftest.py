"""A real MLflow registry in SQLite for each test; its tables are made once and copied."""

import shutil
from pathlib import Path

import pytest

from serving.registry.mlflow import Registry


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "registry.db"
    assert Registry(f"sqlite:///{path}").models() == []
    return path


@pytest.fixture
def home(tmp_path: Path, empty_registry: Path) -> Path:
    directory = tmp_path / "home"
    directory.mkdir()
    shutil.copyfile(empty_registry, directory / "registry.db")
    return directory


@pytest.fixture
def registry(home: Path) -> Registry:
    return Registry(f"sqlite:///{home / 'registry.db'}")
