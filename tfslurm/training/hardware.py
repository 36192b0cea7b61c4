"""What GPUs can do at most, for the share of it that a job makes use of."""

from __future__ import annotations

PEAK = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
"""FLOP/s in bfloat16, dense, by a part of the name that the driver gives: what the makers' data sheets say."""

FLOPS_PER_PARAMETER = 4
"""Of LoRA, for each token: 2 forwards and 2 backwards, since frozen weights need no gradient of their own."""


def peak_flops(name: str) -> float | None:
    """Of the GPU that the driver calls `name`; None where it is not known."""
    words = name.replace("-", " ").split()
    known = (key for key in PEAK if _contains(words, key.split()))
    found = max(known, key=len, default=None)
    return PEAK[found] if found else None


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words)))


def utilization_per_rate(parameters: int, gpu: str | None, world_size: int) -> float | None:
    """The share of the peak of `world_size` GPUs that each token a second takes on a base model of `parameters`.

    None on CPUs and unknown GPUs. Model FLOPs utilization (MFU) is after Chowdhery et al. 2022,
    https://arxiv.org/abs/2204.02311, appendix B.
    """
    peak = peak_flops(gpu) if gpu else None
    return FLOPS_PER_PARAMETER * parameters / (peak * world_size) if peak else None
