"""Micro-batches as tensors: examples one after another in one row, with their bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tfslurm.training.tokens import TokenFile


@dataclass(frozen=True)
class MicroBatch:
    """Segments laid end to end, without padding.

    `input_ids` and `position_ids` are int64 [1, tokens], positions restarting at each segment;
    `bounds` int32 [segments + 1]; `predictors` and `targets` int64 [supervised]: the token at
    `predictors[i]` predicts the id `targets[i]`, never across a bound; `weight` is 0 for padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    bounds: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    weight: float


def micro_batch(tokens: TokenFile, examples: np.ndarray, limit: int, device: torch.device) -> MicroBatch:
    """The rows `examples` of a token file, each cut to `limit` tokens; none gives a padding batch."""
    if len(examples) == 0:
        return _padding(device)
    rows = [tokens.row(example, limit) for example in examples]
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    lengths = [len(ids) for ids, _ in rows]
    supervised = np.flatnonzero(np.concatenate([mask for _, mask in rows]))
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None].to(device),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None].to(device),
        bounds=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        predictors=torch.from_numpy(supervised - 1).to(device),
        targets=torch.from_numpy(ids[supervised]).to(device),
        weight=1.0,
    )


def _padding(device: torch.device) -> MicroBatch:
    """Two tokens and a loss of weight 0: what a process does while others still have work."""
    zeros = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids=zeros,
        position_ids=torch.arange(2, device=device)[None],
        bounds=torch.tensor([0, 2], dtype=torch.int32),
        predictors=zeros[0, :1],
        targets=zeros[0, :1],
        weight=0.0,
    )
