"""Roll, flip and the patch grid as index arithmetic inside kernels; the meaning is that of ``reference.map_cells``.

An augmentation (dy, dx, flip) means ``flip(roll(image, (dy, dx)))``: the augmented pixel (y, x) is the image's
((y - dy) mod H, (x' - dx) mod W), with x' = W - 1 - x under a flip.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_offsets(offsets_ptr, b, offsets_stride_b, HAS_OFFSETS: tl.constexpr):
    """(dy, dx, flip) as int32 of the images `b`; a stride of 0 shares one row among all."""
    if HAS_OFFSETS:
        row = offsets_ptr + b * offsets_stride_b
        dy = tl.load(row).to(tl.int32)
        dx = tl.load(row + 1).to(tl.int32)
        flip = tl.load(row + 2).to(tl.int32)
    else:
        dy = b * 0
        dx = dy
        flip = dy
    return dy, dx, flip


@triton.jit
def modulo(a, n):
    """Non-negative remainder."""
    r = a % n
    return tl.where(r < 0, r + n, r)


@triton.jit
def wrap(a, n):
    """`modulo` of what is in -n .. 2 n - 1, without a division."""
    a = tl.where(a < 0, a + n, a)
    return tl.where(a >= n, a - n, a)


@triton.jit
def whole_patches(offset, PATCH: tl.constexpr):
    """`offset` in patches, rounded half up."""
    remainder = modulo(offset, PATCH)
    return (offset - remainder) // PATCH + (2 * remainder >= PATCH).to(tl.int32)


@triton.jit
def patch_cell(patch, dy, dx, flip, ROWS, COLUMNS, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Row and column of the grid cell at which a patch of the un-augmented image lies."""
    row = modulo(patch // COLUMNS + whole_patches(dy, PATCH_H), ROWS)
    column = modulo(patch % COLUMNS + whole_patches(dx, PATCH_W), COLUMNS)
    return row, tl.where(flip != 0, COLUMNS - 1 - column, column)


@triton.jit
def source_pixel(y, x, dy, dx, flip, H, W):
    """Where the augmented pixel (y, x) comes from."""
    x = tl.where(flip != 0, W - 1 - x, x)
    return modulo(y - dy, H), modulo(x - dx, W)


@triton.jit
def pixel_slot(
    slots_ptr, b, y, x, dy, dx, flip, H, W, HAS_SLOTS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr
):
    """Which fed patch reads the image's pixel (y, x), -1 if none, and at which of its own pixels (py, px).

    `slots_ptr` (B, cells) int32 is ``reference.slot_table``; without, every cell is fed and is its own slot.
    """
    dy = modulo(dy, H).to(tl.int32)  # once an image, so that no pixel needs a division
    dx = modulo(dx, W).to(tl.int32)
    y = wrap(tl.minimum(y, H - 1) + dy, H)
    x = wrap(tl.minimum(x, W - 1) + dx, W)
    x = tl.where(flip != 0, W - 1 - x, x)
    row = y // PATCH_H
    column = x // PATCH_W
    py = y - row * PATCH_H
    px = x - column * PATCH_W
    COLUMNS = W // PATCH_W
    if HAS_SLOTS:
        ROWS = H // PATCH_H
        column = tl.where(flip != 0, COLUMNS - 1 - column, column)
        row = wrap(row - whole_patches(dy, PATCH_H), ROWS)
        column = wrap(column - whole_patches(dx, PATCH_W), COLUMNS)
        slot = tl.load(slots_ptr + b * (ROWS * COLUMNS) + row * COLUMNS + column)
    else:
        slot = row * COLUMNS + column
    return slot, py, px
