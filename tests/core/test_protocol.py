"""What a JSON request must be, rule by rule, and what is said when it is not."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from serving.core.inference import Limits
from serving.core.protocol import encode_error, parse_json_length
from serving.core.types import Batch
from serving.errors import InvalidRequest, ServingError, Unsupported
from tests.core.protocol_cases import assert_fits, body, codec, signature, tensor

X = ("x", "FP32", (-1, 4))
PAIR = [("a", "INT32", (-1, 2)), ("b", "INT32", (-1, 2))]
GOOD = tensor("x", "FP32", [1, 4], [1, 2.5, -3, 0])


def refusal(raw: bytes, *, taken=None, json_length=None, error=InvalidRequest) -> str:
    """Decode, expect a refusal, return what it says."""
    with pytest.raises(ServingError) as caught:
        (taken or codec([X])).decode(raw, json_length)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plain_request():
    request = codec([X]).decode(body(GOOD), None)
    assert request.id is None
    assert (request.rows, request.shapes) == (1, ((1, 4),))
    assert bytes(request.inputs[0]) == np.array([1, 2.5, -3, 0], "<f4").tobytes()
    assert (request.priority, request.timeout_us, request.outputs) == (0, 0, None)
    assert dict(request.parameters) == {}


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("with_header", [False, True])
def test_any_buffer_and_a_header_that_covers_all(form, with_header):
    raw = body(GOOD)
    request = codec([X]).decode(form(raw), len(raw) if with_header else None)
    assert_fits(request, signature([X]))


def test_a_bool_among_numbers_is_found_in_every_buffer():
    raw = body(tensor("x", "FP32", [1, 4], [1, 2, True, 4]))
    for form in (bytes, bytearray, memoryview):
        assert "element 2 is true" in refusal(form(raw))


def test_inputs_in_any_order_come_out_in_the_signatures():
    taken = codec(PAIR)
    raw = body(tensor("b", "INT32", [1, 2], [3, 4]), tensor("a", "INT32", [1, 2], [1, 2]))
    request = taken.decode(raw, None)
    assert [np.frombuffer(i, "<i4").tolist() for i in request.inputs] == [[1, 2], [3, 4]]


def test_envelope_is_read():
    parameters = {"priority": 2, "timeout": 1500, "mine": {"a": [1]}, "sequence_id": 0}
    raw = body(GOOD, id="r-1", parameters=parameters, model_name="other", model_version="9")
    request = codec([X]).decode(raw, None)
    assert (request.id, request.priority, request.timeout_us) == ("r-1", 2, 1500)
    assert request.parameters["mine"] == {"a": [1]}


def test_null_stands_for_an_absent_optional_member():
    raw = body({**GOOD, "parameters": None}, id=None, parameters=None, outputs=None)
    request = codec([X]).decode(raw, None)
    assert (request.id, request.outputs, dict(request.parameters)) == (None, None, {})


def test_an_empty_id_is_echoed_as_it_came():
    assert codec([X]).decode(body(GOOD, id=""), None).id == ""


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "no body"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"null", "must be a JSON object, found null"),
        (b"[]", "must be a JSON object, found a list of 0"),
        (b'"x"', 'must be a JSON object, found "x"'),
        (b"{}", "list of inputs, found none"),
        (b'{"input":[]}', "list of inputs, found none"),
        (b'{"inputs":null}', "list of inputs, found none"),
        (b'{"inputs":{}}', "list of inputs, found an object"),
        (b'{"inputs":[]}', "has 0 inputs, the model takes 1: x"),
        (b'{"inputs":[1]}', "must hold objects, found 1"),
        (b'{"inputs":[{}]}', "no input null; it takes x"),
        (body(GOOD, GOOD), "has 2 inputs, the model takes 1: x"),
        (body(tensor("y", "FP32", [1, 4], [1] * 4)), 'no input "y"; it takes x'),
        (body(tensor(["x"], "FP32", [1, 4], [1] * 4)), "no input a list of 1"),
        (body(tensor("x", "FP64", [1, 4], [1] * 4)), 'datatype "FP64", expected FP32'),
        (body(tensor("x", "fp32", [1, 4], [1] * 4)), 'datatype "fp32", expected FP32'),
        (body(tensor("x", None, [1, 4], [1] * 4)), "datatype null, expected FP32"),
        (body({**GOOD, "dataa": 1}), "input 'x' has an unknown member \"dataa\""),
        (body({**GOOD, "parameters": 3}), "parameters must be an object, found 3"),
        (body(tensor("x", "FP32", [1, 4])), "either data or a binary_data_size, found neither"),
        (body({**GOOD, "parameters": {"binary_data_size": 16}}), "found both"),
        (body(GOOD, ouputs=[]), 'the request has an unknown member "ouputs"'),
        (body(GOOD, id=7), "id must be a string, found 7"),
        (body(GOOD, model_name=[]), "model_name must be a string, found a list of 0"),
        (body(GOOD, parameters=[1]), "parameters must be an object, found a list of 1"),
        (body(GOOD, parameters={"priority": -1}), "'priority' is -1; it takes integers from 0"),
        (body(GOOD, parameters={"priority": True}), "'priority' is true; it takes integers"),
        (body(GOOD, parameters={"timeout": 1.5}), "'timeout' is 1.5; it takes integers from 0"),
        (body(GOOD, parameters={"timeout": 2**53}), f"from 0 to {2**53 - 1}"),
        (body(GOOD, parameters={"timeout": "9"}), "'timeout' is \"9\"; it takes integers"),
        (body(GOOD, parameters={"binary_data_output": 1}), "is 1; it takes true and false"),
    ],
)
def test_malformed_envelope(raw, says):
    assert says in refusal(raw)


@pytest.mark.parametrize(
    "shape",
    [
        None,
        4,
        "14",
        [],
        [4],
        [1, 4, 1],
        [1, 5],
        [1, "4"],
        [True, 4],
        [1.0, 4],
        [1, 4.0],
        [1, None],
        [1, [4]],
        [1, -4],
        [1, 2**64],
        [[1] * 500] * 2,
    ],
)
def test_wrong_shape(shape):
    codec_ = codec([X])
    codec_.decode(body(GOOD), None)  # [1, 4] is known by now; what merely equals it is not
    says = refusal(body(tensor("x", "FP32", shape, [1] * 4)), taken=codec_)
    assert "input 'x' has shape " in says
    assert "expected [1..8, 4]" in says
    assert len(says) < 200


@pytest.mark.parametrize("rows", [0, -1, 9, 2**63])
def test_rows_out_of_bounds(rows):
    says = refusal(body(tensor("x", "FP32", [rows, 4], [1] * 4)))
    assert ("1 to 8" in says) or ("expected [1..8, 4]" in says)


def test_rows_of_a_frozen_graph_are_bounded_by_it():
    taken = codec([X], batch=Batch.FIXED, fixed_rows=2)
    assert taken.decode(body(tensor("x", "FP32", [2, 4], [1] * 8)), None).rows == 2
    says = refusal(body(tensor("x", "FP32", [3, 4], [1] * 12)), taken=taken)
    assert "has 3 rows; a request may have 1 to 2" in says


def test_inputs_must_agree_on_rows_and_be_given_once():
    a, b = tensor("a", "INT32", [1, 2], [1, 2]), tensor("b", "INT32", [2, 2], [1, 2, 3, 4])
    assert "input 'b' has 2 rows, input 'a' has 1" in refusal(body(a, b), taken=codec(PAIR))
    assert "input 'a' is given more than once" in refusal(body(a, a), taken=codec(PAIR))
    assert "has 1 inputs, the model takes 2: a, b" in refusal(body(a), taken=codec(PAIR))


@pytest.mark.parametrize(
    ("datatype", "value", "allowed"),
    [
        ("BOOL", 1, "BOOL takes true and false"),
        ("BOOL", "true", "BOOL takes true and false"),
        ("UINT8", 256, "integers from 0 to 255"),
        ("UINT8", -1, "integers from 0 to 255"),
        ("INT8", 128, "integers from -128 to 127"),
        ("INT16", -32769, "integers from -32768 to 32767"),
        ("UINT16", 65536, "integers from 0 to 65535"),
        ("INT32", 2**31, "integers from -2147483648"),
        ("UINT32", 2**32, "integers from 0 to 4294967295"),
        ("INT64", 2**63, "integers from -9223372036854775808"),
        ("UINT64", -1, "integers from 0 to 18446744073709551615"),
        ("INT32", 1.0, "INT32 takes integers"),
        ("INT32", True, "INT32 takes integers"),
        ("INT32", "1", "INT32 takes integers"),
        ("INT32", None, "INT32 takes integers"),
        ("FP32", 1e300, "FP32 takes numbers from -3.4028234"),
        ("FP32", -3.5e38, "FP32 takes numbers from -3.4028234"),
        ("FP32", False, "FP32 takes numbers"),
        ("FP32", "1", "FP32 takes numbers"),
        ("FP64", None, "FP64 takes numbers"),
        ("FP64", [1], "FP64 takes numbers"),
        ("FP64", {"a": 1}, "element 1 is an object; FP64 takes numbers"),
        ("BYTES", 1, "BYTES takes strings"),
        ("BYTES", None, "BYTES takes strings"),
        ("BYTES", ["x"], "BYTES takes strings"),
    ],
)
def test_wrong_element(datatype, value, allowed):
    good = {"BOOL": True, "BYTES": "s"}.get(datatype, 1)
    taken = codec([("x", datatype, (-1, 3))])
    says = refusal(body(tensor("x", datatype, [1, 3], [good, value, good])), taken=taken)
    assert "input 'x': element 1 is " in says
    assert allowed in says


@pytest.mark.parametrize("datatype", ["INT8", "FP32", "BOOL", "BYTES"])
@pytest.mark.parametrize("at", [0, 1, 500, 998, 999])
def test_the_first_wrong_element_of_many_is_named(datatype, at):
    good = {"BOOL": True, "BYTES": "s"}.get(datatype, 1)
    data = [good] * at + [None] + [good, None, {}, [1]] * 250
    taken = codec([("x", datatype, (-1, 1000))])
    says = refusal(body(tensor("x", datatype, [1, 1000], data[:1000])), taken=taken)
    assert f"input 'x': element {at} is null; " in says


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e400", "01", "+1", "nan"])
def test_tokens_that_are_not_json_numbers(token):
    raw = body(tensor("x", "FP32", [1, 4], ["@", 1, 1, 1])).replace(b'"@"', token.encode())
    assert "not valid JSON" in refusal(raw)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_integers_past_64_bits_do_not_wrap(value):
    raw = body(tensor("x", "INT64", [1, 1], ["@"])).replace(b'"@"', str(value).encode())
    assert "INT64 takes integers" in refusal(raw, taken=codec([("x", "INT64", (-1, 1))]))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_json_form(datatype):
    taken = codec([("x", datatype, (-1, 1))])
    says = refusal(body(tensor("x", datatype, [1, 1], [1.0])), taken=taken)
    assert f"datatype {datatype}, which has no JSON form; send it as binary data" in says


@pytest.mark.parametrize(
    "data",
    [
        [[1, 2], [3, 4], [5, 6]],
        [[[1, 2], [3, 4], [5, 6]]],
        [[[1], [2], [3]], [[4], [5], [6]]],
        [[1, 2, 3], [4, 5, 6]],
        [[[1, 2, 3], [4, 5, 6]], [[]]],
        [[[1, 2, 3]], "abc"],
        [[[1, 2, 3]], 7],
    ],
)
def test_nesting_must_agree_with_the_shape(data):
    taken = codec([("x", "INT8", (-1, 1, 3))])
    raw = body(tensor("x", "INT8", [2, 1, 3], data))
    says = refusal(raw, taken=taken)
    assert "the nesting of its data does not agree with its shape [2, 1, 3]" in says


@pytest.mark.parametrize("data", [[[[1, 2, 3]], [[4, 5, 6]]], [1, 2, 3, 4, 5, 6]])
def test_nested_and_flat_data_are_row_major(data):
    taken = codec([("x", "INT8", (-1, 1, 3))])
    request = taken.decode(body(tensor("x", "INT8", [2, 1, 3], data)), None)
    assert bytes(request.inputs[0]) == bytes(range(1, 7))


def test_nested_one_dimension_too_deep():
    says = refusal(body(tensor("x", "INT8", [2], [[1], [2]])), taken=codec([("x", "INT8", (-1,))]))
    assert "nesting" in says


def test_element_count_must_agree_with_the_shape():
    assert "has 3 elements of data, its shape [1, 4] needs 4" in refusal(
        body(tensor("x", "FP32", [1, 4], [1, 2, 3]))
    )
    assert "has 0 elements of data" in refusal(body(tensor("x", "FP32", [1, 4], [])))
    assert "data must be a list, found an object" in refusal(
        body(tensor("x", "FP32", [1, 4], {"0": 1}))
    )


@pytest.mark.parametrize(
    "shape", [[1, 2**40], [1, 1 << 21], [1, (1 << 64) - 1], [1, 1024, 1025], [1, 0, 2**62]]
)
def test_huge_shapes(shape):
    taken = codec([("x", "FP32", (-1,) * len(shape))])
    says = refusal(body(tensor("x", "FP32", shape, [1])), taken=taken)
    assert f"at most {1 << 20} elements are allowed" in says


def test_an_empty_variable_dimension_is_an_empty_tensor():
    taken = codec([("x", "FP32", (-1, -1, 4))])
    request = taken.decode(body(tensor("x", "FP32", [1, 0, 4], [])), None)
    assert (bytes(request.inputs[0]), request.shapes) == (b"", ((1, 0, 4),))
    nested = taken.decode(body(tensor("x", "FP32", [2, 0, 4], [[], []])), None)
    assert nested.shapes == ((2, 0, 4),)
    for wrong in ([[]], [[], [], []], [[[]], []]):
        assert "nesting" in refusal(body(tensor("x", "FP32", [2, 0, 4], wrong)), taken=taken)


def test_scalar_of_a_model_without_batch_dimension():
    taken = codec([("x", "FP64", ())], batch=Batch.NONE)
    request = taken.decode(body(tensor("x", "FP64", [], [2.5])), None)
    assert (bytes(request.inputs[0]), request.rows) == (np.float64(2.5).tobytes(), 1)
    assert "nesting" in refusal(body(tensor("x", "FP64", [], [[2.5]])), taken=taken)


@pytest.mark.parametrize(
    "key", ["sequence_id", "sequence_start", "shared_memory_region", "triton_enable_x"]
)
def test_reserved_parameters_that_ask_for_something_are_not_ignored(key):
    says = refusal(body(GOOD, parameters={key: 1}), error=Unsupported)
    assert f'parameter "{key}" is not supported' in says
    says = refusal(body({**GOOD, "parameters": {key: "r"}}), error=Unsupported)
    assert says.startswith("input 'x': parameter")


@pytest.mark.parametrize("opener", [b"[", b'{"a":'])
@pytest.mark.parametrize("where", ["%s", '{"inputs":%s', '{"inputs":[],"parameters":%s'])
def test_depth_bombs_are_refused_before_they_are_built(opener, where):
    raw = (where % "@").encode().replace(b"@", opener * 40_000)
    assert "not valid JSON" in refusal(raw)


@pytest.mark.parametrize("piece", [b"[]", b"{}", b"0", b'{"a":[]}'])
@pytest.mark.parametrize("where", ["data", "parameters"])
def test_volume_bombs_are_refused_before_they_are_built(piece, where):
    bomb = b"[" + b",".join([piece] * 500_000) + b"]"
    whole = {**GOOD, "data": "@"} if where == "data" else {**GOOD, "parameters": {"k": "@"}}
    says = refusal(body(whole).replace(b'"@"', bomb))
    assert "JSON values in" in says
    assert "its inputs need at most" in says


@pytest.mark.parametrize(
    "dims", [(-1, 40_000), (-1, 1, 2, 20_000), (-1, 20_000, 2, 1), (-1, -1, 40_000), (-1, -1)]
)
def test_the_largest_request_passes_the_volume_check(dims):
    shape = [8, *(1 if d < 0 else d for d in dims[1:-1]), 40_000 if dims[-1] < 0 else dims[-1]]
    data = np.zeros(shape, np.uint8).tolist()
    raw = body(tensor("x", "UINT8", shape, data))
    assert codec([("x", "UINT8", dims)]).decode(raw, None).rows == 8


def test_strings_may_hold_what_the_volume_check_counts():
    text = ",[{" * 200_000
    raw = body(tensor("x", "BYTES", [1, 1], [text]))
    request = codec([("x", "BYTES", (-1, 1))]).decode(raw, None)
    assert bytes(request.inputs[0])[4:] == text.encode()


@pytest.mark.parametrize("levels", [30, 500])
def test_depth_is_bounded_wherever_nesting_can_be(levels):
    deep: object = 1
    for _ in range(levels):
        deep = [deep]
    for raw in (
        body(GOOD, parameters={"a": {"b": deep}}),
        body({**GOOD, "parameters": {"a": deep}}),
        body(GOOD, outputs=[{"name": "p", "parameters": {"a": deep}}]),
    ):
        assert "nested too deep" in refusal(raw)
    for raw in (
        body(tensor("x", "FP32", deep, [1] * 4)),
        body(tensor("x", "FP32", [1, 4], deep)),
        body(tensor("x", "FP32", [1, 4], [1, 1, 1, deep])),
        body(deep),
        body(GOOD, id=deep),
        body(GOOD, outputs=deep),
        body(GOOD, parameters=deep),
    ):
        assert len(refusal(raw)) < 200


def test_depth_up_to_the_limit_is_allowed():
    limits = Limits(max_json_depth=5)
    two, three = codec([X], limits=limits), codec([("x", "FP32", (-1, 2, 2))], limits=limits)
    assert two.decode(body(tensor("x", "FP32", [1, 4], [[1] * 4])), None).rows == 1
    assert two.decode(body(GOOD, parameters={"a": [[["x"]]]}), None).rows == 1
    assert "nested too deep" in refusal(body(GOOD, parameters={"a": [[[[]]]]}), taken=two)
    assert "nested 2 deep" in refusal(
        body(tensor("x", "FP32", [1, 2, 2], [[[1, 2], [3, 4]]])), taken=three
    )
    assert three.decode(body(tensor("x", "FP32", [1, 2, 2], [1, 2, 3, 4])), None).rows == 1


def test_messages_stay_short_whatever_is_sent():
    for raw in (
        body(tensor("y" * 10_000, "FP32", [1, 4], [1] * 4)),
        body(tensor("x", "F" * 10_000, [1, 4], [1] * 4)),
        body(tensor("x", "FP32", list(range(10_000)), [1] * 4)),
        body(tensor("x", "FP32", [1, 4], ["z" * 10_000, 1, 1, 1])),
        body(GOOD, **{"k" * 10_000: 1}),
        body(GOOD, parameters={"sequence_" + "k" * 10_000: 0, "priority": "p" * 10_000}),
    ):
        assert len(refusal(raw)) < 250


def test_keys_tell_which_requests_may_be_joined():
    fixed, variable = codec([X]), codec([("x", "FP32", (-1, -1)), ("y", "FP32", (-1, 2))])

    def key(width: int, rows: int):
        x, y = [rows, width], [rows, 2]
        raw = body(
            tensor("x", "FP32", x, [1] * (rows * width)), tensor("y", "FP32", y, [1] * (rows * 2))
        )
        return variable.decode(raw, None).key

    two_rows = fixed.decode(body(tensor("x", "FP32", [2, 4], [1] * 8)), None)
    assert fixed.decode(body(GOOD), None).key == two_rows.key
    assert key(3, 1) == key(3, 2)
    assert key(3, 1) != key(4, 1)


def test_many_shapes_do_not_pile_up():
    taken = codec([("x", "UINT8", (-1, -1))])
    for width in list(range(600)) * 2:
        request = taken.decode(body(tensor("x", "UINT8", [1, width], [7] * width)), None)
        assert bytes(request.inputs[0]) == b"\x07" * width


@pytest.mark.parametrize("value", [b"0", b"7", b"007", b"123456"])
def test_json_length_header(value):
    assert parse_json_length(value) == int(value)
    assert parse_json_length(None) is None


@pytest.mark.parametrize(
    "value", [b"", b"-1", b"+1", b"1.0", b"1e3", b" 1", b"0x10", b"1,1", b"\xb2", b"9" * 30]
)
def test_malformed_json_length_header(value):
    with pytest.raises(InvalidRequest, match=r"^Inference-Header-Content-Length is .* from 0$"):
        parse_json_length(value)


@pytest.mark.parametrize("message", ["plain", 'quo"ted\n', "é✓", "lone \udc80 surrogate"])
def test_error_body(message):
    text = orjson.loads(encode_error(message))["error"]
    assert text == message.replace("\udc80", "?")


def test_an_empty_binary_input_as_kserve_sends_it():
    """With data null, and without a header, as there are no bytes after the JSON."""
    empty = tensor("x", "FP32", [1, 0], parameters={"binary_data_size": 0})
    raw = body({**empty, "data": None}, id="u", model_name="m")
    assert codec([("x", "FP32", (-1, -1))]).decode(raw, None).shapes == ((1, 0),)
