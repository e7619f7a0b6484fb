from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from serving.artifacts import build_manifest, onnx_external_data
from serving.errors import ArtifactError


def onnx_with_external_data(directory: Path, location: str) -> Path:
    weights = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    weights.external_data.add(key="length", value="16")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
        [weights],
    )
    path = directory / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_external_data_beside_the_model_is_found(tmp_path: Path) -> None:
    model = onnx_with_external_data(tmp_path, "data/weights.bin")
    assert onnx_external_data(model) == ("data/weights.bin",)
    with pytest.raises(ArtifactError, match=r"'data/weights.bin' is not in the bundle"):
        build_manifest(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    assert [f.path for f in build_manifest(tmp_path).files] == ["data/weights.bin", "model.onnx"]


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret", "a/../../b", "..", "", "a\\..\\b"]
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    model = onnx_with_external_data(tmp_path, location)
    with pytest.raises(ArtifactError, match=r"model.onnx: external data: .* is refused"):
        onnx_external_data(model)


def test_external_data_is_found_wherever_a_tensor_can_be(tmp_path: Path) -> None:
    def external(name: str) -> TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        return tensor

    def graph(name: str) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], ["c"], value=external(f"{name}_constant"))
        return helper.make_graph([constant], name, [], [], [external(f"{name}_weight")])

    inner = helper.make_node("If", ["p"], ["c"], then_branch=graph("then"), else_branch=graph("no"))
    outer = graph("main")
    outer.node.append(inner)
    outer.sparse_initializer.add(
        values=external("sparse_values"), indices=external("sparse_indices")
    )
    model = helper.make_model(outer)
    model.functions.add(name="f", node=[inner]).attribute_proto.add(t=external("default"))
    model.training_info.add(algorithm=graph("training"))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    branches = {
        f"{g}_{kind}" for g in ("main", "then", "no", "training") for kind in ("constant", "weight")
    }
    assert set(onnx_external_data(path)) == branches | {
        "sparse_values",
        "sparse_indices",
        "default",
    }


def outcome(path: Path) -> tuple[str, ...] | str:
    """What is found, or the error."""
    try:
        return onnx_external_data(path)
    except ArtifactError as error:
        return str(error)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_model_never_crash_the_reader(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.onnx"
    path.write_bytes(data)
    found = outcome(path)
    assert isinstance(found, tuple) or found.startswith(f"{path}: ")


@settings(max_examples=200)
@given(st.data())
def test_a_model_cut_short_gives_less_or_an_error(tmp_path_factory, data: st.DataObject) -> None:
    path = onnx_with_external_data(tmp_path_factory.mktemp("fuzz"), "weights.bin")
    raw = path.read_bytes()
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    found = outcome(path)
    assert found in ((), ("weights.bin",)) or found.startswith(f"{path}: ")
