from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.zoo.catalogue import CATALOGUE, build
from models.zoo.vision import ARCHITECTURES


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"inception_v1"}))
def test_vision_models_take_any_batch_and_rows_do_not_mix(name: str, tmp_path: Path) -> None:
    model = session(build(name, tmp_path))
    images = np.random.default_rng(0).standard_normal((3, 3, 224, 224)).astype(np.float32)
    together = model.run(None, {"image": images})[0].reshape(3, 1000)
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together.sum(axis=1), 1.0, rtol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0, "the output ignores the image"
    for i in range(3):
        alone = model.run(None, {"image": images[i : i + 1]})[0].reshape(1000)
        np.testing.assert_allclose(alone, together[i], rtol=1e-3, atol=1e-6)


def test_simple_adds_and_subtracts(tmp_path: Path) -> None:
    model = session(build("simple", tmp_path))
    a = np.arange(32, dtype=np.int32).reshape(2, 16)
    total, difference = model.run(None, {"INPUT0": a, "INPUT1": a * 3})
    assert (total == a * 4).all()
    assert (difference == -2 * a).all()


def test_simple_string_does_the_same_in_decimal(tmp_path: Path) -> None:
    model = session(build("simple_string", tmp_path))
    a = np.array([[str(i) for i in range(16)]], dtype=object)
    total, difference = model.run(None, {"INPUT0": a, "INPUT1": a})
    assert [int(x) for x in total[0]] == [2 * i for i in range(16)]
    assert {int(x) for x in difference[0]} == {0}


def test_transformer_takes_any_batch_and_length(tmp_path: Path) -> None:
    import torch

    module = torch.export.load(build("transformer", tmp_path)).module()
    tokens = torch.arange(3 * 24).reshape(3, 24)
    with torch.inference_mode():
        together = module(tokens)["embedding"]
        alone = module(tokens[1:2])["embedding"]
    assert together.shape == (3, 256)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_builds_are_deterministic(tmp_path: Path) -> None:
    first = build("mlp", tmp_path / "a").read_bytes()
    assert first == build("mlp", tmp_path / "b").read_bytes()


def test_every_model_says_what_it_is() -> None:
    assert all(entry.about for entry in CATALOGUE.values())
