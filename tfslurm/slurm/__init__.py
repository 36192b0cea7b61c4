"""Handing scripts to Slurm or to this machine, and learning what became of them."""
