"""What is said of a wrong setting is in this project's words, not in its parser's."""

from __future__ import annotations

import pytest

from serving.config import parse_config
from serving.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("port", "web", "must be a whole number (found 'web')"),
        ("port", 1.5, "must be a whole number (found 1.5)"),
        ("drain_s", "long", "must be a number (found 'long')"),
        ("drain_s", 0, "must be greater than 0 (found 0)"),
        ("host", 1, "must be a text (found 1)"),
        ("resources", [], "must be a mapping (found [])"),
    ],
)
def test_a_wrong_value(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"gateway": {key: value}}, source="f")
    assert str(caught.value) == f"f: gateway.{key}: {said}"


def test_a_check_of_our_own() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"cost": {"prices": "p.yaml"}}, source="f")
    assert "f: cost.prices: a path is allowed" in str(caught.value)
    with pytest.raises(ConfigError, match="gateway: must be a mapping of settings"):
        parse_config({"gateway": 1}, source="f")


@pytest.mark.parametrize("key", ["version", "also_serve"])
def test_a_wrong_version(key: str) -> None:
    value = "x y" if key == "version" else ["x y"]
    with pytest.raises(ConfigError, match=r"'x y' is not a version; allowed: a number like"):
        parse_config({"models": {"m": {key: value}}}, source="f")


ROW = {"match": {"cpu": "core"}, "usd_per_hour": 1, "source": "s", "as_of": "2026-01"}


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        (3, "f: cost.prices: must be a list (found 3)"),
        ([{**ROW, "x": 1}], "f: unknown key 'cost.prices.0.x'; allowed here: as_of, match, source"),
        ([{**ROW, "match": {"gpus": "*"}}], "'cost.prices.0.match.gpus'; allowed here: cpu, gpu"),
        ([{**ROW, "source": ""}], "f: cost.prices.0.source: must have at least 1 character"),
        ([{**ROW, "as_of": "x"}], "f: cost.prices.0.as_of: must match pattern"),
    ],
)
def test_a_price_in_the_configuration(prices: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"cost": {"prices": prices}}, source="f")
    assert said in str(caught.value)
    assert "PriceRow" not in str(caught.value)
