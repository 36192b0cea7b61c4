"""Merge an adapter into its base model, and make sure that the result is the same model.

A program of the training environment (see `programs`): a `Question` comes in, an `Agreement` goes out.
"""

from __future__ import annotations

import gc
import shutil
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from tfslurm.errors import InvalidError
from tfslurm.faults import fault_point
from tfslurm.training.base_tokenizer import BaseTokenizer
from tfslurm.training.export import Agreement, Question
from tfslurm.training.model import quieten
from tfslurm.training.programs import answering, read_question
from tfslurm.training.staging import COPIED, INDEX

SHARD = "5GB"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "additional_chat_templates/*")
FROM_BASE = [pattern for pattern in COPIED if pattern not in ("config.json", "*.safetensors", INDEX, "README.md")]

TOLERANCE = {torch.float32: 1e-3}
COARSE = 0.02
"""How far the merged model's log-probabilities may lie from the adapted model's, in nats, on average.

Both are computed in fp32, so that only the rounding of the merged weights is left: to bfloat16, 0.008 was measured on
SmolLM2-135M with an adapter that changes 0.59, where a scale that is wrong by a tenth makes 0.07. Computed in
bfloat16, the noise alone is 0.035. Larger models are less noisy.
"""

PROBE = (
    "The cat sat on the mat. In 1969, two people walked on the Moon for the first time.\n"
    "def add(a, b):\n    return a + b\n\n"
    "Question: Which of the three is the largest: 7, 12 or 9? Answer: 12 is the largest.\n"
    '{"name": "Ada", "city": "London", "tags": ["one", "two"]}\n'
    "Dear Sir or Madam, thank you for your letter. We will answer it as soon as we can."
)
"""A few kinds of text: what is compared is two forms of the same function, which any text shows."""


def merge(question: Question) -> Agreement:
    """Write the merged model, in the type of the base's weights, with tokenizer and chat template beside it.

    Base and adapter are added in fp32 and rounded once, which takes 4 bytes of memory a parameter. Raises InvalidError
    where base or adapter does not load, where they do not fit each other, where a weight is not finite, and where the
    model that was written, read back, is not base and adapter together.
    """
    quieten()
    base, adapter, folder = Path(question.base), Path(question.adapter), Path(question.destination)
    ids = _probe(base)
    _say("loading base model and adapter")
    loaded = _load(base)
    dtypes = {name: value.dtype for name, value in loaded.named_parameters()}
    dtype, model = loaded.dtype, _adapted(loaded.float(), adapter)
    adapted = log_probabilities(model, ids)
    with model.disable_adapter():
        plain = log_probabilities(model, ids)
    _say("merging")
    _save(model, dtypes, folder)
    del model, loaded
    gc.collect()
    _copy(base, FROM_BASE, folder)
    _copy(adapter, TOKENIZER, folder)
    fault_point("merge-saved")
    _say("checking")
    merged = _load(folder)
    if merged.dtype != dtype:
        raise InvalidError(f"the merged model came out as {merged.dtype}, and its base is {dtype}")
    return _agreement(log_probabilities(merged.float(), ids), adapted, plain, dtype)


def _load(folder: Path) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidError(f"the model in {folder} does not load: {error}") from error


def _adapted(base: PreTrainedModel, adapter: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(base, adapter).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidError(f"the adapter in {adapter} does not fit its base model: {error}") from error


def _save(model: PeftModel, dtypes: dict[str, torch.dtype], folder: Path) -> None:
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InvalidError(f"the adapter cannot be merged: {error}") from error
    merged.config._name_or_path = ""
    for name, value in merged.named_parameters():
        value.data = value.data.to(dtypes[name])
    merged.save_pretrained(folder, max_shard_size=SHARD)


def _copy(source: Path, patterns: list[str] | tuple[str, ...], folder: Path) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _probe(base: Path) -> torch.Tensor:
    """Ids, int64 [1, tokens]."""
    tokenizer = BaseTokenizer(base)
    return torch.tensor([tokenizer.beginning + tokenizer.backend.encode(PROBE, add_special_tokens=False).ids])


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of each of the probe's tokens but the first, fp32 [tokens - 1]."""
    logits = model(input_ids=ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def _agreement(merged: torch.Tensor, adapted: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> Agreement:
    found = Agreement(
        dtype=str(dtype).removeprefix("torch."),
        tokens=len(merged),
        distance=(merged - adapted).abs().mean().item(),
        effect=(plain - adapted).abs().mean().item(),
        tolerance=TOLERANCE.get(dtype, COARSE),
    )
    if torch.equal(merged, plain):
        raise InvalidError("the merged model is the base model: the adapter changed nothing")
    if not found.distance <= found.tolerance:
        raise InvalidError(
            f"the merged model is not base and adapter together: their log-probabilities differ by "
            f"{found.distance:.3g} on average, and {found.tolerance:g} is allowed"
        )
    return found


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, to those who write against them
    return answering(lambda: merge(read_question(Question)))
