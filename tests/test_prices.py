"""Price books as files: the one that comes along, and every way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.config import load_config
from serving.core.prices import DEFAULT_PRICES
from serving.errors import ConfigError
from serving.prices import load_rows

CONFIGS = Path(__file__).parents[1] / "configs"

ROW = """
- match: {gpu: "*H100*", instance: "p5.*", labels: {pool: spot}}
  usd_per_hour: 2.5
  source: contract 17
  as_of: 2026-11-23
"""


def test_the_book_that_comes_along_is_the_default() -> None:
    rows = load_rows(CONFIGS / "prices.yaml")
    assert tuple(row.to_price() for row in rows) == DEFAULT_PRICES


def test_a_configuration_takes_its_book_with_it(tmp_path: Path) -> None:
    """The controller may run where the file is not."""
    (tmp_path / "prices.yaml").write_text(ROW)
    (tmp_path / "serving.yaml").write_text("cost: {prices: prices.yaml}")
    config = load_config(tmp_path / "serving.yaml")
    (tmp_path / "prices.yaml").unlink()
    price = config.cost.price_book.gpu(
        "NVIDIA H100", {"instance-type": "p5.48xlarge", "pool": "spot"}
    )
    assert price is not None
    assert (price.usd_per_hour, price.source, price.as_of) == (2.5, "contract 17", "2026-11-23")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices: []", "expected a list of prices, found dict"),
        ("", "expected a list of prices, found nothing"),
        ("- [", "is not valid YAML"),
        (ROW.replace("gpu", "card"), "unknown key 'match.card'; allowed here: gpu, cpu"),
        (ROW.replace("source: contract 17", "src: x"), "source: is missing"),
        (ROW.replace("2.5", "-2.5"), "usd_per_hour: must be greater than or equal to 0"),
        (ROW.replace("2.5", "cheap"), "usd_per_hour"),
        (ROW.replace("2026-11-23", "lately"), "as_of"),
        (ROW.replace("instance", "cpu"), "match.cpu"),
        (ROW.replace('gpu: "*H100*", ', ""), "a row prices either `gpu: PATTERN` or `cpu: core`"),
        ("- 7", "row 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    (tmp_path / "serving.yaml").write_text("cost: {prices: prices.yaml}")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "serving.yaml")
    assert message in str(raised.value)
    assert "prices.yaml" in str(raised.value)


def test_a_book_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "serving.yaml").write_text("cost: {prices: gone.yaml}")
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        load_config(tmp_path / "serving.yaml")
