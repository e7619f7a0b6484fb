"""Bodies that the `tritonclient` package writes are taken, and it reads the answers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from serving.core.inference import OutputTensor
from serving.core.tensors import pack_bytes
from tests.core.protocol_cases import codec

with warnings.catch_warnings():
    # Its own imports warn of what they will drop.
    warnings.simplefilter("ignore")
    from tritonclient import http

SPECS = [("a", "FP32", (-1, 3)), ("s", "BYTES", (-1, 2))]
A = np.array([[1.5, -2, 3e38], [0.1, 0, 1]], "<f4")
S = np.array([[b"x", "é".encode()], [b"", b"long one"]], object)


@pytest.mark.parametrize("sent_binary", [True, False])
@pytest.mark.parametrize("asked", [None, "binary", "json"])
def test_there_and_back(sent_binary, asked):
    a, s = http.InferInput("a", [2, 3], "FP32"), http.InferInput("s", [2, 2], "BYTES")
    a.set_data_from_numpy(A, binary_data=sent_binary)
    s.set_data_from_numpy(S, binary_data=sent_binary)
    outputs = asked and [
        http.InferRequestedOutput(name, binary_data=asked == "binary") for name in ("s", "a")
    ]
    raw, length = http.InferenceServerClient.generate_request_body(
        [a, s], outputs=outputs, request_id="7", priority=1, timeout=100
    )
    taken = codec(SPECS, SPECS)
    request = taken.decode(raw, length)
    assert bytes(request.inputs[0]) == A.tobytes()
    assert bytes(request.inputs[1]) == pack_bytes(S.ravel().tolist())
    assert (request.id, request.priority, request.timeout_us) == ("7", 1, 100)

    answer = [OutputTensor(i, request.shapes[i], request.inputs[i]) for i in (0, 1)]
    response = taken.encode(request, answer)
    whole = response.body if isinstance(response.body, bytes) else b"".join(response.body)
    assert (response.json_length is None) == (asked == "json")
    result = http.InferenceServerClient.parse_response_body(
        whole, header_length=response.json_length
    )
    np.testing.assert_array_equal(result.as_numpy("a"), A)
    found = [v if isinstance(v, bytes) else v.encode() for v in result.as_numpy("s").ravel()]
    assert found == S.ravel().tolist()
    assert result.get_response()["id"] == "7"


def test_classification():
    a = http.InferInput("a", [2, 3], "FP32")
    a.set_data_from_numpy(A)
    raw, length = http.InferenceServerClient.generate_request_body(
        [a], outputs=[http.InferRequestedOutput("a", class_count=2)]
    )
    taken = codec(SPECS[:1], SPECS[:1])
    request = taken.decode(raw, length)
    response = taken.encode(request, [OutputTensor(0, (2, 3), A.tobytes())])
    result = http.InferenceServerClient.parse_response_body(
        b"".join(response.body), header_length=response.json_length
    )
    assert result.as_numpy("a").tolist() == [[b"3e+38:2", b"1.5:0"], [b"1.0:2", b"0.1:0"]]
