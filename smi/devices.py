"""The device that a word on the command line means."""

from __future__ import annotations

import os

import torch

from smi.errors import SmiError


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is a GPU, else the CPU; under torchrun the GPU of this process's LOCAL_RANK, else the first.

    Raises `SmiError` for a device that is not there.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK", "")
        return torch.device(f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() else "cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise SmiError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SmiError(f"device is {device!r}, but no CUDA GPU is visible; use cpu or auto.")
        if chosen.index is not None and chosen.index >= torch.cuda.device_count():
            raise SmiError(f"device is {device!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0.")
    elif chosen.type != "cpu":
        raise SmiError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N.")
    return chosen
