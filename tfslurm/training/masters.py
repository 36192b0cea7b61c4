"""What AdamW updates inside a DeepSpeed engine: fp32 masters and their moments.

DeepSpeed spreads both over the processes as ZeRO's stage has it. Here they are whole tensors by name, so that what
one number of processes gathered another one can restore.
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import distributed

from tfslurm.errors import ConfigurationError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's own names for the running means of the gradient and of its square."""


def partitions(engine) -> list[torch.Tensor]:
    """This process's share of the masters, flat: what the optimizer inside DeepSpeed's updates."""
    if (flat := getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)) is not None:
        return list(flat)
    return [share for group in _adam(engine).param_groups for share in group["params"]]


def require_fp32(engine) -> None:
    """Adam's updates are too small for bfloat16: what it updates must be fp32, whatever the module holds."""
    shares = partitions(engine)
    wrong = {str(share.dtype) for share in shares if share.dtype != torch.float32}
    if wrong or not shares:
        raise ConfigurationError(f"the optimizer updates {', '.join(wrong) or 'nothing'} rather than fp32 masters")


def names(engine) -> list[str]:
    """Of all tensors that `gather` makes: `master/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` for each parameter."""
    return [f"{kind}/{name}" for name, _ in _trained(engine) for kind in (MASTER, *MOMENTS)]


def updates(engine) -> int:
    """How many updates AdamW counts, which its bias correction needs: DeepSpeed leaves out those that overflow."""
    return int(_adam(engine).state[partitions(engine)[0]]["step"])


def gather(engine, *, keep: bool) -> dict[str, torch.Tensor]:
    """All masters and moments by name, fp32, whole and on the CPU; {} where they are not to be kept.

    Every process must call it, after the first update.
    """
    gathered = {}
    for name, parameter in _trained(engine):
        whole = {MASTER: safe_get_full_fp32_param(parameter)}
        whole |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if keep:
            gathered |= {f"{kind}/{name}": tensor.detach().cpu().contiguous() for kind, tensor in whole.items()}
    return gathered


def restore(engine, counted: int, read: Callable[[str], torch.Tensor] | None) -> None:
    """Put back what `gather` made, `counted` updates after the start, and the weights that follow from it.

    Every process must call it, before the first update. `read` gives a tensor by name in the first process, and is
    None in the others, which get theirs from there.
    """
    _make_moments(engine, counted)
    partitioned = engine.zero_optimization_stage() == 3
    for name, parameter in _trained(engine):
        set_tensor = _set_share if partitioned else _set_whole
        for kind in (*MOMENTS, MASTER):
            value = _spread(engine, parameter, torch.float32, read and read(f"{kind}/{name}"))
            set_tensor(parameter, value, kind)
        _set_weight(parameter, value)


def gather_weights(engine, *, keep: bool) -> dict[str, torch.Tensor]:
    """The trained weights by name as the module holds them, whole and on the CPU; {} where they are not to be kept.

    Every process must call it.
    """
    gathered = {}
    for name, parameter in _trained(engine):
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                gathered[name] = parameter.detach().to("cpu", copy=True)
    return gathered


def set_weights(engine, weights: dict[str, torch.Tensor] | None) -> None:
    """Put back what `gather_weights` kept in the first process; `weights` is None in the others. Masters stay.

    Every process must call it.
    """
    for name, parameter in _trained(engine):
        _set_weight(parameter, _spread(engine, parameter, parameter.dtype, weights and weights[name]))


def _spread(engine, parameter: torch.nn.Parameter, dtype: torch.dtype, value: torch.Tensor | None) -> torch.Tensor:
    """The first process's `value`, of a whole parameter's shape, in every process."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    spread = torch.empty(shape, dtype=dtype, device=engine.device)
    if value is not None:
        spread.copy_(value)
    distributed.broadcast(spread, src=0)
    return spread


def _set_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def _adam(engine) -> torch.optim.AdamW:
    return engine.optimizer.optimizer


def _trained(engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in engine.module.named_parameters() if value.requires_grad]


def _make_moments(engine, counted: int) -> None:
    """AdamW makes its state at the first update, and DeepSpeed finds its way into it after that one."""
    for share in partitions(engine):
        state = {moment: torch.zeros_like(share) for moment in MOMENTS}
        _adam(engine).state[share] = {"step": torch.tensor(float(counted), dtype=torch.float32), **state}
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_whole(parameter: torch.nn.Parameter, value: torch.Tensor, kind: str) -> None:
    if kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _set_share(parameter: torch.nn.Parameter, value: torch.Tensor, kind: str) -> None:
    """DeepSpeed's setters of whole values fail in stage 3 where the processes do not divide the parameter evenly."""
    size = parameter.ds_tensor.numel()
    flat = torch.nn.functional.pad(value.flatten(), (0, size * distributed.get_world_size() - value.numel()))
    share = flat.narrow(0, size * distributed.get_rank(), size)
    if kind == MASTER:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, kind)
