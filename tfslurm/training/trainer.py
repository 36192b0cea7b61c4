"""The training loop on the nodes: `python -m tfslurm.training.trainer JOBFOLDER`, one process a rank."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfslurm.errors import ConfigurationError, InvalidError
from tfslurm.files import read_json
from tfslurm.paths import JobPaths
from tfslurm.training import caps, restart, resume
from tfslurm.training.config import TrainingConfig
from tfslurm.training.outcome import (
    NO_PROGRESS,
    SUSPENDED,
    AdapterSummary,
    Stopped,
    Succeeded,
    Suspended,
    has_succeeded,
    reporting,
    write_outcome,
)
from tfslurm.training.prepared import Prepared
from tfslurm.training.ranks import Rank, attempt_number, redirect_output, start_processes, usable_threads
from tfslurm.training.requests import Request, Requests, terminations
from tfslurm.training.schedule import learning_rate

LINGER = 1.0
"""Seconds that the first process waits before it leaves, so that the others are gone by then."""


@dataclass
class LoopState:
    """All that changes in the loop besides weights and optimizer: the plan says the rest."""

    step: int = 0
    """Updates made so far; the next step's examples are the plan's at this index."""
    loss: float = float("nan")
    peak_memory: int = 0


class Trainer:
    """One process of an attempt.

    Every step the loss is the sum over the step's supervised tokens, of all processes, divided by
    their number; the update is the same for any number of processes and any packing. Where an
    earlier attempt saved a state, this one goes on from there.
    """

    def __init__(self, paths: JobPaths, rank: Rank, attempt: int, terminated: threading.Event) -> None:
        self.paths, self.rank, self.attempt = paths, rank, attempt
        self.config = TrainingConfig.read(paths.config)
        self.prepared = Prepared.read(paths.prepared)
        self.device = start_processes(rank, usable_threads(os.environ, self.config.processes.threads))
        self._load_plan()
        saved = self._find_state()
        self._build_engine()
        self.state = LoopState(saved.step, saved.loss, saved.peak_memory_bytes) if saved else LoopState()
        self.first_step = self.saved_step = self.state.step
        if saved:
            self._restore(saved)
        self.requests = Requests(
            paths,
            terminated,
            first=rank.first,
            save_seconds=self.config.trainer.save_minutes * 60,
            clock=time.monotonic,
        )

    def _load_plan(self) -> None:
        from tfslurm.training.plan import Plan
        from tfslurm.training.tokens import TokenFile
        from tfslurm.training.validation import Validation

        self.plan = Plan.load(Path(self.prepared.plan))
        self.tokens = TokenFile(Path(self.prepared.tokens))
        self.cap: caps.Cap | None = self._from_first(caps.read(self.paths.cap) if self.rank.first else None)
        limit = self.config.hyperparameters.max_seq_length
        if self.cap and self.cap.tokens < self.plan.capacity:
            self.plan = self.plan.repacked(np.minimum(self.tokens.lengths, limit), self.cap.tokens)
        self.validation = None
        if self.prepared.validation:
            self.validation = Validation(self.prepared.validation, self.rank, limit, self.plan.capacity)
        if self.plan.world_size != self.rank.world_size:
            raise ConfigurationError(
                f"the plan is for {self.plan.world_size} processes, and {self.rank.world_size} run",
                hint="prepare plans for TFSLURM_WORLD_SIZE, or else for those in training.json",
            )

    def _find_state(self) -> resume.State | None:
        """The state to go on from, as the first process reads it. Raises InvalidError where it is of another run."""
        basis = resume.Basis.of(self.config, self.plan.steps)
        return self._from_first(resume.usable(self.paths.resume, basis) if self.rank.first else None)

    def _from_first(self, value: Any) -> Any:
        """What the first process has as `value`."""
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def _restore(self, saved: resume.State) -> None:
        from safetensors import safe_open

        from tfslurm.training import masters
        from tfslurm.training.validation import BEST

        if not self.rank.first:
            if self.validation:
                self.validation.restore(saved.measured, {})
            return masters.restore(self.engine, saved.updates, None)
        with safe_open(self.paths.resume / saved.tensors, "pt") as file:
            best = {name for name in file.keys() if name.startswith(BEST)}
            if different := (set(file.keys()) - best) ^ set(masters.names(self.engine)):
                raise InvalidError(f"the saved state and the model differ in {min(different)}", hint="start a new job")
            if self.validation:
                self.validation.restore(saved.measured, {name: file.get_tensor(name) for name in best})
            masters.restore(self.engine, saved.updates, file.get_tensor)
        print(f"going on after step {saved.step}, which attempt {saved.attempt} saved at {saved.at}", flush=True)

    def _build_engine(self) -> None:
        import deepspeed
        import torch

        from tfslurm.training import masters
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
        masters.require_fp32(self.engine)

    def run(self) -> Request:
        """Train to the end of the plan, or until LEAVE or STOP is agreed on, which is returned.

        A state is saved every `save_minutes`, and before LEAVE. Raises InvalidError on a loss of nan, OutOfMemory
        where a micro-batch does not fit.
        """
        from tfslurm.training.reports import Reports

        self.reports = None
        if self.rank.first:
            self.reports = Reports(
                self.paths, self.config, self.plan, self.engine, start=self.state.step, attempt=self.attempt
            )
        try:
            while self._validation_due() or self.state.step < self.plan.steps:
                request = self._agreed_request()
                if request in (Request.SAVE, Request.LEAVE) and self.state.step > self.first_step:
                    self._save_state()
                if request >= Request.LEAVE:
                    return request
                if self._validation_due():
                    self._validate()
                else:
                    self._train_step()
            return Request.NONE
        finally:
            if self.reports:
                self.reports.close()

    def _validation_due(self) -> bool:
        return self.validation is not None and self.validation.due(self.state.step)

    def _validate(self) -> None:
        """Measure the loss on the validation rows; a stop or the walltime's end interrupts it, to be made anew."""
        with self.reports.aside() if self.reports else nullcontext():
            measured = self.validation.measure(
                self.engine,
                self.state.step,
                interrupted=lambda: self._agreed_request() >= Request.LEAVE,
            )
        if measured and self.reports:
            self.reports.validated(measured)

    def _train_step(self) -> None:
        rate, state = self._step(), self.state
        if self.reports:
            self.reports.step(state.step, loss=state.loss, learning_rate=rate, peak_memory=state.peak_memory)

    def _step(self) -> float:
        """Make one update; returns its learning rate."""
        import torch

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
        # Dropout is the same whether the steps before were made by this attempt or by an earlier one.
        torch.manual_seed(_step_seed(self.config.seed, index, self.rank.rank))
        groups = self.plan.micro_batches(index, self.rank.rank)
        divisor = float(self.plan.supervised[index])
        total = 0.0
        for number, examples in enumerate(groups):
            batch = micro_batch(self.tokens, examples, hyperparameters.max_seq_length, self.device)
            self.engine.set_gradient_accumulation_boundary(number == len(groups) - 1)
            with caps.fitting(batch):
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
        self.state.loss, self.state.peak_memory = values.item(), max(self.state.peak_memory, int(peak.item()))
        if not torch.isfinite(values).item():
            raise InvalidError(
                f"the loss became {self.state.loss} at step {self.state.step}",
                hint="lower the learning rate, or look at the rows of that step",
            )

    def _agreed_request(self) -> Request:
        import torch
        from torch import distributed

        request = torch.tensor([self.requests.heard()], dtype=torch.int64, device=self.device)
        distributed.all_reduce(request, op=distributed.ReduceOp.MAX)
        return Request(int(request.item()))

    def _save_state(self) -> None:
        """Every process calls it; the first writes. Where it cannot, the log tells, and the earlier state stays."""
        from tfslurm.training import masters

        started = time.monotonic()
        tensors = masters.gather(self.engine, keep=self.rank.first)
        if not self.rank.first:
            return
        if self.validation:
            tensors |= self.validation.tensors()
        self.requests.saved()
        try:
            self.reports.sync()
            saved = resume.save(self.paths.resume, self._resumable(masters.updates(self.engine)), tensors)
        except OSError as error:
            print(f"WARNING: the state after step {self.state.step} could not be saved: {error}", flush=True)
            return
        self.saved_step = self.state.step
        seconds = time.monotonic() - started
        print(f"state after step {saved.step} saved: {saved.size / 1e6:,.1f} MB in {seconds:.2f} s", flush=True)

    def _resumable(self, updates: int) -> resume.State:
        return resume.State(
            attempt=self.attempt,
            step=self.state.step,
            loss=self.state.loss,
            peak_memory_bytes=self.state.peak_memory,
            updates=updates,
            world_size=self.rank.world_size,
            basis=resume.Basis.of(self.config, self.plan.steps),
            measured=self.validation and self.validation.measured,
        )

    def save(self) -> AdapterSummary | None:
        """Save and verify the adapter; every process calls it, and the first returns the summary.

        It is that of the best step where the loss was measured on validation rows, else that of the last.
        `adapter/` appears whole and verified, or not at all. Ends the engine: its memory is needed
        to load the base model once more.
        """
        from tfslurm.training import adapter
        from tfslurm.training.batches import micro_batch
        from tfslurm.training.model import gather_trainable

        limit = self.config.hyperparameters.max_seq_length
        probe = micro_batch(self.tokens, self.plan.examples[:1], limit, self.device)
        self.engine.eval()
        if self.validation:
            self.validation.put_best(self.engine)
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
        measured = self.validation.measured if self.validation else None
        return Succeeded(
            steps=self.state.step,
            final_loss=self.state.loss,
            validation_loss=measured and measured.best_loss,
            best_step=measured and measured.best_step,
            final_validation_loss=measured and measured.loss,
            adapter=summary,
            examples=self.prepared.examples,
            tokens=self.prepared.token_count,
            peak_memory_bytes=self.state.peak_memory,
            attempt=self.attempt,
        )

    def leave(self) -> int:
        """Tell what was saved; returns the exit code, in the first process alone.

        srun and the batch script end all processes once one has ended badly, and report the highest code of any:
        so the others end well, and before the first does.
        """
        from torch import distributed

        made = self.saved_step - self.first_step
        if self.rank.first:
            outcome = Suspended(step=self.saved_step, steps_made=made, attempt=self.attempt)
            write_outcome(self.paths.outcome, outcome)
            print(f"leaving after step {self.state.step}, to go on after step {self.saved_step}", flush=True)
        distributed.barrier()
        if not self.rank.first:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if self.rank.world_size > 1:
            time.sleep(LINGER)
        return SUSPENDED if made else NO_PROGRESS


def train(paths: JobPaths, rank: Rank, attempt: int, terminated: threading.Event) -> int:
    """Train, save and verify the adapter; the first process writes the outcome, last of all. The exit code."""
    trainer = Trainer(paths, rank, attempt, terminated)
    with restart.on_short_memory(paths, trainer.cap, trainer.plan.capacity, rank.world_size):
        request = trainer.run()
    if request is Request.LEAVE:
        return trainer.leave()
    if request is Request.STOP:
        if rank.first:
            write_outcome(paths.outcome, Stopped(step=trainer.state.step, attempt=attempt))
            print(f"stopped after step {trainer.state.step}, as asked", flush=True)
        return 0
    summary = trainer.save()
    if summary is not None:
        write_outcome(paths.outcome, trainer.succeeded(summary))
    return 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


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
    attempt = attempt_number(os.environ)
    return reporting(paths.outcome, lambda: _attempt(paths, attempt), attempt=attempt)


def _attempt(paths: JobPaths, attempt: int) -> int:
    rank, log = Rank.from_environment(os.environ), None
    if has_succeeded(paths):
        print("an earlier attempt has succeeded: nothing is left to do", flush=True)
        return 0
    if rank.first:
        paths.outcome.unlink(missing_ok=True)
    else:
        log = paths.rank_log(attempt, rank.rank)
        redirect_output(log)
    with terminations() as terminated:
        return reporting(paths.outcome, lambda: train(paths, rank, attempt, terminated), attempt=attempt, log=log)


if __name__ == "__main__":
    sys.exit(main())
