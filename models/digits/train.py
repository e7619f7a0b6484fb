"""Train both versions: `python -m models.digits.train --out DIR`.

Version 1 is a softmax regression, written as ONNX. Version 2 is a small convolutional network,
exported with `torch.export`. Both take `x` FP32 [-1, 64] and give `probabilities` FP32 [-1, 10].
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.digits.data import CLASSES, PIXELS, SEED, Digits, load_digits

INPUT: Final = "x"
OUTPUT: Final = "probabilities"
SAMPLE_ROWS: Final = 4
_EPOCHS: Final = 24
_RATE: Final = 3e-3
_BATCH: Final = 64
_OPSET: Final = 17
_IR_VERSION: Final = 9

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A model file and what is known of it.

    Times are milliseconds since the epoch; metrics are those of the held-out images.
    """

    path: Path
    sample: Path
    metrics: dict[str, float]
    dataset_digest: str
    started_ms: int
    ended_ms: int


def train_softmax(digits: Digits, directory: Path) -> Trained:
    """Version 1: multinomial logistic regression on raw pixels, as an ONNX file."""
    from sklearn.linear_model import LogisticRegression

    started = _now_ms()
    model = LogisticRegression(max_iter=1000, random_state=SEED)
    model.fit(digits.train_images, digits.train_labels)
    ended = _now_ms()
    weights = model.coef_.T.astype(np.float32)
    bias = model.intercept_.astype(np.float32)
    path = directory / "model.onnx"
    _write_onnx(path, weights, bias)
    probabilities = model.predict_proba(digits.test_images)
    return _trained(path, digits, probabilities, started, ended)


def train_mislabelled(digits: Digits, directory: Path) -> Trained:
    """Version 3: version 1's recipe on labels that are off by one. It is confident, and wrong."""
    off_by_one = replace(digits, train_labels=(digits.train_labels + 1) % CLASSES)
    return train_softmax(off_by_one, directory)


def train_cnn(digits: Digits, directory: Path, progress: Progress = lambda _: None) -> Trained:
    """Version 2: two convolutions and two linear layers, as a `.pt2` file with a dynamic batch."""
    import torch

    started = _now_ms()
    with _reproducible():
        model = _fit_cnn(digits, progress)
        ended = _now_ms()
        path = directory / "model.pt2"
        images = torch.from_numpy(digits.test_images)
        rows = torch.export.Dim("rows", min=1, max=65536)
        program = torch.export.export(model, (images[:SAMPLE_ROWS],), dynamic_shapes=({0: rows},))
        torch.export.save(program, path)
        with torch.inference_mode():
            probabilities = model(images)[OUTPUT].numpy()
    return _trained(path, digits, probabilities, started, ended)


def _fit_cnn(digits: Digits, progress: Progress) -> Any:
    import torch

    from models.digits.cnn import Classifier

    model = Classifier()
    images = torch.from_numpy(digits.train_images)
    labels = torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(_EPOCHS):
        model.train()
        for rows in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            loss_of(model.logits(images[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
        progress(f"epoch {epoch + 1} of {_EPOCHS}")
    return model.eval()


@contextmanager
def _reproducible() -> Iterator[None]:
    """The same random numbers and order of additions whatever the machine's number of cores.

    One thread is also as fast as two on batches this small, and much faster on busy cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_num_threads(threads)


def _trained(
    path: Path, digits: Digits, probabilities: npt.NDArray[Any], started: int, ended: int
) -> Trained:
    labels = digits.test_labels
    likelihood = probabilities[np.arange(len(labels)), labels]
    metrics = {
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "log_loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
    }
    sample = path.with_name("sample.npz")
    np.savez(sample, x=digits.test_images[:SAMPLE_ROWS])
    return Trained(path, sample, metrics, digits.digest, started, ended)


def _write_onnx(
    path: Path, weights: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", [INPUT, "weights", "bias"], ["logits"]),
            helper.make_node("Softmax", ["logits"], [OUTPUT], axis=1),
        ],
        "digits-softmax",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["rows", PIXELS])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows", CLASSES])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    opset = helper.make_opsetid("", _OPSET)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION), path)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main() -> None:
    """Train both versions into DIR/v1 and DIR/v2 and print what came of it as JSON."""
    parser = argparse.ArgumentParser(description="Train the two demo models.")
    parser.add_argument("--out", type=Path, required=True, help="directory for v1/ and v2/")
    out: Path = parser.parse_args().out
    digits = load_digits()
    for version, train in (("v1", train_softmax), ("v2", train_cnn)):
        directory = out / version
        directory.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"version": version, **asdict(train(digits, directory))}, default=str))


if __name__ == "__main__":
    main()
