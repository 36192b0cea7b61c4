"""The training loss, computed inside the module that DeepSpeed wraps."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from tfslurm.training.batches import MicroBatch


class SupervisedLoss(torch.nn.Module):
    """Sums the cross-entropy over a micro-batch's supervised tokens; no logits exist of the others.

    The sum is not divided here: the step's divisor is its supervised tokens over all processes and
    micro-batches, which makes the result independent of how examples are packed and spread.
    """

    def __init__(self, model: torch.nn.Module, *, bounds_on_device: bool) -> None:
        super().__init__()
        self.model = model
        self._bounds_on_device = bounds_on_device

    def forward(self, batch: MicroBatch, reduction: str = "sum") -> torch.Tensor:
        """fp32: a scalar, or with the reduction "none" a value for each supervised token."""
        return batch.weight * cross_entropy(self.logits(batch).float(), batch.targets, reduction=reduction)

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """[supervised, vocabulary], at the tokens that predict supervised ones."""
        bounds = batch.bounds.to(batch.input_ids.device) if self._bounds_on_device else batch.bounds
        longest = int(batch.bounds.diff().max())
        output = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            logits_to_keep=batch.predictors,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
        )
        return output.logits[0]
