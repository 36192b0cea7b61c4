"""A trainer in a process that is forked from one which has imported what takes long."""

from __future__ import annotations

import os
import sys


def run(folder: str, environment: dict[str, str], output: str) -> None:
    """Train the job in `folder`, with everything that is printed in the file `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    from tfslurm.training.trainer import main

    sys.exit(main([folder]))
