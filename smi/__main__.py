"""``python -m smi``: the command line, for ``torchrun -m smi``."""

from smi.cli import main

main()
