from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tfslurm.artifacts.references import BaseModelRef, DatasetRef
from tfslurm.settings import Trainer
from tfslurm.training.config import Hyperparameters, TrainingConfig
from tfslurm.training.deepspeed_config import deepspeed_config


def config(**trainer):
    return TrainingConfig(
        job_id="j",
        name="j",
        base_model=BaseModelRef(name="m", revision="r", digest="d", path="/m"),
        dataset=DatasetRef(id="d", name="d", format="text", digest="d", path="/d"),
        hyperparameters=Hyperparameters(
            learning_rate=2e-4, epochs=1, effective_batch_size=8, max_seq_length=512, lora_rank=16, lora_alpha=32
        ),
        trainer=Trainer(**trainer),
        tokens="/t",
    )


def test_it_is_json_and_holds_what_the_job_was_given():
    rendered = json.loads(json.dumps(deepspeed_config(config(max_grad_norm=0.5, weight_decay=0.1))))
    assert rendered["optimizer"]["params"]["lr"] == 2e-4
    assert rendered["optimizer"]["params"]["weight_decay"] == 0.1
    assert rendered["gradient_clipping"] == 0.5
    assert rendered["bf16"] == {"enabled": True}


@pytest.mark.parametrize(("asked", "rendered"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_the_stage_is_the_sites_and_never_without_fp32_gradients(asked, rendered):
    made = deepspeed_config(config(zero_stage=asked))
    assert made["zero_optimization"]["stage"] == rendered
    assert made["data_types"]["grad_accum_dtype"] == "fp32"


def test_the_login_node_renders_it_without_torch():
    program = (
        "import sys, tfslurm.training.deepspeed_config, tfslurm.training.outcome, tfslurm.training.prepared;"
        "print([m for m in ('torch', 'numpy', 'h5py', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
