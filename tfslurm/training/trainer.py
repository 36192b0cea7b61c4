"""The training loop on the nodes: `python -m tfslurm.training.trainer JOBFOLDER`, one process a rank."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tfslurm.errors import ConfigurationError, InvalidError
from tfslurm.files import read_json
from tfslurm.paths import JobPaths
from tfslurm.training.config import TrainingConfig
from tfslurm.training.outcome import AdapterSummary, Stopped, Succeeded, reporting, write_outcome
from tfslurm.training.prepared import Prepared
from tfslurm.training.ranks import Rank, start_processes
from tfslurm.training.schedule import learning_rate


@dataclass
class LoopState:
    """All that changes in the loop besides weights and optimizer: the plan says the rest."""

    step: int = 0
    """Updates made so far; the next step's examples are the plan's at this index."""
    loss: float = float("nan")
    peak_memory: int = 0


class Trainer:
    """One process of a job.

    Every step the loss is the sum over the step's supervised tokens, of all processes, divided by
    their number; the update is the same for any number of processes and any packing.
    """

    def __init__(self, paths: JobPaths, rank: Rank) -> None:
        self.paths, self.rank = paths, rank
        self.config = TrainingConfig.read(paths.config)
        self.prepared = Prepared.read(paths.prepared)
        self.device = start_processes(rank, self.config.processes.threads)
        self._load_plan()
        self._build_engine()
        self.state = LoopState()

    def _load_plan(self) -> None:
        from tfslurm.training.plan import Plan
        from tfslurm.training.tokens import TokenFile

        self.plan = Plan.load(Path(self.prepared.plan))
        self.tokens = TokenFile(Path(self.prepared.tokens))
        if self.plan.world_size != self.rank.world_size:
            raise ConfigurationError(
                f"the plan is for {self.plan.world_size} processes, and {self.rank.world_size} run",
                hint="start as many as processes.nodes × processes.per_node in training.json",
            )

    def _build_engine(self) -> None:
        import deepspeed
        import torch

        from tfslurm.training.loss import SupervisedLoss
        from tfslurm.training.model import add_lora, linear_layers, load_base, quieten, trainable, zero3_context

        options = read_json(self.paths.deepspeed)
        if options is None:
            raise ConfigurationError(f"{self.paths.deepspeed} is missing", hint="it is rendered with training.json")
        quieten()
        partitioned = zero3_context(self.config, options)
        base = load_base(self.config)
        self.modules = linear_layers(base)
        torch.manual_seed(self.config.seed)
        model = SupervisedLoss(
            add_lora(base, self.config),
            bounds_on_device=self.config.trainer.attention == "flash_attention_2",
        )
        model.train()
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable(model), config=options)
        del partitioned
        _require_fp32_masters(self.engine)
        torch.manual_seed(self.config.seed + self.rank.rank)

    def run(self) -> bool:
        """Train to the end of the plan; False where a stop was asked for. Raises InvalidError on a loss of nan."""
        from tfslurm.training.progress import Reporter

        reporter = None
        if self.rank.first:
            reporter = Reporter(
                self.paths.progress,
                self.paths.metrics,
                steps=self.plan.steps,
                tokens=int(self.plan.tokens[self.state.step :].sum()),
                clock=time.monotonic,
            )
        while self.state.step < self.plan.steps:
            if self._stop_agreed():
                return False
            rate = self._step()
            if reporter:
                self._report(reporter, rate)
        return True

    def _step(self) -> float:
        """Make one update; returns its learning rate."""
        from tfslurm.training.batches import micro_batch

        hyperparameters = self.config.hyperparameters
        index = self.state.step
        rate = learning_rate(
            index + 1,
            self.plan.steps,
            peak=hyperparameters.learning_rate,
            warmup_ratio=self.config.trainer.warmup_ratio,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        groups = self.plan.micro_batches(index, self.rank.rank)
        divisor = float(self.plan.supervised[index])
        total = 0.0
        for number, examples in enumerate(groups):
            batch = micro_batch(self.tokens, examples, hyperparameters.max_seq_length, self.device)
            self.engine.set_gradient_accumulation_boundary(number == len(groups) - 1)
            loss = self.engine(batch) / divisor
            total += loss.item()
            # DeepSpeed averages gradients over the processes; the divisor counts all of them already.
            self.engine.backward(loss * self.rank.world_size, scale_wrt_gas=False)
        self.engine.step()
        self._agree(total)
        return rate

    def _agree(self, loss: float) -> None:
        """Sum the loss over the processes and take the largest peak memory."""
        import torch
        from torch import distributed

        values = torch.tensor([loss], dtype=torch.float64, device=self.device)
        peak = torch.tensor([_peak_memory(self.device)], dtype=torch.int64, device=self.device)
        distributed.all_reduce(values)
        distributed.all_reduce(peak, op=distributed.ReduceOp.MAX)
        self.state.step += 1
        self.state.loss, self.state.peak_memory = values.item(), int(peak.item())
        if not torch.isfinite(values).item():
            raise InvalidError(
                f"the loss became {self.state.loss} at step {self.state.step}",
                hint="lower the learning rate, or look at the rows of that step",
            )

    def _stop_agreed(self) -> bool:
        import torch
        from torch import distributed

        asked = self.rank.first and self.paths.stop.exists()
        flag = torch.tensor([int(asked)], device=self.device)
        distributed.broadcast(flag, src=0)
        return bool(flag.item())

    def _report(self, reporter, rate: float) -> None:
        index = self.state.step - 1
        norm = self.engine.get_global_grad_norm()
        reporter.step(
            self.state.step,
            epoch=int(self.plan.epoch[index]),
            loss=self.state.loss,
            learning_rate=rate,
            grad_norm=float(norm) if norm is not None else float("nan"),
            tokens=int(self.plan.tokens[index]),
            supervised=int(self.plan.supervised[index]),
            peak_memory=self.state.peak_memory,
        )

    def save(self) -> AdapterSummary | None:
        """Save and verify the adapter; every process calls it, and the first returns the summary.

        `adapter/` appears whole and verified, or not at all. Ends the engine: its memory is needed
        to load the base model once more.
        """
        from tfslurm.training import adapter
        from tfslurm.training.batches import micro_batch
        from tfslurm.training.model import gather_trainable

        limit = self.config.hyperparameters.max_seq_length
        probe = micro_batch(self.tokens, self.plan.examples[:1], limit, self.device)
        self.engine.eval()
        trained = adapter.log_probabilities(self.engine, probe)
        tensors = gather_trainable(self.engine.module.model)
        if not self.rank.first:
            return None
        folder = adapter.temporary_folder(self.paths.folder)
        try:
            model = self.engine.module.model
            adapter.write_adapter(folder, model, tensors, self.config, steps=self.state.step, loss=self.state.loss)
            del model, self.engine
            summary = adapter.verify_files(folder, self.modules, self.config.hyperparameters.lora_rank)
            adapter.verify_effect(folder, self.config, probe, trained)
            adapter.publish(folder, self.paths.adapter)
        except BaseException:
            shutil.rmtree(folder)
            raise
        print(f"adapter saved and verified: {self.paths.adapter}", flush=True)
        return summary

    def succeeded(self, summary: AdapterSummary) -> Succeeded:
        return Succeeded(
            steps=self.state.step,
            final_loss=self.state.loss,
            adapter=summary,
            examples=self.prepared.examples,
            tokens=self.prepared.token_count,
            peak_memory_bytes=self.state.peak_memory,
        )


def train(paths: JobPaths, rank: Rank) -> None:
    """Train, save and verify the adapter; the first process writes the outcome, last of all."""
    trainer = Trainer(paths, rank)
    if not trainer.run():
        if rank.first:
            write_outcome(paths.outcome, Stopped(step=trainer.state.step))
            print(f"stopped after step {trainer.state.step}, as asked", flush=True)
        return
    summary = trainer.save()
    if summary is not None:
        write_outcome(paths.outcome, trainer.succeeded(summary))


def _require_fp32_masters(engine) -> None:
    """Adam's updates are too small for bfloat16: what it updates must be fp32, whatever the module holds."""
    import torch

    optimizer = engine.optimizer
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if masters is None:
        inner = getattr(optimizer, "optimizer", optimizer)
        masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    wrong = {str(master.dtype) for master in masters if master.dtype != torch.float32}
    if wrong or not masters:
        raise ConfigurationError(f"the optimizer updates {', '.join(wrong) or 'nothing'} rather than fp32 masters")


def _peak_memory(device) -> int:
    """Bytes: allocated on the device, or resident where the device is the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfslurm.training.trainer", description=__doc__)
    parser.add_argument("folder", type=Path, help="the job's folder")
    paths = JobPaths(parser.parse_args(argv).folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return reporting(paths.outcome, lambda: _attempt(paths))


def _attempt(paths: JobPaths) -> None:
    rank = Rank.from_environment(os.environ)
    if rank.first:
        paths.outcome.unlink(missing_ok=True)
    train(paths, rank)


if __name__ == "__main__":
    sys.exit(main())
