import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.zoo.__main__ import main
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


ECHOED = {
    "BOOL": np.array([[True, False]]),
    "FP16": np.array([[1.5, -0.0]], np.float16),
    "FP32": np.array([[1e-40, np.inf]], np.float32),
    "FP64": np.array([[1e-300, 2.0]]),
    "BYTES": np.array([["", "ü"]], object),
    **{
        f"{kind}{bits}": np.array(
            [[0, np.iinfo(f"{kind.lower()}{bits}").max]], f"{kind.lower()}{bits}"
        )
        for kind in ("INT", "UINT")
        for bits in (8, 16, 32, 64)
    },
}


@pytest.mark.parametrize("datatype", sorted(ECHOED))
def test_echo_gives_back_what_it_got(datatype: str, tmp_path: Path) -> None:
    model = session(build(f"echo_{datatype.lower()}", tmp_path))
    (out,) = model.run(None, {"x": ECHOED[datatype]})
    assert out.dtype == ECHOED[datatype].dtype
    assert out.tolist() == ECHOED[datatype].tolist()


def test_echo_bf16_is_a_bf16_model(tmp_path: Path) -> None:
    # numpy has no bfloat16, so its values go through an OrtValue over their bits.
    model = session(build("echo_bf16", tmp_path))
    assert model.get_inputs()[0].type == model.get_outputs()[0].type == "tensor(bfloat16)"


def test_mlp_gives_probabilities(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    (p,) = session(build("mlp", tmp_path)).run(["p"], {"x": x})
    assert p.shape == (5, 10)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-5)


def test_simple_identity_gives_back_strings(tmp_path: Path) -> None:
    text = np.array([["a", ""], ["b", "c"]], object)
    (out,) = session(build("simple_identity", tmp_path)).run(None, {"INPUT0": text})
    assert out.tolist() == text.tolist()


def test_the_command_lists_builds_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["models.zoo", *arguments])
        status = main()
        return status, *capsys.readouterr()

    status, listed, _ = run()
    assert status == 0
    assert [line.split()[0] for line in listed.splitlines()] == list(CATALOGUE)
    status, built, _ = run("simple", "--out", str(tmp_path))
    assert (status, Path(built.strip())) == (0, tmp_path / "simple" / "model.onnx")
    assert Path(built.strip()).is_file()
    status, _, error = run("simpel", "--out", str(tmp_path))
    assert status == 2
    assert "no model simpel; there are: mlp, resnet50" in error
