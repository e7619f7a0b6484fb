from __future__ import annotations

import pytest

from serving.core.prices import DEFAULT_PRICES, Match, Price, PriceBook

P5 = {"node.kubernetes.io/instance-type": "p5.48xlarge"}


def book(*rows: tuple[Match, float]) -> PriceBook:
    return PriceBook([Price(match, usd, "test", "2026-11") for match, usd in rows])


def gpu_price(found: PriceBook, name: str, node: dict[str, str]) -> float | None:
    price = found.gpu(name, node)
    return None if price is None else price.usd_per_hour


def test_a_label_comes_before_an_instance_type_and_that_before_a_name() -> None:
    found = book(
        (Match(gpu="*H100*"), 1.0),
        (Match(gpu="*", instance="p5.*"), 2.0),
        (Match(gpu="*", labels={"pool": "spot*"}), 3.0),
    )
    h100 = "NVIDIA H100 80GB HBM3"
    assert gpu_price(found, h100, {}) == 1.0
    assert gpu_price(found, h100, P5) == 2.0
    assert gpu_price(found, h100, {**P5, "pool": "spot-a"}) == 3.0
    assert gpu_price(found, "NVIDIA L4", {}) is None


def test_of_equals_the_first_that_matches_counts() -> None:
    found = book((Match(gpu="*H1*"), 1.0), (Match(gpu="*H100*"), 2.0))
    assert gpu_price(found, "nvidia h100 pcie", {}) == 1.0


def test_a_core_is_no_gpu() -> None:
    found = book((Match(cpu=True), 0.05), (Match(cpu=True, instance="c5.*"), 0.04))
    core = found.core({"instance-type": "c5.large"})
    assert core is not None
    assert (core.usd_per_hour, core.rate) == (0.04, 40_000_000)
    assert gpu_price(found, "NVIDIA L4", {}) is None
    assert book((Match(gpu="*"), 1.0)).core({}) is None


@pytest.mark.parametrize(
    ("name", "usd"),
    [
        ("NVIDIA A10G", 1.01),
        ("NVIDIA L4", 0.80),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-40GB", 2.75),
        ("NVIDIA A100-SXM4-80GB", 3.43),
        ("NVIDIA A100 80GB PCIe", 3.43),
        ("NVIDIA H100 80GB HBM3", 6.88),
        ("NVIDIA H200", 7.91),
    ],
)
def test_the_default_book_knows_the_names_that_nvml_gives(name: str, usd: float | None) -> None:
    assert gpu_price(PriceBook(DEFAULT_PRICES), name, {}) == usd
