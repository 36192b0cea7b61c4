from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_model import CHATML, save_model, save_tokenizer
from transformers import AutoModelForCausalLM

from tfslurm.training.attention import NAME, supports_segments
from tfslurm.training.batches import micro_batch
from tfslurm.training.loss import SupervisedLoss
from tfslurm.training.masks import Encoded
from tfslurm.training.tokens import Source, TokenFile, write_tokens

CPU = torch.device("cpu")
SOURCE = Source(dataset_digest="", tokenizer_hash="", template_hash="", format="text", field_map={})


@pytest.fixture
def tokens(tmp_path):
    random = np.random.default_rng(0)
    rows = [Encoded(random.integers(0, 300, n).tolist(), [(1, n // 2), (n // 2 + 1, n)]) for n in (9, 2, 33, 17, 4)]
    write_tokens(tmp_path / "rows.h5", rows, SOURCE, 400)
    return TokenFile(tmp_path / "rows.h5")


def model(folder, attention):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "qwen3": {},
    "gemma": {},
    "phi3": {"resid_pdrop": 0.0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(folder, CHATML)
    save_model(folder, family=request.param, **FAMILIES[request.param])
    return folder


@pytest.mark.parametrize("attention", [NAME, "sdpa"])
def test_packed_examples_lose_what_they_lose_alone(family, tokens, attention):
    """Against each row alone through transformers' own eager attention: no segment sees another."""
    packed = SupervisedLoss(model(family, attention), bounds_on_device=False)
    alone = model(family, "eager")
    together = packed(micro_batch(tokens, np.arange(5), 100, CPU), reduction="none")
    apart = []
    for row in range(5):
        ids, mask = tokens.row(row, 100)
        ids = torch.from_numpy(ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(mask), ids, -100)
        losses = torch.nn.functional.cross_entropy(alone(ids[None]).logits[0, :-1], labels[1:], reduction="none")
        apart.append(losses[labels[1:] != -100])
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=0)


def test_another_neighbour_changes_nothing(family, tokens):
    loss = SupervisedLoss(model(family, NAME), bounds_on_device=False)
    first = loss(micro_batch(tokens, np.array([0, 2]), 100, CPU), reduction="none")
    second = loss(micro_batch(tokens, np.array([3, 2]), 100, CPU), reduction="none")
    torch.testing.assert_close(first[-31:], second[-31:], atol=1e-5, rtol=0)


def test_no_label_crosses_a_bound_and_positions_restart(tokens):
    batch = micro_batch(tokens, np.array([1, 0]), 100, CPU)
    assert batch.bounds.tolist() == [0, 2, 11]
    assert batch.position_ids[0].tolist() == [0, 1, *range(9)]
    bounds = batch.bounds.tolist()
    assert not set(batch.predictors.tolist()) & {bound - 1 for bound in bounds}
    assert (batch.targets == batch.input_ids[0, batch.predictors + 1]).all()


def test_logits_are_computed_for_supervised_tokens_only(tiny, tokens):
    batch = micro_batch(tokens, np.arange(5), 100, CPU)
    logits = SupervisedLoss(model(tiny, NAME), bounds_on_device=False).logits(batch)
    assert len(logits) == len(batch.targets) == tokens.supervised(100).sum() < batch.input_ids.numel()


def test_a_padding_micro_batch_has_no_loss_and_no_gradient_but_takes_part(tiny, tokens):
    module = model(tiny, NAME)
    value = SupervisedLoss(module, bounds_on_device=False)(micro_batch(tokens, np.array([], dtype=int), 100, CPU))
    value.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert value.item() == 0 and all(gradient is not None and not gradient.any() for gradient in gradients)


def test_segment_attention_without_bounds_refuses_rather_than_leak(tiny):
    with pytest.raises(ValueError, match="bounds of the packed segments"):
        model(tiny, NAME)(torch.tensor([[1, 2, 3]]))


def test_a_model_with_capped_attention_runs_eagerly_and_keeps_segments_apart(tmp_path, tokens):
    save_tokenizer(tmp_path, CHATML)
    save_model(tmp_path, family="gemma2")
    eager = model(tmp_path, "eager")
    assert not supports_segments(eager.config)
    loss = SupervisedLoss(eager, bounds_on_device=False)
    together = loss(micro_batch(tokens, np.arange(5), 100, CPU))
    apart = sum(loss(micro_batch(tokens, np.array([row]), 100, CPU)) for row in range(5))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-6)
