"""Which of the job's processes this is, and how they find each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tfslurm.errors import ConfigurationError

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Rank:
    """One process of the job; `local` counts within the node."""

    rank: int
    world_size: int
    local: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rank:
        """RANK, WORLD_SIZE and LOCAL_RANK, else Slurm's, else a single process.

        Raises ConfigurationError where more than one process is to find the others without
        MASTER_ADDR and MASTER_PORT.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in environment:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        values = [environment.get(name) for name in names]
        if values[0] is None:
            return cls(0, 1, 0)
        rank = cls(int(values[0]), int(values[1] or 1), int(values[2] or 0))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if rank.world_size > 1 and missing:
            raise ConfigurationError(f"{' and '.join(missing)} not set for {rank.world_size} processes")
        return rank

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set what torch and DeepSpeed read; a single process needs no address of its own choosing."""
        environment.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.local))
        if self.world_size == 1:
            environment["MASTER_ADDR"], environment["MASTER_PORT"] = "127.0.0.1", str(_free_port())


def attempt_number(environment: Mapping[str, str]) -> int:
    """Which start of the job this is, as the batch script counts them: the first is 0."""
    return int(environment.get("TFSLURM_ATTEMPT", 0))


def planned_processes(environment: Mapping[str, str], configured: int) -> int:
    """How many processes the batch script will start: an attempt may run on another instance than was configured."""
    return int(environment.get("TFSLURM_WORLD_SIZE", configured))


def usable_threads(environment: Mapping[str, str], configured: int) -> int:
    """CPU threads a process, as the batch script sets them for the instance that really runs it."""
    return int(environment.get("OMP_NUM_THREADS", configured))


def redirect_output(path: Path) -> None:
    """Let everything that this process prints go to the end of `path`, also what libraries in C print."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_processes(rank: Rank, threads: int):
    """Join the process group and return the torch device: NCCL on CUDA devices, else gloo on the CPU."""
    rank.export(os.environ)
    import torch

    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    torch.set_num_threads(threads)
    import deepspeed

    if cuda:
        torch.cuda.set_device(rank.local % torch.cuda.device_count())
    else:
        # It serves tensor-parallel inference only, and would be compiled at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=TIMEOUT, verbose=False)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
