"""Half-done inversions: all that the iterations still to come depend on, as tensors and plain numbers, and back.

A state is taken between two iterations and goes into a new `smi.Inversion` of the same arguments. On a device of the
same kind that one ends as the first would have, bit for bit. An objective that keeps a state of its own begins it anew.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import smi_kernels
from smi.rebirth import Part
from smi.shard import build
from smi.state import Phase

if TYPE_CHECKING:
    from smi.inversion import Inversion

State = dict[str, Any]  # of tensors, and of what JSON can hold


def state_of(loop: Inversion) -> State:
    """All that the remaining iterations and the result depend on; its tensors are the loop's, which go on changing."""
    t = loop.iteration
    pixels = (
        {"images": loop.images, "exp_avg": loop._exp_avg, "exp_avg_sq": loop._exp_avg_sq}
        if loop._descent is None
        else {name: value for name, value in loop._descent.state_dict().items() if name != "keep"}
    )
    state: State = {f"pixels.{name}": value.detach() for name, value in pixels.items()}
    state |= {f"history.{name}": values[:t] for name, values in loop._history.items()}
    state |= {"keep": loop.keep, "dropped_at": loop._dropped_at}
    if loop._scores is not None and loop._scores.shape == loop.keep.shape:  # for a pruning that is still to come
        state["scores"] = loop._scores
    if loop._best is not None:
        state["best.images"], state["best.values"] = loop._best
    for number, (_, picture) in enumerate(loop._snapshots):
        state[f"snapshot.{number}"] = picture
    for number, part in enumerate(loop._parts):
        state[f"part.{number}.images"], state[f"part.{number}.keep"] = part.images, part.keep
    return state | {
        "iteration": t,
        "snapshot_at": [at for at, _ in loop._snapshots],
        "taken_at": [part.taken_at for part in loop._parts],
        "phases": [asdict(phase) for phase in loop._phases],
        "phase_start": list(loop._phase_start),
        "seconds": loop._seconds,
        "converged": loop._converged,
    }


def restore(loop: Inversion, state: State) -> None:
    """Put `state` into `loop`, which has done no iteration.

    Raises:
        ValueError, LookupError, TypeError: it is damaged, or of a loop of other arguments or another backend.
    """
    t, shape = state["iteration"], loop.images.shape
    if not isinstance(t, int) or not 0 <= t <= loop.config.iterations:
        raise ValueError(f"it is at iteration {t!r} of {loop.config.iterations}")

    def tensor(name: str, *size: int | None, dtype: torch.dtype = loop.images.dtype) -> Tensor:
        value = state[name]
        fits = isinstance(value, Tensor) and value.dtype == dtype and value.ndim == len(size)
        if not fits or any(want not in (None, have) for want, have in zip(size, value.shape, strict=True)):
            raise ValueError(f"its {name} is not a {dtype} tensor of shape {size}")
        return value.to(loop.images.device)

    keep = _kept(loop, tensor("keep", shape[0], None, dtype=torch.int64), t)
    histories = {name: tensor(f"history.{name}", t, dtype=old.dtype) for name, old in loop._history.items()}
    pixels = {name: tensor(f"pixels.{name}", *shape) for name in ("images", "exp_avg", "exp_avg_sq")}
    parts = [
        Part(int(at), tensor(f"part.{n}.images", *shape), tensor(f"part.{n}.keep", shape[0], None, dtype=torch.int64))
        for n, at in enumerate(state["taken_at"])
    ]
    shown = min(loop.config.snapshots, shape[0])
    pictures = [
        (int(at), tensor(f"snapshot.{n}", shown, *shape[1:], dtype=torch.uint8))
        for n, at in enumerate(state["snapshot_at"])
    ]
    start, seconds = state["phase_start"]
    phases = [build(Phase, phase) for phase in state["phases"]]
    dropped_at = tensor("dropped_at", *loop._dropped_at.shape, dtype=torch.int32)
    scores = tensor("scores", *keep.shape, dtype=state["scores"].dtype) if "scores" in state else None
    best = (tensor("best.images", *shape), tensor("best.values", shape[0])) if "best.images" in state else None
    if loop._descent is None:
        if "pixels.sums" in state:  # with it the curves of the built-in terms, which are not in the histories
            raise ValueError("it is of fused kernels, on which this inversion does not run")
        for place, value in zip((loop.images, loop._exp_avg, loop._exp_avg_sq), pixels.values(), strict=True):
            place.copy_(value)  # the state may be another loop's very tensors
    else:
        more = {name: state[f"pixels.{name}"] for name in ("sums", "cross_entropies", "priors")}
        pruned = {} if loop._fed(keep) is None else {"keep": keep}
        with smi_kernels.use_backend(loop.model.backend):
            loop._descent.load_state_dict({**pixels, **more, **pruned})
    for name, values in histories.items():
        loop._history[name][:t] = values
    if loop._own is not None:
        loop._own.keep = keep
    loop.iteration, loop.keep, loop._dropped_at, loop._scores, loop._best = t, keep, dropped_at, scores, best
    if loop._descent is None and loop.config.stopped == "frozen" and loop._fed(keep) is not None:
        loop._live_pixels = smi_kernels.patch_mask(loop._alive(), loop.model.info.grid, loop.model.info.patch_size)
    loop._parts, loop._snapshots, loop._phases = parts, pictures, phases
    loop._phase_start, loop._seconds = (int(start), float(seconds)), float(state["seconds"])
    loop._converged = bool(state["converged"])
    loop.resumed_at = t


def _kept(loop: Inversion, keep: Tensor, iteration: int) -> Tensor:
    """`keep`, if it can be what survives before `iteration`, where a pruning may still be due."""
    counts = [loop.keep.shape[1], *(count for at, count in loop.schedule.items() if at <= iteration)]
    fits = keep.shape[1] in (counts[-1], counts[-2:][0] if iteration in loop.schedule else counts[-1])
    if not fits or bool((keep < 0).any() | (keep >= loop.keep.shape[1]).any() | (keep.diff(dim=1) <= 0).any()):
        raise ValueError(f"its keep is not what can be fed at iteration {iteration}")
    return keep
