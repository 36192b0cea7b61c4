from __future__ import annotations

import pytest

from tfslurm.training.hardware import peak_flops, utilization_per_rate

NAMES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "AMD Instinct MI300X": 1307e12,
    "Tesla T4": None,
    "NVIDIA GeForce RTX 4080": None,
}


@pytest.mark.parametrize(("name", "peak"), NAMES.items())
def test_the_drivers_names_are_known_by_their_words(name, peak):
    assert peak_flops(name) == peak


def test_the_published_speed_of_llama_3_on_an_h100_is_its_published_utilization():
    """12,473 tokens a second and 41 % with LoRA on one GPU: NVIDIA NeMo AutoModel's performance summary."""
    assert 12_473 * utilization_per_rate(8_030_261_248, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.41, abs=0.006)


def test_where_the_hardware_is_not_known_nothing_is_claimed():
    assert utilization_per_rate(10**9, None, 1) is None
    assert utilization_per_rate(10**9, "Tesla T4", 1) is None
