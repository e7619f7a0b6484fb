"""Asking and telling on threads: intervals, rows of failures, retries, and never a blocked loop."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest

from serving.control.notices import Notice
from serving.control.providers import HOOK_INTERVAL_S, Providers
from serving.core.rollout import decide
from serving.core.rollout_progress import due_hooks
from serving.core.rollout_spec import Gate, Step, Trigger, Webhook
from serving.core.rollout_types import Hook, ProviderState, Rollout, Snapshot, State
from tests.control.rollouts import rollout
from tests.control.web_service import Received, Reply, WebService, verdict
from tests.gateway.harness import eventually

SUCCESS = '{"status": "success", "data": {"resultType": "scalar", "result": [0, "%s"]}}'


@pytest.fixture
def providers() -> Iterator[Providers]:
    running = Providers(lambda: 7, retry_after_s=(0.0, 0.0))
    yield running
    running.close(0)


def number(value: float) -> Callable[[Received], Reply]:
    return lambda _: Reply(body=(SUCCESS % value).encode())


def query(service: WebService, **settings: object) -> Trigger:
    defaults = {"query": "up", "url": service.url, "threshold": 1.0, "interval_s": 15.0}
    return Trigger("alert", "promql", **{**defaults, **settings})  # type: ignore[arg-type]


def answered(
    providers: Providers, asking: Rollout, at: float, hooks: tuple[Hook, ...] = ()
) -> Mapping[str, ProviderState]:
    """The answers once all of those asked at `at` are there."""

    def all_there() -> Mapping[str, ProviderState] | None:
        states = providers.poll(asking, at, hooks)
        return states if all(state.at == at for state in states.values()) else None

    return eventually(all_there, f"answers of {at}") or {}


def test_not_answered_yet_is_unknown_without_errors(
    service: WebService, providers: Providers
) -> None:
    service.answer = service.silence
    states = providers.poll(rollout(query(service)), 1000.0)
    assert states == {"alert": ProviderState("unknown", message="asked, no answer yet")}


def test_rows_of_bad_answers_and_of_none(service: WebService, providers: Providers) -> None:
    asking = rollout(query(service))
    replies = [number(2), number(2), lambda _: Reply(503), lambda _: Reply(503), number(2)]
    seen = []
    for i, reply in enumerate([*replies, number(0)]):
        service.answer = reply
        state = answered(providers, asking, 1000.0 + 15 * i)["alert"]
        seen.append((state.outcome, state.fails, state.errors, state.value))
    assert seen == [
        ("fail", 1, 0, 2.0),
        ("fail", 2, 0, 2.0),
        ("unknown", 0, 1, None),
        ("unknown", 0, 2, None),
        ("fail", 1, 0, 2.0),
        ("ok", 0, 0, 0.0),
    ]


def test_asked_by_interval(service: WebService, providers: Providers) -> None:
    service.answer = number(0)
    asking = rollout(query(service))
    first = answered(providers, asking, 1000.0)
    for now in (1001.0, 1014.9):
        assert providers.poll(asking, now) == first
    assert service.received.qsize() == 1
    assert answered(providers, asking, 1015.0)["alert"].at == 1015.0
    assert service.received.qsize() == 2


def test_a_clock_that_is_set_back_silences_nobody(
    service: WebService, providers: Providers
) -> None:
    service.answer = number(0)
    asking = rollout(query(service))
    answered(providers, asking, 1000.0)
    assert answered(providers, asking, 500.0)["alert"].at == 500.0


def test_one_question_at_a_time_and_an_old_answer_is_no_answer(
    service: WebService, providers: Providers
) -> None:
    service.answer = number(0)
    asking = rollout(query(service, timeout_s=30.0))
    answered(providers, asking, 1000.0)
    service.answer = service.silence
    providers.poll(asking, 1015.0)
    assert providers.poll(asking, 1060.0)["alert"].outcome == "ok"
    old = providers.poll(asking, 1061.0)["alert"]
    assert (old.outcome, old.message) == ("unknown", "no answer for 61 s")
    service.next()
    assert service.next().path.startswith("/api/v1/query")
    assert service.received.empty()


@pytest.mark.parametrize(
    ("state", "resume_to", "asks"),
    [
        (State.PENDING, None, False),
        (State.PREPARING, None, False),
        (State.SHADOWING, None, True),
        (State.AWAITING_GATE, None, True),
        (State.PAUSED, State.OBSERVING, True),
        (State.PAUSED, State.PREPARING, False),
        (State.BAKING, None, True),
        (State.ROLLING_BACK, None, False),
        (State.SUCCEEDED, None, False),
    ],
)
def test_triggers_are_asked_while_the_canary_has_traffic(
    service: WebService,
    providers: Providers,
    state: State,
    resume_to: State | None,
    asks: bool,
) -> None:
    asking = rollout(query(service), state=state, resume_to=resume_to)
    assert (set(providers.poll(asking, 1000.0)) == {"alert"}) == asks


def test_a_webhook_as_a_trigger(service: WebService, providers: Providers) -> None:
    service.answer = lambda _: verdict("fail", message="too slow")
    asking = rollout(Trigger("load-test", "webhook", url=service.url))
    state = answered(providers, asking, 1000.0)["load-test"]
    assert (state.outcome, state.fails) == ("fail", 1)
    assert state.message == f"{service.url} says fail: too slow"
    sent = service.next().document
    assert (sent["event"], sent["subject"], sent["revision"]) == ("trigger", "load-test", 7)


def test_a_gate_is_asked_again_until_it_is_no_longer_due(
    service: WebService, providers: Providers
) -> None:
    gate = (Hook("gate:0", service.url, 10.0),)
    waiting = rollout(state=State.AWAITING_GATE)
    service.answer = lambda _: verdict("unknown")
    assert answered(providers, waiting, 1000.0, gate)["gate:0"].outcome == "unknown"
    service.answer = lambda _: verdict("ok")
    later = 1000.0 + HOOK_INTERVAL_S
    assert answered(providers, waiting, later, gate)["gate:0"].outcome == "ok"
    assert service.next().document["event"] == "gate"
    service.next()
    # The core stops asking once the gate is passed, and still has to know that it was.
    assert providers.poll(waiting, later + 3600)["gate:0"].outcome == "ok"
    assert service.received.empty()
    assert providers.poll(replace(waiting, state=State.OBSERVING, step=1), later + 3601) == {}


def test_triggers_keep_their_rows_from_step_to_step(
    service: WebService, providers: Providers
) -> None:
    service.answer = number(2)
    asking = rollout(query(service))
    answered(providers, asking, 1000.0)
    assert answered(providers, replace(asking, step=1), 1015.0)["alert"].fails == 2


def test_rollouts_do_not_share_answers(service: WebService, providers: Providers) -> None:
    service.answer = number(2)
    asking = rollout(query(service))
    answered(providers, asking, 1000.0)
    assert answered(providers, replace(asking, id="r-2"), 1000.0)["alert"].fails == 1


def test_nothing_that_hangs_blocks_the_caller(service: WebService, providers: Providers) -> None:
    """More rollouts than threads and queue hold, each with a trigger and a webhook that hang."""
    service.answer = service.silence
    hook = Webhook("event", service.url, timeout_s=30.0)
    asking = rollout(query(service, timeout_s=30.0), webhooks=(hook,))
    started = time.monotonic()
    states = [providers.poll(replace(asking, id=f"r-{i}"), 1000.0)["alert"] for i in range(400)]
    for i in range(400):
        providers.emit(notice(asking, f"{i}"))
    assert time.monotonic() - started < 5
    assert {s.message for s in states} == {"asked, no answer yet", "too many questions wait"}
    assert states[-1].errors == 1


def notice(told: Rollout, message: str, event: str = "event") -> Notice:
    return Notice(told, event, "transition", message, f"{told.id}/{message}", 1, 1000.0)  # type: ignore[arg-type]


def test_notices_arrive_in_order_and_again_after_a_failure(
    service: WebService, providers: Providers
) -> None:
    replies = iter([Reply(503), Reply(500), Reply(200)])
    service.answer = lambda _: next(replies, Reply(200))
    told = rollout(webhooks=(Webhook("event", service.url),))
    for message in ("one", "two"):
        providers.emit(notice(told, message))
    received = [service.next() for _ in range(4)]
    assert [r.document["message"] for r in received] == ["one", "one", "one", "two"]
    assert len({r.headers["Idempotency-Key"] for r in received[:3]}) == 1


def test_a_notice_is_given_up_at_last_and_logged_without_the_path(
    service: WebService, providers: Providers, caplog: pytest.LogCaptureFixture
) -> None:
    service.answer = lambda request: Reply(200 if request.document["message"] == "two" else 503)
    told = rollout(webhooks=(Webhook("event", f"{service.url}/services/secret?key=secret"),))
    with caplog.at_level(logging.WARNING):
        for message in ("one", "two"):
            providers.emit(notice(told, message))
        received = [service.next().document["message"] for _ in range(4)]
    assert received == ["one", "one", "one", "two"]
    assert caplog.messages == [
        f"rollout r-1: a notice to {service.url} was given up, {service.url} answered 503 "
        "(3 tries): one"
    ]


def test_a_refusal_for_good_is_not_tried_again(
    service: WebService, providers: Providers, caplog: pytest.LogCaptureFixture
) -> None:
    service.answer = lambda _: Reply(410)
    told = rollout(webhooks=(Webhook("event", service.url),))
    for message in ("one", "two"):
        providers.emit(notice(told, message))
    assert [service.next().document["message"] for _ in range(2)] == ["one", "two"]
    eventually(lambda: len(caplog.messages) == 2, "both are given up")
    assert service.received.empty()


def test_only_the_webhooks_of_an_event_are_told(service: WebService, providers: Providers) -> None:
    told = rollout(
        webhooks=(
            Webhook("post-rollout", f"{service.url}/end"),
            Webhook("pre-step", f"{service.url}/ask"),
        )
    )
    providers.emit(notice(told, "one"))
    providers.emit(notice(told, "two", "post-rollout"))
    assert service.next().path == "/end"
    assert service.received.empty()


def test_too_many_notices_for_one_receiver_are_dropped_and_logged(
    service: WebService, providers: Providers, caplog: pytest.LogCaptureFixture
) -> None:
    service.answer = service.silence
    told = rollout(webhooks=(Webhook("event", service.url, timeout_s=30.0),))
    for i in range(257):
        providers.emit(notice(told, str(i)))
    assert caplog.messages == [
        f"rollout r-1: a notice to {service.url} was given up, 256 earlier ones wait: 256"
    ]


def test_closing_delivers_what_is_due(service: WebService, providers: Providers) -> None:
    told = rollout(webhooks=(Webhook("event", service.url),))
    for i in range(20):
        providers.emit(notice(told, str(i)))
    providers.close(20.0)
    assert service.received.qsize() == 20


def test_closing_says_what_was_not_delivered(
    service: WebService, caplog: pytest.LogCaptureFixture
) -> None:
    providers = Providers(lambda: 7, retry_after_s=(3600.0,))
    service.answer = lambda _: Reply(503)
    told = rollout(webhooks=(Webhook("event", service.url),))
    providers.emit(notice(told, "one"))
    service.next()
    providers.close(20.0)
    assert caplog.messages[-1] == (
        f"rollout r-1: a notice to {service.url} was given up, the controller stops: one"
    )


def test_a_rollout_waits_for_its_webhooks(service: WebService, providers: Providers) -> None:
    """Through the core's own decisions: nothing goes on before each has said yes."""
    hooks = (Webhook("pre-rollout", service.url), Webhook("pre-step", service.url))
    gate = Gate(type="webhook", url=service.url)
    plan = rollout(webhooks=hooks, state=State.PENDING, step=-1)
    running = replace(plan, spec=replace(plan.spec, steps=(Step(5, 60, gate=gate),)))
    asked = {}
    world = Snapshot(
        now=1000.0, canary_ready=1, canary_wanted=1, stable_ready=1, revision=1, gateways_at=1
    )

    def all_answered(due: tuple[Hook, ...], now: float) -> Mapping[str, ProviderState] | None:
        states = providers.poll(running, now, due)
        return states if all(states[hook.key].at == now for hook in due) else None

    def tick(now: float) -> None:
        nonlocal running, world
        due = due_hooks(running, replace(world, now=now))
        states = providers.poll(running, now, due)
        if due:
            states = eventually(lambda: all_answered(due, now), f"answers of {now}") or {}
        world = replace(world, now=now, providers=states)
        running = decide(running, world)

    for i, said in enumerate(["unknown", "fail", "ok"] * 12):
        # A gate that says no is not asked again.
        at_gate = running.state is State.AWAITING_GATE and said == "fail"
        answer = "unknown" if at_gate else said
        service.answer = lambda _, answer=answer: verdict(answer)  # type: ignore[misc]
        before = running.state
        tick(1000.0 + 60 * i)
        if running.state is not before:
            asked[running.state] = said
        if running.state is State.BAKING:
            break
    subjects = [service.next().document["subject"] for _ in range(service.received.qsize())]
    assert list(dict.fromkeys(subjects)) == [
        "pre-rollout:0:0",
        "pre-step:0:0",
        "gate:0",
        "pre-step:1:0",
    ]
    waited_for = (State.PREPARING, State.OBSERVING, State.PROMOTING)
    assert [asked[state] for state in waited_for] == ["ok"] * 3
