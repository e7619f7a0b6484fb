"""Which outputs are asked for, in what form, and the bodies that carry them."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from serving.core.inference import EncodedResponse, OutputTensor
from serving.core.tensors import pack_bytes
from serving.core.types import Batch
from serving.errors import InvalidRequest, ModelFailed, Unsupported
from tests.core.protocol_cases import body, codec, elements, tensor

INPUTS = [("x", "FP32", (-1, 1))]
OUTPUTS = [("p", "FP32", (-1, 3)), ("label", "BYTES", (-1, 1)), ("n", "INT64", (-1,))]
GOOD = tensor("x", "FP32", [1, 1], [1])
P = np.array([0.1, -2.5, 3e38], "<f4")


def answers(rows: int = 1) -> list[OutputTensor]:
    return [
        OutputTensor(0, (rows, 3), memoryview(np.tile(P, rows).tobytes())),
        OutputTensor(1, (rows, 1), memoryview(pack_bytes(["é✓".encode()] * rows))),
        OutputTensor(2, (rows,), memoryview(np.arange(rows, dtype="<i8").tobytes())),
    ]


def ask(raw: bytes, outputs: list[OutputTensor] | None = None, json_length=None) -> EncodedResponse:
    taken = codec(INPUTS, OUTPUTS)
    return taken.encode(taken.decode(raw, json_length), outputs or answers())


def parse(response: EncodedResponse) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON of a response, and its binary tensors cut out by binary_data_size."""
    parts = [response.body] if isinstance(response.body, bytes) else response.body
    whole = b"".join(parts)
    assert len(whole) == response.nbytes
    length = len(whole) if response.json_length is None else response.json_length
    message, tail, cut = orjson.loads(whole[:length]), whole[length:], {}
    for output in message["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        assert ("data" in output) == (size is None)
        if size is not None:
            cut[output["name"]], tail = tail[:size], tail[size:]
    assert tail == b""
    return message, cut


def refusal(raw: bytes, error=InvalidRequest) -> str:
    with pytest.raises(error) as caught:
        ask(raw)
    return str(caught.value)


def test_all_as_json_by_default():
    message, cut = parse(ask(body(GOOD)))
    assert message == {
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "p", "shape": [1, 3], "datatype": "FP32", "data": [0.1, -2.5, 3e38]},
            {"name": "label", "shape": [1, 1], "datatype": "BYTES", "data": ["é✓"]},
            {"name": "n", "shape": [1], "datatype": "INT64", "data": [0]},
        ],
    }
    assert cut == {}


@pytest.mark.parametrize("request_id", ["", "r-1", 'q"uo\\te\n', "é✓\u0000"])
def test_id_is_echoed(request_id):
    assert parse(ask(body(GOOD, id=request_id)))[0]["id"] == request_id


def test_an_empty_list_asks_for_all():
    assert len(parse(ask(body(GOOD, outputs=[])))[0]["outputs"]) == 3


def test_requested_outputs_come_in_the_order_asked_for():
    raw = body(GOOD, outputs=[{"name": "n"}, {"name": "p", "parameters": {"mine": 1}}])
    message, _ = parse(ask(raw))
    assert [o["name"] for o in message["outputs"]] == ["n", "p"]


def test_binary_per_output_and_for_all():
    some = body(GOOD, id="7", outputs=[{"name": "p", "parameters": {"binary_data": True}}])
    message, cut = parse(ask(some))
    assert (message["id"], cut) == ("7", {"p": P.tobytes()})

    _, cut = parse(ask(body(GOOD, parameters={"binary_data_output": True})))
    assert set(cut) == {"p", "label", "n"}
    assert elements(cut["label"]) == ["é✓".encode()]

    outputs = [{"name": "p"}, {"name": "n", "parameters": {"binary_data": False}}]
    message, cut = parse(ask(body(GOOD, parameters={"binary_data_output": True}, outputs=outputs)))
    assert set(cut) == {"p"}
    assert message["outputs"][1]["data"] == [0]


def test_binary_outputs_are_not_copied():
    outputs = answers()
    response = ask(body(GOOD, parameters={"binary_data_output": True}), outputs)
    assert [part is o.data for part, o in zip(response.body[1:], outputs, strict=True)] == [
        True
    ] * 3


def test_a_raw_body_is_answered_in_binary():
    _, cut = parse(ask(b"\0\0\0\0", json_length=0))
    assert cut["p"] == P.tobytes()


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ("p", 'outputs must be a list, found "p"'),
        ({"name": "p"}, "outputs must be a list, found an object"),
        (["p"], 'outputs must hold objects, found "p"'),
        ([{}], "no output null; it has p, label, n"),
        ([{"name": "q"}], 'no output "q"; it has p, label, n'),
        ([{"name": ["p"]}], "no output a list of 1"),
        ([{"name": "p"}, {"name": "p"}], "output 'p' is requested more than once"),
        ([{"name": "p", "binary_data": True}], "output 'p' has an unknown member \"binary_data\""),
        ([{"name": "p", "parameters": 1}], "output 'p': parameters must be an object"),
        ([{"name": "p", "parameters": {"binary_data": 1}}], "is 1; it takes true and false"),
        ([{"name": "p", "parameters": {"classification": -1}}], "it takes integers from 0"),
        ([{"name": "p", "parameters": {"classification": "2"}}], "it takes integers from 0"),
        ([{"name": "label", "parameters": {"classification": 1}}], "classification cannot rank"),
        ([{"name": "p"}] * 65, "outputs has 65 items, 64 are allowed"),
    ],
)
def test_malformed_outputs(outputs, says):
    assert says in refusal(body(GOOD, outputs=outputs))


def test_shared_memory_outputs_are_not_supported():
    asked = [{"name": "p", "parameters": {"shared_memory_region": "r"}}]
    assert "not supported" in refusal(body(GOOD, outputs=asked), Unsupported)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_outputs_are_refused_in_json_before_the_model_runs(datatype):
    taken = codec(INPUTS, [("p", datatype, (-1, 1)), ("n", "INT8", (-1,))])
    for raw in (body(GOOD), body(GOOD, id="1"), body(GOOD, outputs=[{"name": "p"}])):
        with pytest.raises(InvalidRequest, match="has no JSON form; request it with binary_data"):
            taken.decode(raw, None)
    assert taken.decode(body(GOOD, outputs=[{"name": "n"}]), None).outputs is not None
    request = taken.decode(body(GOOD, parameters={"binary_data_output": True}), None)
    outputs = [OutputTensor(0, (1, 1), b"\x00\x3c"), OutputTensor(1, (1,), b"\x01")]
    assert parse(taken.encode(request, outputs))[1] == {"p": b"\x00\x3c", "n": b"\x01"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_nan_and_infinity_are_refused_in_json_and_kept_in_binary(value, datatype):
    taken = codec(INPUTS, [("p", datatype, (-1, 2))])
    data = np.array([1, value], "<f4" if datatype == "FP32" else "<f8").tobytes()
    outputs = [OutputTensor(0, (1, 2), data)]
    with pytest.raises(InvalidRequest, match=r"'p' holds NaN or infinity.*request it with binary"):
        taken.encode(taken.decode(body(GOOD), None), outputs)
    asked = body(GOOD, parameters={"binary_data_output": True})
    assert parse(taken.encode(taken.decode(asked, None), outputs))[1]["p"] == data


def test_bytes_that_are_not_utf8_are_refused_in_json():
    outputs = answers()
    outputs[1].data = pack_bytes([b"\xff\xfe"])
    with pytest.raises(
        InvalidRequest, match=r"'label' holds bytes that are not UTF-8.*binary_data"
    ):
        ask(body(GOOD), outputs)


def test_bools_and_empty_tensors():
    taken = codec(
        INPUTS, [("b", "BOOL", (-1, 2)), ("e", "FP32", (-1, -1)), ("s", "BYTES", (-1, -1))]
    )
    outputs = [
        OutputTensor(0, (1, 2), b"\x01\x00"),
        OutputTensor(1, (1, 0), b""),
        OutputTensor(2, (1, 0), b""),
    ]
    message, _ = parse(taken.encode(taken.decode(body(GOOD), None), outputs))
    assert [o["data"] for o in message["outputs"]] == [[True, False], [], []]


@pytest.mark.parametrize(
    ("index", "shape", "data", "says"),
    [
        (0, (1, 4), bytes(16), r"output 'p' has shape \[1, 4\], .* signature says \[-1, 3\]"),
        (0, (3,), bytes(12), r"output 'p' has shape \[3\]"),
        (0, (1, 3), bytes(11), r"output 'p' has 11 bytes, its shape \[1, 3\] of FP32 needs 12"),
        (0, (2, 3), bytes(24), "output 'p' has 2 rows for a request of 1"),
        (1, (1, 1), b"", "output 'label': its raw form does not hold the 1 elements"),
        (1, (1, 1), b"\x05\0\0\0ab", "output 'label': its raw form does not hold"),
        (1, (1, 1), pack_bytes([b"a", b"b"]), "output 'label': its raw form does not hold"),
    ],
)
def test_outputs_that_do_not_fit_the_signature_are_the_models_fault(index, shape, data, says):
    outputs = answers()
    outputs[index] = OutputTensor(index, shape, data)
    with pytest.raises(ModelFailed, match=says):
        ask(body(GOOD), outputs)


def test_a_missing_output_is_the_models_fault():
    for raw in (body(GOOD), body(GOOD, outputs=[{"name": "n"}])):
        with pytest.raises(ModelFailed, match="returned no output 'n'"):
            ask(raw, answers()[:2])


def test_outputs_may_come_in_any_order():
    assert parse(ask(body(GOOD), answers()[::-1])) == parse(ask(body(GOOD)))


def classes(values: np.ndarray, k: int, *, datatype="FP32", batch=Batch.DYNAMIC, binary=False):
    shape = values.shape
    spec = ("p", datatype, (-1, *shape[1:]) if batch is not Batch.NONE else shape)
    taken = codec(
        [("x", "FP32", (-1, 1) if batch is not Batch.NONE else (1,))], [spec], batch=batch
    )
    x = tensor("x", "FP32", [shape[0], 1], [0] * shape[0])
    if batch is Batch.NONE:
        x = tensor("x", "FP32", [1], [0])
    parameters = {"classification": k, "binary_data": binary}
    asked = body(x, outputs=[{"name": "p", "parameters": parameters}])
    response = taken.encode(taken.decode(asked, None), [OutputTensor(0, shape, values.tobytes())])
    message, cut = parse(response)
    (output,) = message["outputs"]
    assert output["datatype"] == "BYTES"
    return output["shape"], output.get("data"), cut.get("p")


def test_classification_of_a_batch():
    values = np.array([[0.1, 0.7, 0.2], [5, -1, 5]], "<f4")
    shape, data, _ = classes(values, 2)
    assert shape == [2, 2]
    assert data == ["0.7:1", "0.2:2", "5.0:0", "5.0:2"]


def test_classification_in_binary_and_past_the_number_of_classes():
    shape, _, cut = classes(np.array([[3, 9]], "<i4"), 10, datatype="INT32", binary=True)
    assert (shape, elements(cut)) == ([1, 2], [b"9:1", b"3:0"])


def test_classification_without_batch_dimension_ranks_the_whole_tensor():
    values = np.array([[1, 2], [4, 3]], "<u1")
    shape, data, _ = classes(values, 3, datatype="UINT8", batch=Batch.NONE)
    assert (shape, data) == ([3], ["4:2", "3:3", "2:1"])


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_classification_gives_half_precision_a_json_form(datatype):
    values = np.array([[1.5, -2.0]], "<f2")
    if datatype == "BF16":
        values = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    assert classes(values, 1, datatype=datatype)[1] == ["1.5:0"]


def test_classification_of_an_empty_row_and_of_nan():
    assert classes(np.empty((2, 0), "<f4"), 3) == ([2, 0], [], None)
    with pytest.raises(InvalidRequest, match="'p' holds NaN, which classification cannot rank"):
        classes(np.array([[1, np.nan]], "<f4"), 1)


def test_classification_zero_is_off():
    raw = body(GOOD, outputs=[{"name": "p", "parameters": {"classification": 0}}])
    assert parse(ask(raw))[0]["outputs"][0]["datatype"] == "FP32"


def test_unknown_sizes_of_batches_do_not_pile_up():
    taken = codec(INPUTS, [("p", "UINT8", (-1, -1))])
    request = taken.decode(body(GOOD), None)
    for width in list(range(600)) * 2:
        response = taken.encode(request, [OutputTensor(0, (1, width), bytes(width))])
        assert parse(response)[0]["outputs"][0]["shape"] == [1, width]
