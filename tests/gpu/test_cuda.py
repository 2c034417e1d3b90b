"""What only a GPU can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

import smi
from smi.embedded import load_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible")
CONFIG = smi.preset("demo").replace(iterations=24, prune_at=(4, 8, 12, 16))
TARGETS = list(range(10))


def test_iterations_never_wait_for_the_device() -> None:
    inversion = smi.Inversion(load_teacher(), TARGETS, CONFIG, device="cuda")
    while not inversion.done:
        if inversion.iteration in inversion.schedule:  # records are taken here, once a phase
            inversion.step()
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            inversion.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert inversion.result().keep.shape == (10, 16)


def test_first_iterations_are_those_of_the_cpu() -> None:
    """Before rounding grows: the gradient of noise, in IEEE float32 on both."""
    on_cpu, on_gpu = (smi.Inversion(load_teacher(), TARGETS, CONFIG, device=device) for device in ("cpu", "cuda"))
    for inversion in (on_cpu, on_gpu):
        inversion.step()
    assert torch.equal(on_cpu.offsets, on_gpu.offsets.cpu())
    assert on_gpu.latest()["total"] == pytest.approx(on_cpu.latest()["total"], rel=1e-4)
    moved = (on_cpu.images - on_gpu.images.cpu()).abs() > 1e-3
    assert moved.float().mean() < 1e-3  # Adam's first step is the sign of the gradient


def test_the_same_bits_twice() -> None:
    first, again = (smi.invert(load_teacher(), TARGETS, CONFIG, device="cuda") for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.keep, again.keep)
