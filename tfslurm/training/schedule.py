"""What is done at which step: the learning rate of each, and the validation after some."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, *, peak: float, warmup_ratio: float) -> float:
    """The rate of the `step`-th update of `steps`, the first being 1.

    Linear warm-up over ceil(warmup_ratio · steps) updates up to `peak`, then half a cosine
    (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983) that would reach 0 one update
    after the last, so that no update is wasted on a rate of 0.
    """
    warmup = min(math.ceil(warmup_ratio * steps), steps - 1)
    if step <= warmup:
        return peak * step / (warmup + 1)
    progress = (step - warmup - 1) / (steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def validation_points(steps: int, count: int) -> list[int]:
    """The steps after which the loss on the validation rows is measured: at even distances, the last always one."""
    count = min(count, steps)
    return [math.ceil(steps * point / count) for point in range(1, count + 1)]
