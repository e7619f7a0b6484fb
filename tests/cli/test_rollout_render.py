"""What people read about a rollout, in every state that the real rules lead to."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
from rich.console import Console, RenderableType

from serving.cli import rollout_text as words
from serving.cli.rollout_render import (
    WatchView,
    explain_view,
    plan_view,
    rollouts_table,
    status_view,
)
from serving.cli.rollout_watch import Changes, Sight
from serving.core.detect import Detection
from serving.core.rollout_spec import Assignment, RolloutSpec, Webhook, default_plan
from serving.core.rollout_states import State
from serving.core.rollout_timing import step_times
from serving.core.rollout_types import ProviderState
from tests.cli.stories import BEGIN, FAST, GATED, SAFE, Story

HOOKED = replace(FAST, webhooks=(Webhook("pre-rollout", "http://hook"),))

STORIES: dict[str, Callable[[], Story]] = {
    "pending": lambda: Story(HOOKED).pass_time(5),
    "preparing": lambda: Story().pass_time(5, canary_ready=1),
    "shadowing": lambda: Story(SAFE).until("shadowing").pass_time(3),
    "observing": lambda: Story().until("observing").pass_time(2),
    "awaiting_gate": lambda: Story(GATED).until("awaiting_gate").pass_time(60),
    "paused": lambda: Story().until("observing").say("pause", reason="lunch [break]"),
    "promoting": lambda: Story().until("observing").say("promote"),
    "baking": lambda: Story().until("baking").pass_time(4),
    "succeeded": lambda: Story().until("succeeded"),
    "rolling_back": lambda: Story().until("observing").say("abort", reason="wrong file"),
    "rolled_back": lambda: Story().until("observing").until("rolled_back", failing=0.2),
    "rollback_failed": lambda: (
        Story()
        .until("observing")
        .say("rollback", reason="bad")
        .until("rollback_failed", stable_ready=0)
    ),
}
# What of it nobody may have to guess.
SAID = {
    "pending": ["▶ prepare version 2", "when the pre-rollout webhook at http://hook says yes"],
    "preparing": ["▶ prepare version 2", "1 of 2 replicas"],
    "shadowing": ["✓ prepare version 2", "▶ shadow: copies of 20 % of requests"],
    "observing": ["observing, step 1 of 3, 5 % to version 2", "✓ shadow", "▶ step 1: 5 % for 5 s"],
    "awaiting_gate": ["awaiting gate, step 1 of 3", "when a person approves"],
    "paused": ["paused, step 1 of 3, 5 % to version 2", "by bob@desk: lunch [break]"],
    "promoting": ["↷ step 2: 25 % for 10 s", "▶ promote, and bake for 10 s"],
    "baking": ["✓ step 3: 50 % for 10 s", "Succeeds in"],
    "succeeded": ["▶ keep version 1 for 10 min", "a rollback to it is immediate"],
    "rolling_back": ["✗ step 1: 5 % for 5 s", "by bob@desk: wrong file", "0 % to version 2"],
    "rolled_back": ["✗ step 1: 5 % for 5 s", "errors", "fail", "on fail", "20 %"],
    "rollback_failed": ["Needs a person", "version 1 has no ready replica"],
}


def printed(view: RenderableType, width: int = 200, height: int = 60) -> str:
    text = io.StringIO()
    Console(file=text, width=width, height=height, highlight=False).print(view)
    return text.getvalue()


def test_every_state_has_a_story() -> None:
    assert STORIES.keys() == SAID.keys() == {state.value for state in State}


@pytest.mark.parametrize("state", STORIES)
def test_each_state_is_explained(state: str) -> None:
    story = STORIES[state]()
    assert story.rollout.state == state
    entry = {
        "seq": 7,
        "at": BEGIN,
        "actor": "ada@desk",
        "action": "start",
        "subject": "digits:1",
        "body": {"reason": "better [on] sevens"},
    }
    raw = story.to_dict()
    text = printed(explain_view(raw, [entry], story.now))
    assert [said for said in SAID[state] if said not in text] == []
    assert "better [on] sevens" in text
    for verdict in story.rollout.verdicts:
        assert verdict.sentence.removeprefix(f"{verdict.trigger}: ") in " ".join(text.split())
    head = f"digits: version 1 → 2, {words.headline(raw)}"
    assert head in text
    assert head in printed(status_view(raw, story.now))
    live = printed(WatchView(raw, [entry], story.now, "the controller does not answer"))
    assert head in live
    assert "start by ada@desk: better [on] sevens" in live
    assert "the controller does not answer" in live
    assert state.replace("_", " ") in printed(rollouts_table([raw], story.now))


@pytest.mark.parametrize("state", STORIES)
def test_nothing_breaks_on_a_narrow_terminal(state: str) -> None:
    story = STORIES[state]()
    view = WatchView(story.to_dict(), [], story.now, "")
    assert max(map(len, printed(view, 80).splitlines())) <= 80


@pytest.mark.parametrize("state", STORIES)
def test_a_small_terminal_loses_the_oldest_events_and_no_trigger(state: str) -> None:
    story = STORIES[state]()
    entries = [
        {
            "seq": n,
            "at": BEGIN + n,
            "actor": "ada@desk",
            "action": f"told{n}",
            "subject": "digits:1",
            "body": {"weight": 0.05, "reason": "for a reason that takes its time " * 4},
        }
        for n in range(5)
    ]
    raw = {**story.to_dict(), "reason": story.rollout.reason * 3}
    view = WatchView(raw, entries, story.now, "the controller does not answer")
    lines = printed(view, 80, 24).splitlines()
    assert len(lines) <= 24
    shown = [n for n in range(5) if any(f"told{n} by" in line for line in lines)]
    assert shown, "the newest event is there"
    assert shown == list(range(5))[-len(shown) :]
    first_words = [line.split()[0] for line in lines if line.strip()]
    assert [v.trigger for v in story.rollout.verdicts if v.trigger not in first_words] == []
    everything = printed(view, 80, 60)
    assert all(f"told{n} by" in everything for n in range(5))
    assert len(printed(view, 80, 18).splitlines()) <= 23, "even then no trigger goes"
    assert all(v.trigger in printed(view, 80, 18) for v in story.rollout.verdicts)


def test_evidence_is_shown_against_its_threshold() -> None:
    """A tenth of the requests fails: the bar is full, and past its threshold, in powers of ten."""
    story = Story().until("observing").until("rolled_back", failing=0.2)
    (errors,) = (v for v in story.rollout.verdicts if v.trigger == "errors")
    assert errors.log_e is not None
    assert errors.threshold is not None
    text = printed(explain_view(story.to_dict(), [], story.now))
    row = next(line for line in text.splitlines() if line.split()[:2] == ["errors", "fail"])
    assert f"10/50 (20 %)  0/950 (0 %)    {words.power(errors.log_e)} of 10^2.5" in row
    live = printed(WatchView(story.to_dict(), [], story.now, ""))
    (bar,) = (line for line in live.splitlines() if line.split()[:2] == ["errors", "fail"])
    assert bar.rstrip().endswith("━" * 15 + "┃")


def test_half_the_evidence_is_half_a_bar() -> None:
    threshold = 2.0 * 2.302585  # 100 to 1
    assert words.bar(threshold / 2, threshold) == ("━" * 6, "─" * 6)
    assert words.bar(-3.0, threshold) == ("", "─" * 12)
    assert words.bar(10 * threshold, threshold) == ("━" * 12, "")
    assert words.scale() == "1     10    100   1000"


def test_what_an_inference_costs_is_beside_its_arm() -> None:
    story = Story().until("observing").pass_time(3)
    raw = story.to_dict()
    raw["arms"]["canary"]["usd_per_1000"] = 0.00312
    rows = [line.split() for line in printed(explain_view(raw, [], story.now)).splitlines()]
    costs = {row[0]: row[-1] for row in rows if row[:2] in (["canary", "2"], ["stable", "1"])}
    assert costs == {"stable": "unpriced", "canary": "0.00312"}


def test_the_shadow_says_how_answers_compared() -> None:
    story = Story(SAFE).until("shadowing").pass_time(3)
    raw = {**story.to_dict(), "shadowed": {"pairs": 1200, "disagreements": 6, "dropped": 4}}
    line = "shadow: 1,200 pairs of answers, 6 differ (0.5 %), 4 copies dropped"
    for view in (
        status_view(raw, story.now),
        WatchView(raw, [], story.now, ""),
        explain_view(raw, [], story.now),
    ):
        assert line in printed(view)
    raw["shadowed"] = {"pairs": 0, "disagreements": 0, "dropped": 0}
    assert "pairs of answers," not in printed(status_view(raw, story.now))


def test_without_traffic_nothing_is_made_up() -> None:
    story = Story(rate=0.0).until("observing").pass_time(3)
    text = printed(explain_view(story.to_dict(), [], story.now))
    rows = [line.split() for line in text.splitlines()]
    (canary,) = (row for row in rows if row[:2] == ["canary", "2"])
    assert canary[2:] == ["5", "%", "2/2", "0", "–", "–", "–", "–"]
    (errors,) = (row for row in rows if row[:2] == ["errors", "hold"])
    assert errors[2:4] == ["–", "–"]
    assert "nan" not in text


def test_a_pause_by_a_trigger_names_it_and_its_sentence() -> None:
    bad = ProviderState("fail", fails=3, message="load is 0.97")
    story = Story(SAFE).answer("saturation", ProviderState("ok")).until("observing")
    story.answer("saturation", bad).pass_time()
    assert story.rollout.state == "paused"
    text = printed(explain_view(story.to_dict(), [], story.now))
    assert "by controller: saturation" in text
    assert "load is 0.97" in text
    assert "▶ step 1: 5 % for 5 min, until errors pass" in text


def test_what_ends_before_any_traffic_failed_in_preparation() -> None:
    story = Story().pass_time(2, canary_ready=0).pass_time(canary_failed="golden outputs differ")
    assert story.rollout.state == "rolled_back"
    text = printed(explain_view(story.to_dict(), [], story.now))
    assert "✗ prepare version 2" in text
    assert "golden outputs differ" in text
    assert "verdicts\n  none yet" in text


def test_what_fails_in_the_shadow_failed_there() -> None:
    story = Story(SAFE).until("shadowing").pass_time(5).say("abort").until("rolled_back")
    assert "✗ shadow: copies" in printed(explain_view(story.to_dict(), [], story.now))


@pytest.mark.parametrize("state", ["baking", "succeeded"])
def test_what_is_taken_back_after_its_promotion_failed_there(state: str) -> None:
    story = Story().until(state).say("rollback", reason="odd").until("rolled_back")
    text = printed(explain_view(story.to_dict(), [], story.now))
    assert "✓ step 3: 50 % for 10 s" in text
    assert "✗ promote, and bake for 10 s" in text
    assert "by bob@desk: odd" in text


def test_where_users_stick_to_their_version_it_speaks_of_users() -> None:
    by_user = replace(FAST, assignment=Assignment("cookie:session"))
    story = Story(by_user, rate=1.0).until("observing").pass_time(20)
    text = printed(explain_view(story.to_dict(), [], story.now))
    (head,) = (line for line in text.splitlines() if line.split()[:2] == ["arm", "version"])
    assert head.split()[4:6] == ["users", "failed"]
    assert "of the 50 users that this step needs" in text
    found = plan_of(by_user)
    assert "errors are counted by user: estimates of errors are by request" in printed(found)
    assert "counted by user" not in printed(plan_of(FAST))


@pytest.mark.parametrize(
    ("per_s", "said"),
    [
        (200.0, ["17 min 50 s to the promotion, then 1 h of bake; 200 requests a second now"]),
        (
            5.0,
            [
                "46 min 40 s to the promotion",
                "until 2,000 pairs or 15 min; 15 min at this traffic",
                "step 1: 1 % for 2 min; 16 min 40 s, until it had 50 requests",
            ],
        ),
        (
            0.5,
            [
                "traffic is too low for this plan: it is paused in step 1, see below",
                "1 % for 2 min; too little traffic for its 50 requests: it is paused after 32 min",
                "step 2: 5 % for 5 min; 33 min 20 s, until it had 50 requests",
            ],
        ),
        (0.0, ["too low for this plan", "step 4: 50 % for 5 min; too little traffic"]),
    ],
)
def test_a_plan_says_how_long_it_takes_at_the_traffic_of_now(per_s: float, said: list[str]) -> None:
    text = printed(plan_of(default_plan("canary"), per_s))
    for sentence in said:
        assert sentence in text
    assert ("step 2: 5 % for 5 min;" in text) is (per_s < 1)


def test_a_plan_without_steps_says_that_traffic_is_too_low_for_its_shadow() -> None:
    text = printed(plan_of(default_plan("blue-green"), 0.01))
    assert "too low for this plan: it is paused in the shadow traffic" in text
    assert "15 min; too little traffic for its 50 pairs: it is paused after 45 min" in text


def test_what_nobody_can_foretell_is_at_least() -> None:
    required = replace(FAST.steps[0], require_pass=("errors",))
    text = printed(plan_of(replace(FAST, steps=(required, *FAST.steps[1:]))))
    assert "at least 27 s to the promotion" in text


def plan_of(spec: RolloutSpec, per_s: float = 200.0) -> RenderableType:
    found = Detection("20% of requests fail", "errors", 3.0, 0, 6.0)
    return plan_view(
        {
            "model": "digits",
            "stable": "1",
            "canary": "2",
            "spec": spec.to_dict(),
            "requests_per_s": per_s,
            "steps": [asdict(time) for time in step_times(spec, per_s)],
            "detections": [asdict(found)],
        }
    )


def test_a_dry_run_says_so() -> None:
    dry = replace(FAST, analysis=replace(FAST.analysis, dry_run=True))
    story = Story(dry).until("observing").pass_time(3, failing=1.0)
    assert "a dry run" in printed(explain_view(story.to_dict(), [], story.now))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.5, "0.5 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (5400, "1 h 30 min"),
        (3 * 86_400 + 4 * 3600 + 59, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_watch_tells_each_change_at_its_own_time_and_for_its_own_reason() -> None:
    story, changes = Story().until("observing"), Changes()

    def told() -> str:
        (line,) = (c for c in changes(Sight(story.to_dict(), [])) if " to version 2" in c)
        return line

    step = "digits: observing, step 1 of 3, 5 % to version 2"
    begun, why = words.moment(story.now), story.rollout.reason
    assert told() == f"{begun} {step} ({why})"
    story.pass_time(1, canary_ready=0)
    away = told()
    assert not away.startswith(begun), "the step began before"
    assert "0 % to version 2 (On hold: version 2 has no ready replica." in away
    story.pass_time(1, canary_ready=2)
    assert "5 % to version 2 (Step 2 (25 %) begins in" in told()
    story.say("pause", reason="lunch")
    assert told().startswith(f"{words.moment(story.now)} digits: paused")
    story.pass_time(60).say("resume", reason="back")
    assert told() == f"{words.moment(story.now)} {step} (back)"
    headline = printed(status_view(story.to_dict(), story.now + 2)).splitlines()[0]
    assert headline.endswith(f"since {words.moment(story.now)} (2 s)")
