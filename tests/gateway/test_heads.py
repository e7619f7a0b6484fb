"""A head that is repeated byte for byte is not parsed again; nobody can tell."""

from __future__ import annotations

from tests.gateway.client import body, get, infer, post
from tests.gateway.harness import Gateway, Replica, arm


def same_length(value: int) -> bytes:
    """Requests for values of two digits have equal heads and lengths."""
    assert 10 <= value < 100
    return infer("m", value)


def test_repeated_heads_carry_different_bodies(served: Gateway) -> None:
    with served.connect() as client:
        for value in range(10, 60):
            assert client.ask(same_length(value)).values == [2 * value, 2 * value]


def test_ids_stay_different_under_repeated_heads(served: Gateway) -> None:
    with served.connect() as client:
        ids = [client.ask(same_length(v)).headers["x-request-id"] for v in range(10, 40)]
    assert len(set(ids)) == 30


def test_a_repeated_head_with_half_a_body_waits_for_the_rest(served: Gateway) -> None:
    with served.connect() as client:
        client.ask(same_length(11))
        request = same_length(12)
        client.send(request[:-5])
        client.send(request[-5:])
        assert client.reply().values == [24, 24]
        assert client.ask(same_length(13)).values == [26, 26]


def test_a_repeated_head_with_the_next_request_behind_it(served: Gateway) -> None:
    with served.connect() as client:
        client.ask(same_length(11))
        client.send(same_length(12), same_length(13), get("/v2/health/live"))
        assert client.reply().values == [24, 24]
        assert client.reply().values == [26, 26]
        assert client.reply().json == {"live": True}


def test_a_repeated_head_while_an_answer_is_due_keeps_the_order(served: Gateway) -> None:
    with served.connect() as client:
        client.ask(same_length(11))
        for value in range(20, 40):
            client.send(same_length(value))
        for value in range(20, 40):
            assert client.reply().values == [2 * value, 2 * value]


def test_a_bad_body_under_a_repeated_head_is_refused_and_the_next_answered(
    served: Gateway,
) -> None:
    with served.connect() as client:
        good = same_length(11)
        client.ask(good)
        bad = good.replace(b"11", b"1e", 1)
        assert len(bad) == len(good)
        reply = client.ask(bad)
        assert reply.status == 400
        assert "JSON" in reply.error
        assert client.ask(same_length(12)).values == [24, 24]


def test_another_head_of_the_same_length_is_parsed(served: Gateway) -> None:
    with served.connect() as client:
        first = same_length(11)
        client.ask(first)
        other = first.replace(b"/v2/models/m/infer", b"/v2/models/n/infer", 1)
        assert client.ask(other).status == 404
        assert client.ask(first).values == [22, 22]


def test_a_known_head_whose_model_left_is_404(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica]))
    with gateway.connect() as client:
        assert client.ask(same_length(11)).status == 200
        gateway.publish()
        assert client.ask(same_length(12)).status == 404


def test_headers_still_count_under_a_repeated_head(served: Gateway) -> None:
    late = infer("m", 11, headers=["x-request-timeout-ms: nonsense"])
    with served.connect() as client:
        for _ in range(3):
            reply = client.ask(late)
            assert reply.status == 400
            assert "x-request-timeout-ms" in reply.error


def test_a_bad_request_id_stays_bad_under_a_repeated_head(served: Gateway) -> None:
    bad = infer("m", 11, headers=["X-Request-Id: caf\xe9"])
    with served.connect() as client:
        for _ in range(3):
            reply = client.ask(bad)
            assert reply.status == 400
            assert reply.headers["x-request-id"] != "caf\xe9"


def test_bytes_between_requests_are_not_taken_for_a_body(served: Gateway) -> None:
    """A blank line behind a body is none of it, even where the body begins with one."""
    data = b"\r\n" + body(11)
    with served.connect() as client:
        assert client.ask(post("/v2/models/m/infer", data) + b"\r\n").values == [22, 22]
        client.send(post("/v2/models/m/infer", b"\r\n" + body(12)) + get("/v2/health/live")[:2])
        assert client.reply().values == [24, 24]
        assert client.ask(get("/v2/health/live")[2:]).json == {"live": True}


def test_blank_lines_before_a_repeated_head(served: Gateway) -> None:
    request = same_length(11)
    with served.connect() as client:
        for _ in range(3):
            assert client.ask(b"\r\n" + request).values == [22, 22]
            client.send(b"\r\n")
            assert client.ask(request).values == [22, 22]


def test_a_request_that_is_late_when_it_could_be_sent_is_not_sent(
    gateway: Gateway, replica: Replica
) -> None:
    gateway.publish(arm("m", [replica]))
    with gateway.connect() as client:
        assert client.ask(infer("m", 1)).values == [2, 2]
        reply = client.ask(infer("m", 7, headers=["x-request-timeout-ms: 0.0001"]))
        assert reply.status == 504
        assert client.ask(infer("m", 2)).values == [4, 4]
    assert 7 not in replica.backend.seen
