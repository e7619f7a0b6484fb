from pathlib import Path

import numpy as np
import onnxruntime

from models.digits.data import load_digits
from models.digits.train import train_softmax


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
