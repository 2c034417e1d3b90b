"""The one door through which every Triton kernel is launched, so that launches can be counted, or recorded instead.

A recorded launch does not run: launchers given tensors on the meta device then say what they would launch, which is how
kernels are compiled ahead of time for GPUs that are not there.

With `SMI_PDL=1` in the environment kernels are launched as programmatic dependents (CUDA C++ Programming Guide,
"Programmatic Dependent Launch"; compute capability 9.0): the next one is set up while this one runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import Context, ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DEPENDENT_LAUNCH = os.environ.get("SMI_PDL") == "1"


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: numbers of programs along each axis.
        args: arguments by name: tensors, numbers, compile-time constants.
        options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``, ``maxnreg``, ``launch_pdl``.
        compiled: what Triton made of it for this GPU; None if it was interpreted or did not run.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any] = field(repr=False)
    options: dict[str, int]
    compiled: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


_observed: ContextVar[tuple[tuple[list[Launch], bool], ...]] = ContextVar("observed", default=())


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
) -> None:
    """Run `kernel` on the device and current stream of its tensors; nothing if the grid is empty.

    `max_registers` of a thread takes the choice from NVIDIA's assembler, which at times spills for the sake of
    occupancy.

    Raises:
        ValueError: a grid larger than CUDA allows (2^31 - 1 along the first axis, 65535 along the others).
    """
    if 0 in grid:
        return
    if grid[0] >= 2**31 or any(n > 65535 for n in grid[1:]):
        raise ValueError(f"{kernel.__name__} needs a grid of {grid} programs; CUDA allows at most (2^31 - 1, 65535).")
    # Whether a product and a sum are rounded once or twice is part of the bits, and Triton's default will change.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if DEPENDENT_LAUNCH:
        options["launch_pdl"] = True
    if max_registers is not None and torch.version.hip is None:  # which has no such option
        options["maxnreg"] = max_registers
    for seen, runs in _observed.get():
        seen.append(Launch(kernel, grid, args, options))
        if not runs:
            return
    device = next(value.device for value in args.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        compiled = kernel[grid](**args, **options)
    for seen, _ in _observed.get():
        seen[-1] = replace(seen[-1], compiled=compiled)


@contextlib.contextmanager
def _observe(runs: bool) -> Iterator[list[Launch]]:
    seen: list[Launch] = []
    token = _observed.set(((seen, runs), *_observed.get()))
    try:
        yield seen
    finally:
        _observed.reset(token)


def count_launches() -> contextlib.AbstractContextManager[list[Launch]]:
    """Within this context every launch is listed, and runs."""
    return _observe(runs=True)


def show_in(context: Context) -> None:
    """Let launches under `context` be listed for whoever lists them here: in a thread of autograd's own, which has no
    context, for whoever called its backward, if PyTorch says who that was, else as they would be."""
    caller = torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None
    observed = _observed.get() if caller is None else caller.get(_observed, ())
    if observed or caller is not None:
        context.run(_observed.set, observed)


def recording() -> bool:
    """Whether launches are recorded and do not run."""
    return any(not runs for _, runs in _observed.get())


def record_launches() -> contextlib.AbstractContextManager[list[Launch]]:
    """Within this context every launch is listed, and does not run; tensors may be on the meta device."""
    return _observe(runs=False)
