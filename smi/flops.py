"""How much arithmetic one iteration costs, counted operator by operator while it runs, never estimated."""

from __future__ import annotations

import weakref
from math import prod
from typing import TYPE_CHECKING, Any

import torch

import smi_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from smi.adapters.timm import SparseModel


# Of each network by patches, batch and the share that merging leaves. To count takes the host a forward and a
# backward, and every batch asks again at each of its prunings.
_counted: weakref.WeakKeyDictionary[SparseModel, dict[Any, int]] = weakref.WeakKeyDictionary()


def probe_inputs(model: SparseModel, kept: int, batch: int) -> tuple[Tensor, Tensor | None]:
    """Images (batch, C, H, W) of zeros that require a gradient, and the cells that feed `kept` patches (None = all)."""
    images = torch.zeros(batch, *model.info.input_size, device=model.device, dtype=model.dtype, requires_grad=True)
    if kept == model.info.num_patches:
        return images, None
    return images, torch.arange(kept, device=model.device).expand(batch, kept)


def count_flops(model: SparseModel, kept: int, batch: int = 1) -> int:
    """Floating-point operations of one forward and one gradient with respect to the images.

    A multiplication and an addition count as two; only matrix products, convolutions and attention are counted, as in
    `torch.utils.flop_counter`. Images never interact, so the count is proportional to `batch`. Counted once a network.

    Args:
        kept: patches fed for each image, 1 to the model's number of patches.
        batch: images.
    """
    known = _counted.setdefault(model, {})
    key = kept, batch, model.merging_to
    if key not in known:
        known[key] = _count(model, kept, batch)
    return known[key]


def _count(model: SparseModel, kept: int, batch: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    images, cells = probe_inputs(model, kept, batch)
    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter, torch.enable_grad():
        logits, _ = model(images, cells)
        logits.sum().backward()  # the weights are frozen: only the images get a gradient
    return int(counter.get_total_flops())


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for operations of our own, and the CPU's fused attention where torch does not bring one."""
    from torch.utils.flop_counter import flop_registry

    missing = {op: formula for op, formula in _cpu_attention() if op not in flop_registry}
    return {**missing, **smi_kernels.flop_formulas()}


def _cpu_attention() -> Iterator[tuple[Any, Callable[..., int]]]:
    aten = torch.ops.aten
    yield aten._scaled_dot_product_flash_attention_for_cpu, _attention_flops
    yield aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward_flops


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Shapes (B, H, Q, D), (B, H, K, D), (B, H, K, E): scores and the weighted sum."""
    return int(2 * prod(query[:3]) * key[2] * (query[3] + value[3]))


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Shapes as above after the output's gradient: scores once more, then those of values, weights, queries, keys."""
    return int(2 * prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3]))
