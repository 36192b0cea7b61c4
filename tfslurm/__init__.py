"""A Token Factory that an organization runs on its own Slurm cluster."""

__version__ = "0.1.0"
