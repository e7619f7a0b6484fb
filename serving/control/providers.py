"""Those outside that a rollout asks (PromQL, webhooks, gates) and tells (events).

The controller's tick calls `poll` and reads what was answered so far; the asking happens on
threads, as often as each trigger's interval says, one question at a time for each trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from serving.control import promql, webhooks
from serving.control.notices import Notice
from serving.control.outbox import RETRY_AFTER_S, Outbox
from serving.control.webhooks import Receiver
from serving.control.workers import Workers
from serving.core.rollout_progress import WATCHED
from serving.core.rollout_spec import PROVIDER_KINDS, Trigger
from serving.core.rollout_states import State
from serving.core.rollout_types import Hook, ProviderState, Rollout

HOOK_INTERVAL_S: Final = 10.0
"""How often a web service that the rollout waits for is asked again."""
_FORGOTTEN_AFTER_S: Final = 600.0
_NOT_ASKED: Final = ProviderState("unknown", message="asked, no answer yet")
# Without traffic to the new version there is nothing to ask about.
_WITH_TRAFFIC: Final = WATCHED - {State.PAUSED}


@dataclass(frozen=True, slots=True)
class _Question:
    key: str
    interval_s: float
    timeout_s: float
    ask: Callable[[], ProviderState]


@dataclass(slots=True)
class _Asked:
    """One question's answers so far. `at`: when it was asked last; the thread writes the others."""

    state: ProviderState = _NOT_ASKED
    at: float | None = None
    waiting: bool = False

    def answered(self, answer: ProviderState, at: float) -> None:
        before = self.state
        self.state = replace(
            answer,
            fails=before.fails + 1 if answer.outcome == "fail" else 0,
            errors=before.errors + 1 if answer.outcome == "unknown" else 0,
            at=at,
        )


@dataclass(slots=True)
class _Rollout:
    """What one rollout asked. Answers to hooks are of one `place`: a state and a step."""

    place: tuple[State, int]
    polled_at: float
    asked: dict[str, _Asked] = field(default_factory=dict)


class Providers:
    """Asks and tells for all rollouts. `revision` gives the published route table's.

    `poll` and `emit` belong to one thread, the controller's, and never block it.
    """

    def __init__(
        self, revision: Callable[[], int], *, retry_after_s: Sequence[float] = RETRY_AFTER_S
    ) -> None:
        self._revision = revision
        self._rollouts: dict[str, _Rollout] = {}
        self._workers = Workers("providers", threads=8, limit=256)
        self._outbox = Outbox(retry_after_s)

    def poll(
        self, rollout: Rollout, now: float, hooks: Sequence[Hook] = ()
    ) -> Mapping[str, ProviderState]:
        """The last answers by trigger name and hook key; asks anew what is due.

        `now` is Unix seconds. `hooks` are the web services that the rollout waits for now; their
        answers are kept until its state or step changes, also once they are no longer asked. What
        has not answered yet is "unknown" with no errors.
        """
        questions = {q.key: q for q in self._questions(rollout, now, hooks)}
        place = (rollout.state, rollout.step)
        mine = self._rollouts.setdefault(rollout.id, _Rollout(place, now))
        if mine.place != place:
            kept = {t.name for t in _triggers(rollout)}
            mine.asked = {key: asked for key, asked in mine.asked.items() if key in kept}
        mine.place, mine.polled_at = place, now
        self._forget(now)
        for key, question in questions.items():
            self._ask_if_due(mine.asked.setdefault(key, _Asked()), question, now)
        return {key: _fresh(asked, questions.get(key), now) for key, asked in mine.asked.items()}

    def emit(self, notice: Notice) -> None:
        """Tell the plan's webhooks of this event, in order, again after failures."""
        for webhook in notice.rollout.spec.webhook(notice.event):
            receiver = Receiver(webhook.url, webhook.timeout_s, webhook.secret_env)
            self._outbox.put(receiver, notice)

    def close(self, timeout_s: float = 5.0) -> None:
        """Deliver what is due for at most `timeout_s` and stop. Blocks so long."""
        self._workers.close()
        self._outbox.close(timeout_s)

    def _questions(
        self, rollout: Rollout, now: float, hooks: Sequence[Hook]
    ) -> Iterator[_Question]:
        for trigger in _triggers(rollout):
            ask = (
                partial(promql.ask, trigger, rollout)
                if trigger.kind == "promql"
                else self._webhook(_receiver(trigger), rollout, "trigger", trigger.name, now)
            )
            yield _Question(trigger.name, trigger.interval_s, trigger.timeout_s, ask)
        for hook in hooks:
            event = hook.key.partition(":")[0]
            ask = self._webhook(_receiver(hook), rollout, event, hook.key, now)
            yield _Question(hook.key, HOOK_INTERVAL_S, hook.timeout_s, ask)

    def _webhook(
        self, receiver: Receiver, rollout: Rollout, event: str, subject: str, now: float
    ) -> Callable[[], ProviderState]:
        return partial(
            webhooks.ask,
            receiver,
            rollout,
            event=event,
            subject=subject,
            revision=self._revision(),
            at=now,
        )

    def _ask_if_due(self, asked: _Asked, question: _Question, now: float) -> None:
        # A clock that was set back must not silence a trigger.
        early = asked.at is not None and 0 <= now - asked.at < question.interval_s
        if asked.waiting or early:
            return
        asked.at, asked.waiting = now, True
        if not self._workers.submit(partial(_ask, asked, question.ask, now)):
            asked.answered(ProviderState("unknown", message="too many questions wait"), now)
            asked.waiting = False

    def _forget(self, now: float) -> None:
        for rollout_id, rollout in list(self._rollouts.items()):
            if now - rollout.polled_at > _FORGOTTEN_AFTER_S:
                del self._rollouts[rollout_id]


def _ask(asked: _Asked, ask: Callable[[], ProviderState], at: float) -> None:
    try:
        asked.answered(ask(), at)
    finally:
        asked.waiting = False


def _triggers(rollout: Rollout) -> tuple[Trigger, ...]:
    """The triggers that are asked now."""
    if rollout.stage not in _WITH_TRAFFIC:
        return ()
    return tuple(t for t in rollout.spec.analysis.triggers if t.kind in PROVIDER_KINDS)


def _receiver(source: Trigger | Hook) -> Receiver:
    return Receiver(source.url, source.timeout_s, source.secret_env)


def _fresh(asked: _Asked, question: _Question | None, now: float) -> ProviderState:
    """The answers so far, or "unknown" where the last is too old to still be true."""
    state = asked.state
    if question is None or state is _NOT_ASKED:
        return state
    age = now - state.at
    if age <= 2 * question.interval_s + question.timeout_s:
        return state
    message = f"no answer for {age:.0f} s"
    return replace(state, outcome="unknown", fails=0, value=None, message=message)
