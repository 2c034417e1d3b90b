"""Rotary position embeddings (Su et al., "RoFormer", 2021, section 3.2.2) of queries and keys, around the attention.

Each pair (x[j], x[j + d / 2]) of a query or key is turned by an angle of its token. Operations of PyTorch, in the wide
dtype. Turning back is turning by the negative angle, and leaves products with other turned vectors as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smi_kernels.patch_embed.reference import map_cells


def tokens(
    keep: Tensor | None,
    offsets: Tensor | None,
    batch: int,
    prefix: int,
    cells: int,
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """(B, N) rows of `VitWeights.rotary` of all tokens: prefix tokens, then the cells that `embed_tokens` reads.

    Args:
        keep, offsets: of `embed_tokens`.
    """
    if keep is None:  # all patches are fed in the order of the augmented image
        fed = torch.arange(cells, device=device).expand(batch, -1)
    else:
        fed = keep if offsets is None else map_cells(keep, offsets, grid, patch_size)
    return torch.cat((torch.arange(prefix, device=device).expand(batch, -1), prefix + fed), dim=1)


def angles(table: Tensor | None, places: Tensor | None) -> Callable[[int], Tensor | None]:
    """By a block's number (B, N, H or 1, 2, d) sines and cosines of its tokens, gathered once if all blocks share them.

    Args:
        table: `VitWeights.rotary`, (blocks or 1, prefix + cells, H or 1, 2, d); None turns nothing.
        places: (B, N) of `tokens`.
    """
    if table is None or places is None:
        return lambda number: None
    if len(table) > 1:
        return lambda number: table[number][places]
    shared = table[0][places]
    return lambda number: shared


def turn_(x: Tensor, by: Tensor) -> None:
    """Turn (B, N, parts, H, d) queries and keys, or keys alone, in place.

    Args:
        by: of `angles`.
    """
    x.copy_(_turned(x.to(by.dtype), by[:, :, None, :, 0], by[:, :, None, :, 1]))


def turn_dx_(dx: Tensor, by: Tensor, dstats: Tensor, colsum: Tensor, bias: Tensor) -> None:
    """The gradient before turning from that behind it, in place, and the same in the row sums of `attention_dx`.

    Of those, ``dx (x - bias)`` contains a product that turning leaves as it is, so that only its bias counts.

    Args:
        dx: (B, N, parts, H, d).
        by: of `angles`.
        dstats: (B N, H, 2), changed too.
        colsum, bias: (parts H d) of the layer that made x.
    """
    turned = _turned(dx.to(by.dtype), -by[:, :, None, :, 0], by[:, :, None, :, 1]).to(dx.dtype)
    change = turned.to(by.dtype) - dx.to(by.dtype)
    dx.copy_(turned)
    shape = (*dx.shape[2:],)
    sums = [(change * factor.view(shape)).sum(dim=(2, 4)).flatten(0, 1) for factor in (colsum, -bias)]
    dstats += torch.stack(sums, dim=2)


def _turned(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
