"""Render the DeepSpeed configuration of a job; imports no torch, since jobs are created on the login node."""

from __future__ import annotations

from typing import Any

from tfslurm.training.config import TrainingConfig


def deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` takes, JSON-ready.

    Batch sizes are 1 here because the plan sizes the micro-batches and sets every accumulation
    boundary itself; the learning rate is the peak, which the trainer's schedule scales. Gradients
    are accumulated and reduced in fp32 whatever the weights' type. Stage 0 becomes 1: DeepSpeed's
    stage 0 cannot do that in bfloat16 and reports no gradient norm, and 1 costs nothing more.
    """
    trainer = config.trainer
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": trainer.max_grad_norm,
        "bf16": {"enabled": trainer.dtype == "bfloat16"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero(max(1, trainer.zero_stage)),
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.hyperparameters.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": trainer.weight_decay,
                "torch_adam": True,
            },
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _zero(stage: int) -> dict[str, Any]:
    """ZeRO's options; buckets are small because an adapter is: the default takes 2 GB for nothing."""
    options: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        options |= {"reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000, "overlap_comm": False}
    if stage == 3:
        options |= {"stage3_gather_16bit_weights_on_model_save": False}
    return options
