"""`tfslurm` and `python -m tfslurm`."""

from tfslurm.cli.main import main

if __name__ == "__main__":
    main()
