from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.digits.data import load_digits
from models.digits.train import train_cnn, train_softmax


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = load_digits(), load_digits()
    assert first.digest == second.digest
    assert (first.test_images == second.test_images).all()
    assert len(first.train_images) + len(first.test_images) == 1797
    assert first.train_images.min() >= 0
    assert first.train_images.max() <= 1


def test_version_1_scores_as_its_metrics_say(tmp_path: Path) -> None:
    digits = load_digits()
    trained = train_softmax(digits, tmp_path)
    model = onnxruntime.InferenceSession(str(trained.path), providers=["CPUExecutionProvider"])
    probabilities = model.run(["probabilities"], {"x": digits.test_images})[0]
    accuracy = (probabilities.argmax(axis=1) == digits.test_labels).mean()
    assert accuracy == trained.metrics["accuracy"]
    assert accuracy > 0.9
    assert trained.dataset_digest == digits.digest
    assert np.load(trained.sample)["x"].shape == (4, 64)


def test_version_2_is_clearly_better_and_takes_any_batch(tmp_path: Path) -> None:
    import torch

    digits = load_digits()
    told: list[str] = []
    random = torch.random.get_rng_state()
    trained = train_cnn(digits, tmp_path, told.append)
    assert told[-1] == f"epoch {len(told)} of {len(told)}"
    assert torch.equal(torch.random.get_rng_state(), random), "it changed the caller's randomness"
    module = torch.export.load(trained.path).module()
    images = torch.from_numpy(digits.test_images)
    with torch.inference_mode():
        together = module(images)["probabilities"]
        alone = module(images[7:8])["probabilities"]
    torch.testing.assert_close(alone[0], together[7], rtol=1e-4, atol=1e-6)
    accuracy = (together.argmax(dim=1).numpy() == digits.test_labels).mean()
    assert accuracy == pytest.approx(trained.metrics["accuracy"])
    (tmp_path / "v1").mkdir()
    first = train_softmax(digits, tmp_path / "v1")
    wrong = [1 - t.metrics["accuracy"] for t in (first, trained)]
    assert wrong[1] < 0.6 * wrong[0]
    assert trained.metrics["log_loss"] < first.metrics["log_loss"]
    assert trained.started_ms < trained.ended_ms
