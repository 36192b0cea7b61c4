"""The README.md of an adapter, or of a merged model: what it is and what it was made from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from tfslurm import __version__
from tfslurm.training.config import TrainingConfig

CARD = """\
---
{head}---
# {name}

{what} `{base_model}`, trained by tfslurm {version}.

| | |
|---|---|
{rows}

Hyperparameters, as submitted:

```json
{hyperparameters}
```

{usage}
"""

PEFT_USAGE = """\
Load it with PEFT, on the base model above, in that revision:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("path/to/the/base/model")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""

MERGED_USAGE = """\
It needs no PEFT:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```"""


@dataclass(frozen=True)
class Origin:
    """What the catalog knows of a checkpoint, beside its job's configuration; sources as they were recorded."""

    checkpoint: str
    checkpoint_id: str
    digest: str
    base_source: str | None = None
    dataset_source: str | None = None


def model_card(
    config: TrainingConfig, *, steps: int, loss: float, origin: Origin | None = None, merged: bool = False
) -> str:
    """Markdown with the Hub's front matter; `origin` is of a checkpoint that is registered already.

    https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    hyperparameters = config.hyperparameters
    values = {name: getattr(hyperparameters, name) for name in hyperparameters.__struct_fields__}
    return CARD.format(
        head=yaml.safe_dump(_head(config, origin, merged), sort_keys=False),
        name=config.name,
        what="A model: a LoRA adapter merged into" if merged else "A LoRA adapter of",
        base_model=_on_hub(origin) or config.base_model.name,
        version=__version__,
        rows="\n".join(f"| {key} | {value} |" for key, value in _rows(config, steps, loss, origin).items()),
        hyperparameters=json.dumps(values, indent=2),
        usage=MERGED_USAGE if merged else PEFT_USAGE,
    )


def _head(config: TrainingConfig, origin: Origin | None, merged: bool) -> dict[str, Any]:
    """What the Hub reads. Only a base model and a dataset that come from there are known there by a name."""
    base = _on_hub(origin) or config.base_model.name
    head: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tfslurm"] if merged else [f"base_model:adapter:{base}", "lora", "transformers", "tfslurm"],
    }
    found = re.match(r"hf://datasets/([^/@]+/[^/@]+)", (origin and origin.dataset_source) or "")
    return head | ({"datasets": [found[1]]} if found else {})


def _on_hub(origin: Origin | None) -> str | None:
    """The base model's name on the Hub, if it came from there."""
    found = re.match(r"hf://([^@]+)", (origin and origin.base_source) or "")
    return found and found[1]


def _rows(config: TrainingConfig, steps: int, loss: float, origin: Origin | None) -> dict[str, str]:
    base, dataset = config.base_model, config.dataset
    said = origin and f"{origin.checkpoint} (`{origin.checkpoint_id}`), digest `{origin.digest}`"
    return ({"checkpoint": said} if said else {}) | {
        "job": f"{config.name} (`{config.job_id}`)",
        "base model": f"`{base_name(config)}`, digest `{base.digest}`",
        "dataset": f"{dataset.name} (`{dataset.id}`, {dataset.format}), digest `{dataset.digest}`",
        "seed": str(config.seed),
        "steps": str(steps),
        "final training loss": f"{loss:.4f}",
    }


def base_name(config: TrainingConfig) -> str:
    """`name@revision`: a path would name this installation's storage, and tie the adapter to it."""
    return f"{config.base_model.name}@{config.base_model.revision}"
