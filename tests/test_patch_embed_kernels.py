"""Patch embedding: kernels against references, references against a convolution of the augmented image and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import DEVICE, Kernels, launched, poisoned, within_budget
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import augment, map_cells
from smi_kernels.launch import count_launches
from smi_kernels.patch_embed import reference

kernels = Kernels("patch_embed")

JITTERS: dict[str, list[list[int]] | None] = {
    "none": None,
    "shared": [[3, -5, 1]],
    "whole patches": [[4, -4, 0], [-8, 4, 1], [0, 0, 0]],
    "each its own": [[-1, 2, 1], [2, -2, 0], [-7, 6, 1]],
    "beyond the image": [[-29, 50, 1], [31, -37, 0], [24, -64, 1]],
}
# Image, patch, channels.
SIZES = [((12, 16), (4, 4), 3), ((6, 12), (2, 3), 1), ((8, 8), (8, 4), 2)]


def draw(
    size: tuple[int, int], patch: tuple[int, int], C: int, K: int | None, jitter: str, dtype: torch.dtype, D: int = 72
) -> tuple[Any, ...]:
    """Arguments of `embed_tokens` for three images, two prefix tokens, and width `D`."""
    generator = torch.Generator().manual_seed(0)
    cells = size[0] // patch[0] * (size[1] // patch[1])
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    keep = None
    if K is not None:
        keep = torch.stack([torch.randperm(cells, generator=generator)[:K] for _ in range(3)]).to(DEVICE)
    offsets = JITTERS[jitter] and torch.tensor(JITTERS[jitter], device=DEVICE)
    weight = (normal(D, C * patch[0] * patch[1]) / 5).to(dtype)
    return normal(3, C, *size).to(wide), keep, offsets, weight, normal(cells, D).to(wide), normal(2, D).to(wide), *patch


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("K", [None, 1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_compute_what_the_references_do(size: Any, K: int | None, jitter: str) -> None:
    args = draw(*size, K, jitter, torch.float64)
    images, keep, offsets, weight = args[:4]
    with poisoned():
        x, x_low, stats = kernels.embed_tokens(*args)
        dx = torch.randn_like(x)
        scale = torch.rand(3, dtype=torch.float64, device=DEVICE)
        d_patches = kernels.embed_tokens_dx(dx, weight, 2, scale)
        d_images = kernels.patches_to_pixels(d_patches, keep, offsets, *images.shape[2:], *args[6:])
    expected = reference.embed_tokens(*args)
    for ours, theirs in zip((x, x_low, stats), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert torch.equal(x[:, :2], args[5].expand(3, -1, -1))
    torch.testing.assert_close(d_patches, reference.embed_tokens_dx(dx, weight, 2, scale), rtol=1e-11, atol=1e-11)
    theirs = reference.patches_to_pixels(d_patches, keep, offsets, *images.shape[2:], *args[6:])
    assert torch.equal(d_images, theirs)  # it only moves numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    args = draw((12, 16), (4, 4), 3, 7, "each its own", dtype)
    with poisoned():
        found = kernels.embed_tokens(*args)
        d_patches = kernels.embed_tokens_dx(found[0].to(dtype), args[3], 2, None)
    expected = reference.embed_tokens(*args)
    doubled = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    exact = reference.embed_tokens(*doubled)
    factor = 6.0 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2.0  # the interpreter cuts bits off
    assert within_budget(found[0], expected[0], exact[0], factor)
    assert within_budget(found[2], expected[2], exact[2], factor)
    assert found[1].dtype == dtype and found[1].numel() == (0 if dtype == torch.float32 else found[0].numel())
    exact_d = reference.embed_tokens_dx(found[0].to(dtype).double(), args[3].double(), 2, None)
    assert within_budget(d_patches, reference.embed_tokens_dx(found[0].to(dtype), args[3], 2, None), exact_d, 2.0)


@pytest.mark.parametrize("jitter", ["none", "shared", "whole patches"])
def test_reference_is_a_convolution_of_the_augmented_image(jitter: str) -> None:
    args = draw((12, 16), (4, 4), 3, None, jitter, torch.float64)
    images, _, offsets, weight, position, prefix = args[:6]
    augmented = images if offsets is None else augment(images, offsets)
    dense = F.conv2d(augmented, weight.view(-1, 3, 4, 4), stride=4).flatten(2).transpose(1, 2) + position
    x, _, _ = reference.embed_tokens(*args)
    torch.testing.assert_close(x[:, 2:], dense, rtol=1e-11, atol=1e-11)
    assert torch.equal(x[:, :2], prefix.expand(3, -1, -1))

    keep = torch.tensor([[0, 7, 5], [11, 1, 2], [3, 4, 6]], device=DEVICE)
    cells = keep if offsets is None else map_cells(keep, offsets, (3, 4), (4, 4))
    kept, _, _ = reference.embed_tokens(images, keep, *args[2:])
    torch.testing.assert_close(kept[:, 2:], dense.gather(1, cells[..., None].expand(-1, -1, dense.shape[2])))


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("K", [None, 1, 5])
def test_the_way_back_is_the_gradient(K: int | None, jitter: str) -> None:
    args = draw((12, 16), (4, 4), 3, K, jitter, torch.float64)
    images = args[0].requires_grad_(True)
    x, _, _ = reference.embed_tokens(*args)
    dx = torch.randn_like(x)
    (expected,) = torch.autograd.grad(x, images, dx)
    d_patches = kernels.embed_tokens_dx(dx, args[3], 2, None)
    found = kernels.patches_to_pixels(d_patches, args[1], args[2], 12, 16, 4, 4)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    read = 12 if K is None else K
    assert (found != 0).sum() == 3 * 3 * read * 16  # and exactly zero elsewhere


def test_pixels_are_those_of_the_rolled_and_flipped_image() -> None:
    """The kernel without a reference: every weight reads one pixel, and every number finds its way back."""
    images, keep, offsets, _, position, prefix = draw((6, 12), (2, 3), 2, 5, "beyond the image", torch.float64, 12)[:6]
    x, _, _ = kernels.embed_tokens(images, keep, offsets, torch.eye(12).to(images), position * 0, prefix, 2, 3)
    back = kernels.patches_to_pixels(x[:, 2:], keep, offsets, 6, 12, 2, 3)
    cells = map_cells(keep, offsets, (3, 4), (2, 3))
    for b, (dy, dx, flip) in enumerate(offsets.tolist()):
        rolled = images[b].roll((dy, dx), (1, 2))
        rolled = rolled.flip(2) if flip else rolled
        kept = torch.zeros_like(rolled)
        for token, cell in enumerate(cells[b].tolist()):
            y, left = cell // 4 * 2, cell % 4 * 3
            read = rolled[:, y : y + 2, left : left + 3]
            torch.testing.assert_close(x[b, 2 + token], read.flatten(), rtol=1e-12, atol=1e-12)
            kept[:, y : y + 2, left : left + 3] = read
        kept = kept.flip(2) if flip else kept
        torch.testing.assert_close(back[b], kept.roll((-dy, -dx), (1, 2)), rtol=1e-12, atol=1e-12)


def spread(tensor: Any) -> Any:
    """The same numbers at every other place, NaN between them."""
    if not isinstance(tensor, Tensor):
        return tensor
    apart = torch.full((*tensor.shape, 2), -1 if tensor.dtype == torch.int64 else torch.nan).to(tensor)
    apart[..., 0] = tensor
    return apart[..., 0]


def test_tensors_may_be_strided() -> None:
    args = draw((12, 16), (4, 4), 3, 5, "each its own", torch.float64)
    x, _, stats = kernels.embed_tokens(*args)
    strided = kernels.embed_tokens(*map(spread, args))
    assert torch.equal(x, strided[0]) and torch.equal(stats, strided[2])
    channels_last = args[0].to(memory_format=torch.channels_last)
    assert torch.equal(x, kernels.embed_tokens(channels_last, *args[1:])[0])
    back = (x, args[3], 2, torch.rand(3, dtype=torch.float64, device=DEVICE))
    d_patches = kernels.embed_tokens_dx(*back)
    assert torch.equal(d_patches, kernels.embed_tokens_dx(*map(spread, back)))
    pixels = (d_patches, args[1], args[2], 12, 16, 4, 4)
    assert torch.equal(kernels.patches_to_pixels(*pixels), kernels.patches_to_pixels(*map(spread, pixels)))


def test_a_model_without_prefix_tokens() -> None:
    args = draw((8, 8), (4, 4), 3, 3, "each its own", torch.float64)
    args = (*args[:5], args[5][:0], *args[6:])
    x, _, _ = kernels.embed_tokens(*args)
    torch.testing.assert_close(x, reference.embed_tokens(*args)[0], rtol=1e-11, atol=1e-11)
    d_patches = kernels.embed_tokens_dx(x, args[3], 0, None)
    torch.testing.assert_close(d_patches, x @ args[3], rtol=1e-11, atol=1e-11)


def test_slot_table_undoes_keep() -> None:
    keep = torch.tensor([[2, 0], [1, 3]])
    assert reference.slot_table(keep, 4).tolist() == [[1, -1, 0, -1], [-1, 0, -1, 1]]


def test_patch_of_sixteen_one_launch_and_the_same_bits_twice() -> None:
    args = draw((32, 32), (16, 16), 3, 3, "shared", torch.float32)
    with count_launches() as launches:
        once = kernels.embed_tokens(*args)
        back = kernels.embed_tokens_dx(once[0], args[3], 2, None)
        pixels = kernels.patches_to_pixels(back, args[1], args[2], 32, 32, 16, 16)
    assert [launch.name for launch in launches] == launched(
        [
            "embed_tokens_kernel",
            "embed_tokens_dx_kernel",
            "patches_to_pixels_kernel",
        ]
    )
    assert torch.equal(pixels, reference.patches_to_pixels(back, args[1], args[2], 32, 32, 16, 16))
    torch.testing.assert_close(once[0], reference.embed_tokens(*args)[0], rtol=1e-4, atol=1e-4)
    again = kernels.embed_tokens(*args)
    assert all(map(torch.equal, once, again))
    assert torch.equal(back, kernels.embed_tokens_dx(once[0], args[3], 2, None))


def test_no_images_no_launch() -> None:
    args = draw((12, 16), (4, 4), 3, 5, "shared", torch.float32)
    with count_launches() as launches:
        x, _, stats = kernels.embed_tokens(args[0][:0], args[1][:0], *args[2:])
        d_patches = kernels.embed_tokens_dx(x, args[3], 2, None)
        d_images = kernels.patches_to_pixels(d_patches, args[1][:0], args[2], 12, 16, 4, 4)
    assert not launches and x.shape == (0, 7, 72) and stats.shape[0] == 0 and d_images.shape == (0, 3, 12, 16)
