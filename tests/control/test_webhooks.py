"""What webhooks are sent, how it is signed, and what their answers mean."""

import hashlib
import hmac
import re
from pathlib import Path

import pytest
import yaml

from serving.control import webhooks
from serving.control.notices import Notice, notices
from serving.control.outbound import NoAnswer
from serving.control.webhooks import Receiver, Undeliverable
from serving.core.rollout_types import Outcome, ProviderState, State, Verdict
from serving.rollout_plans import parse_plan
from tests.control.rollouts import rollout
from tests.control.web_service import Reply, WebService, verdict
from tests.core import rollouts

FAILS = Verdict("errors", Outcome.FAIL, 8.0, 5.8, (10.0, 4.0), (90.0, 0.0), "4 of 10", "rollback")


PAGE = Path(__file__).parents[2] / "docs/rollouts-webhooks.md"


def ask(receiver: Receiver) -> ProviderState:
    asking = rollout(state=State.AWAITING_GATE, verdicts=(FAILS,))
    return webhooks.ask(receiver, asking, event="gate", subject="gate:0", revision=7, at=1060.5)


def notice(**changes: object) -> Notice:
    settings = {
        "rollout": rollout(),
        "event": "event",
        "subject": "transition",
        "message": "shadowing → observing",
        "key": "r-1/observing",
        "revision": 8,
        "at": 1061.0,
        **changes,
    }
    return Notice(**settings)  # type: ignore[arg-type]


def test_the_body(service: WebService) -> None:
    ask(Receiver(service.url, 10))
    request = service.next()
    body = request.document
    assert body == {
        "event": "gate",
        "subject": "gate:0",
        "id": request.headers["Idempotency-Key"],
        "at": 1060.5,
        "message": "",
        "alert": False,
        "rollout": "r-1",
        "model": "digits",
        "stable": "1",
        "canary": "2",
        "state": "awaiting_gate",
        "step": 0,
        "steps": 2,
        "weight": 0.05,
        "reason": "a new version",
        "actor": "ann",
        "verdicts": [FAILS.to_dict() | {"canary": [10.0, 4.0], "baseline": [90.0, 0.0]}],
        "revision": 7,
    }
    assert request.method == "POST"
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["X-Serving-Event"] == "gate"
    assert "X-Serving-Signature" not in request.headers


def test_the_signature(service: WebService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_KEY", "hunter2")
    ask(Receiver(service.url, 10, "HOOK_KEY"))
    request = service.next()
    wanted = hmac.new(b"hunter2", request.body, hashlib.sha256).hexdigest()
    assert request.headers["X-Serving-Signature"] == f"sha256={wanted}"


def test_nothing_goes_out_unsigned_where_the_key_is_missing(service: WebService) -> None:
    answer = ask(Receiver(service.url, 10, "NO_SUCH_KEY"))
    assert answer == ProviderState(
        "unknown",
        message="the controller's environment has no NO_SUCH_KEY, which secret_env names",
    )
    assert service.received.empty()


@pytest.mark.parametrize(
    ("reply", "outcome", "message"),
    [
        (Reply(200), "ok", "answered 200"),
        (Reply(204), "ok", "answered 204"),
        (verdict("ok"), "ok", "says ok"),
        (verdict("fail", message="load\ntest failed"), "fail", "says fail: load test failed"),
        (verdict("unknown"), "unknown", "says unknown"),
        (verdict("maybe"), "unknown", "gave no verdict; allowed: ok, fail, unknown"),
        (Reply(body=b"{}"), "unknown", "gave no verdict; allowed: ok, fail, unknown"),
        (Reply(body=b'{"verdict": ["ok"]}'), "unknown", "gave no verdict; allowed: ok, fail"),
        (Reply(body=b"<html>OK"), "unknown", "gave no verdict; allowed: ok, fail, unknown"),
        (Reply(302, headers={"Location": "/login"}), "unknown", "answered 302"),
        (Reply(404), "unknown", "answered 404"),
        (Reply(500, b'{"verdict": "fail"}'), "unknown", "answered 500"),
        (Reply(503, b'{"verdict": "ok"}'), "unknown", "answered 503"),
    ],
)
def test_verdicts(service: WebService, reply: Reply, outcome: str, message: str) -> None:
    service.answer = lambda _: reply
    answer = ask(Receiver(service.url, 10))
    assert answer.outcome == outcome
    assert answer.message.startswith(f"{service.url} {message}")


def test_silence_is_unknown(service: WebService) -> None:
    service.answer = service.silence
    assert ask(Receiver(service.url, 0.2)) == ProviderState(
        "unknown", message=f"{service.url} did not answer within 0.2 s"
    )


def test_a_question_asked_again_is_a_new_message(service: WebService) -> None:
    """Else a receiver that remembers its answers would repeat its first "unknown" for ever."""
    asking = rollout()
    for at in (1.0, 2.0):
        receiver = Receiver(service.url, 10)
        webhooks.ask(receiver, asking, event="gate", subject="gate:0", revision=1, at=at)
    first, second = service.next(), service.next()
    assert first.document["id"] != second.document["id"]


def test_a_notice_told_again_is_the_same_message(service: WebService) -> None:
    for _ in range(2):
        webhooks.tell(Receiver(service.url, 10), notice(alert=True))
    first, second = service.next(), service.next()
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert (first.document["message"], first.document["alert"]) == ("shadowing → observing", True)


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, NoAnswer), (429, NoAnswer), (404, Undeliverable), (302, Undeliverable)],
)
def test_which_refusals_are_final(service: WebService, status: int, error: type[Exception]) -> None:
    service.answer = lambda _: Reply(status)
    with pytest.raises(error, match=f"{service.url} answered {status}"):
        webhooks.tell(Receiver(f"{service.url}/secret", 10), notice())


def test_a_transition_is_told_once() -> None:
    before = rollout(state=State.SHADOWING, step=-1)
    after = rollout(entered_at=1060.0)
    told = notices(before, after, revision=3, now=1060.0)
    assert [(n.event, n.subject, n.message, n.alert) for n in told] == [
        (
            "event",
            "transition",
            "shadowing → observing at step 1 of 2: a new version",
            False,
        )
    ]
    assert notices(before, after, revision=4, now=1099.0)[0].key == told[0].key
    assert notices(after, after, revision=4, now=1061.0) == []


def test_a_transition_that_is_told_again_has_its_key_whatever_clocks_were_moved() -> None:
    w = rollouts.world().to(State.OBSERVING)
    (told,) = notices(None, w.rollout, revision=3, now=w.now)
    entered = w.rollout.entered_at
    w.canary_ready = 0
    w.tick()
    w.tick(30)
    w.canary_ready = 2
    assert w.tick().entered_at > entered
    (again,) = notices(None, w.rollout, revision=9, now=w.now)
    assert again.key == told.key
    w.say("pause")
    w.tick(30)
    (resumed,) = notices(None, w.say("resume"), revision=9, now=w.now)
    assert resumed.key != told.key


def test_the_next_step_is_a_transition_and_a_start_too() -> None:
    assert [n.message for n in notices(rollout(), rollout(step=1), revision=3, now=1.0)] == [
        "observing at step 2 of 2: a new version"
    ]
    pending = rollout(state=State.PENDING, step=-1)
    assert [n.message for n in notices(None, pending, revision=3, now=1.0)] == [
        "pending: a new version"
    ]


@pytest.mark.parametrize("state", [State.PAUSED, State.ROLLING_BACK, State.ROLLBACK_FAILED])
def test_what_needs_a_person_is_an_alert(state: State) -> None:
    (told,) = notices(rollout(), rollout(state=state), revision=3, now=1.0)
    assert told.alert


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.ROLLED_BACK])
def test_the_end_is_told_to_both_kinds_of_webhook(state: State) -> None:
    told = notices(rollout(state=State.BAKING), rollout(state=state), revision=3, now=1.0)
    assert [n.event for n in told] == ["event", "post-rollout"]
    assert len({n.key for n in told}) == 2


def test_a_trigger_that_begins_to_fail_is_an_alert_once() -> None:
    failing = rollout(verdicts=(FAILS,))
    (told,) = notices(rollout(), failing, revision=3, now=1.0)
    assert (told.subject, told.message, told.alert) == ("verdict", "errors fails: 4 of 10", True)
    assert notices(failing, failing, revision=3, now=2.0) == []


def test_the_page_has_a_plan_that_works_and_every_field(service: WebService) -> None:
    plan, body = re.findall(r"```(?:yaml|json)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    spec = parse_plan(yaml.safe_load(plan), source="page")
    assert {t.kind for t in spec.analysis.triggers} >= {"promql", "webhook"}
    webhooks.tell(Receiver(service.url, 10), notice(rollout=rollout(verdicts=(FAILS,))))
    sent = service.next().document
    documented = yaml.safe_load(body)
    assert documented.keys() == sent.keys()
    assert documented["verdicts"][0].keys() == sent["verdicts"][0].keys()
