"""The README.md of an adapter: what it is and what it was made from."""

from __future__ import annotations

import json

from tfslurm import __version__
from tfslurm.training.config import TrainingConfig

CARD = """\
---
base_model: {base_model}
library_name: peft
tags: [lora, tfslurm]
---
# {name}

A LoRA adapter of `{base_model}`, trained by tfslurm {version}.

| | |
|---|---|
| job | {job} (`{job_id}`) |
| base model | `{base_model}`, digest `{base_digest}` |
| dataset | {dataset} (`{dataset_id}`, {format}), digest `{dataset_digest}` |
| seed | {seed} |
| steps | {steps} |
| final training loss | {loss:.4f} |

Hyperparameters, as submitted:

```json
{hyperparameters}
```

Load it with PEFT: `PeftModel.from_pretrained(base, "path/to/this/folder")`.
"""


def model_card(config: TrainingConfig, *, steps: int, loss: float) -> str:
    """Markdown with the hub's front matter."""
    hyperparameters = config.hyperparameters
    values = {name: getattr(hyperparameters, name) for name in hyperparameters.__struct_fields__}
    return CARD.format(
        name=config.name,
        version=__version__,
        job=config.name,
        job_id=config.job_id,
        base_model=base_name(config),
        base_digest=config.base_model.digest,
        dataset=config.dataset.name,
        dataset_id=config.dataset.id,
        format=config.dataset.format,
        dataset_digest=config.dataset.digest,
        seed=config.seed,
        steps=steps,
        loss=loss,
        hyperparameters=json.dumps(values, indent=2),
    )


def base_name(config: TrainingConfig) -> str:
    """`name@revision`: a path would name this installation's storage, and tie the adapter to it."""
    return f"{config.base_model.name}@{config.base_model.revision}"
