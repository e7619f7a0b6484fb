"""`models.NAME.scaling`: what is taken, and what is told to who writes something else."""

from __future__ import annotations

from typing import Any

import pytest

from serving.config import parse_config
from serving.core.scaling import Scaling
from serving.errors import ConfigError


def parsed(**model: Any) -> Any:
    return parse_config({"models": {"m": model}}, source="f").models["m"]


def test_durations_are_texts_or_seconds() -> None:
    model = parsed(
        scaling={
            "min": 0,
            "max": 4,
            "target_queue_delay": "25ms",
            "target_utilization": 0.5,
            "scale_down_after": 90,
            "idle_to_zero_after": "10m",
            "wake_queue": 50,
        }
    )
    assert model.scaling.spec == Scaling(0, 4, 0.025, 0.5, 90.0, 600.0, 50)
    # As it goes to other processes.
    raw = parse_config({"models": {"m": {"scaling": {"max": 4}}}}, source="f")
    assert parse_config(raw.model_dump(mode="json"), source="f") == raw


def test_without_it_the_number_is_fixed() -> None:
    assert parsed(replicas=3).scaling is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"scaling": {}}, "f: models.m.scaling.max: is missing"),
        ({"scaling": {"min": 3, "max": 2}}, "f: models.m.scaling: min: 3 is more than max: 2"),
        (
            {"scaling": {"max": 2, "wake_queue": 5}},
            "f: models.m.scaling: wake_queue is for min: 0 only, and min is 1",
        ),
        (
            {"scaling": {"max": 2, "idle_to_zero_after": "1m"}},
            "f: models.m.scaling: idle_to_zero_after is for min: 0 only, and min is 1",
        ),
        (
            {"replicas": 2, "scaling": {"max": 2}},
            "f: models.m: replicas and scaling exclude each other; "
            "scaling.min and scaling.max say how many",
        ),
        (
            {"batching": {"max_delay_ms": 10}, "scaling": {"max": 2}},
            "f: models.m: scaling.target_queue_delay is 10 ms, batching.max_delay_ms alone is 10; "
            "allowed: more",
        ),
        (
            {"scaling": {"max": 2, "target_queue_delay": "soon"}},
            "f: models.m.scaling.target_queue_delay: is no duration; allowed: seconds, or a text",
        ),
        (
            {"scaling": {"max": 2, "cooldown": 1}},
            "f: unknown key 'models.m.scaling.cooldown'; allowed here: idle_to_zero_after, max, "
            "min, scale_down_after, target_queue_delay, target_utilization, wake_queue",
        ),
    ],
)
def test_what_is_refused_says_where_and_what_is_allowed(
    model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(**model)
    assert str(refused.value).startswith(message)
