"""Models that tests serve, registered once, and one deployment that tests share."""

import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from models.zoo.catalogue import build
from serving import compose
from tests.e2e.deployment import Deployment, register
from tests.fake_nvml.fixtures import cuda_library, fake_nvml, nvml_here, nvml_library

# A shell that runs the tests in the background ignores Ctrl-C for them and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["cuda_library", "fake_nvml", "nvml_here", "nvml_library"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes share the files among them, and one has every real deployment.

    Deployments take as long as all else; they come first.
    """
    if config.getoption("dist", "no") != "loadgroup":
        return
    for item in items:
        deployed = item.get_closest_marker("cluster") is not None
        group = "deployments" if deployed else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


def _write_sleeper(directory: Path) -> None:
    """TorchScript: y = 2x, but values over 1e3 keep it busy so long, over 1e6 for ever."""
    import torch

    class Sleeper(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spins = 0
            most = float(x.max())
            while most > 1e6 or spins < most - 1e3:
                spins += 1
            return x * 2

    with warnings.catch_warnings():
        # TorchScript is deprecated, and served all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Sleeper()).save(str(directory / "sleeper.ts"))
    np.savez(directory / "sample.npz", x=np.ones((2, 4), np.float32))


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose registry has mlp (versions 1 and 2), simple and sleeper."""
    home = tmp_path_factory.mktemp("registered")
    work = tmp_path_factory.mktemp("work")
    mlp = build("mlp", work / "mlp")
    simple = build("simple", work / "simple")
    _write_sleeper(work)
    register(
        home,
        ["mlp", mlp, "--alias", "champion"],
        ["mlp", mlp, "--batch", "dynamic", "--metric", "accuracy=0.9"],
        ["simple", simple],
        ["sleeper", work / "sleeper.ts", "--sample", work / "sample.npz", "--batch", "dynamic"],
    )
    return home


@pytest.fixture
def ray_serve() -> ModuleType:
    """`ray.serve`, imported as every process of ours does; its import warns."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(os, "environ", os.environ.copy())
        compose.prepare_environment()
        # Read once, at the first import, and other tests of this process start whole clusters.
        del os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
        from ray import serve
    return serve


@pytest.fixture
def home(registered: Path, tmp_path: Path) -> Path:
    """A fresh home with its own copy of the registry's database."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(registered / "registry.db", home)
    return home


@pytest.fixture(scope="session")
def deployment(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`serving up` with mlp at its champion, shared: leave it as you found it."""
    home = tmp_path_factory.mktemp("shared")
    shutil.copy(registered / "registry.db", home)
    with Deployment(home, {"mlp": {"version": "@champion"}}) as running:
        yield running
