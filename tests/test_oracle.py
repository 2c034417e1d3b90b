"""The oracle against hand-made cases and timm, then the library against the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator

import oracle
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import smi
from smi.config import Config

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(patch: int, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float64) -> VisionTransformer:
    """Every parameter random and of order one after its layer: uneven attention, no weight that could be forgotten."""
    model = VisionTransformer(img_size=size, patch_size=patch, embed_dim=32, depth=2, num_heads=2, num_classes=7)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.ndim > 1:
                noise = noise * (1.5 / math.sqrt(parameter[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = 0.3 * noise
            parameter.copy_(noise)
    model.pretrained_cfg = {"input_size": (3, *size), "mean": MEAN, "std": STD}
    return model.eval().to(dtype)


def draw(config: Config, batch: int, size: tuple[int, int], patch: int) -> Tensor:
    """A table of augmentation draws as the description asks for."""
    config, generator = config.resolved(), torch.Generator().manual_seed(3)
    rows = batch if config.augment_per == "image" else 1
    step = patch if config.jitter == "patch" else 1
    table = torch.zeros(config.iterations, rows, 3, dtype=torch.int64)
    for axis, pixels in enumerate(size):
        reach = 0 if config.jitter == "none" else pixels // 8 // step
        table[..., axis] = torch.randint(-reach, reach + 1, table.shape[:2], generator=generator) * step
    if config.flip:
        table[..., 2] = torch.randint(0, 2, table.shape[:2], generator=generator)
    return table


def noise(batch: int, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


# ---- the oracle by itself


# An image of 4 x 4 pixels, numbered 0 to 15 in reading order, made of 2 x 2 patches of 2 x 2 pixels.
BY_HAND = {
    (0, 0, 0): ([0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
    (2, 0, 0): ([2, 3, 0, 1], [[8, 9, 10, 11], [12, 13, 14, 15], [0, 1, 2, 3], [4, 5, 6, 7]]),
    (0, 2, 0): ([1, 0, 3, 2], [[2, 3, 0, 1], [6, 7, 4, 5], [10, 11, 8, 9], [14, 15, 12, 13]]),
    (0, 0, 1): ([1, 0, 3, 2], [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8], [15, 14, 13, 12]]),
    (0, 2, 1): ([0, 1, 2, 3], [[1, 0, 3, 2], [5, 4, 7, 6], [9, 8, 11, 10], [13, 12, 15, 14]]),
    # Half a patch down is rounded to one patch down, half a patch up to none.
    (1, 0, 0): ([2, 3, 0, 1], [[12, 13, 14, 15], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    (-1, 0, 0): ([0, 1, 2, 3], [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [0, 1, 2, 3]]),
    (1, -1, 1): ([3, 2, 1, 0], [[12, 15, 14, 13], [0, 3, 2, 1], [4, 7, 6, 5], [8, 11, 10, 9]]),
}


@pytest.mark.parametrize("offset", BY_HAND)
def test_augmentation_by_hand(offset: tuple[int, int, int]) -> None:
    cells, pixels = BY_HAND[offset]
    assert list(oracle.cell_map(2, 2, 2, *offset)) == cells
    assert torch.tensor(oracle.pixel_map(4, 4, *offset)).reshape(4, 4).tolist() == pixels
    image = torch.arange(16.0).reshape(1, 4, 4)
    for cell, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        seen = oracle.read_patches(image, [cell], offset, 2)
        assert seen.flatten().tolist() == [pixels[y][x], pixels[y][x + 1], pixels[y + 1][x], pixels[y + 1][x + 1]]


@pytest.mark.parametrize(("patch", "expected"), [(4, [-1, -1, 0, 0, 0, 0, 1, 1, 1]), (8, [0, 0, 0, 0, 0, 0, 0, 0, 1])])
def test_rounding_of_offsets(patch: int, expected: list[int]) -> None:
    assert [oracle.whole_patches(d, patch) for d in range(-4, 5)] == expected


@pytest.mark.parametrize("offset", [(3, -2, 0), (-4, 1, 1), (0, 5, 1)])
def test_pixel_map_is_roll_then_flip(offset: tuple[int, int, int]) -> None:
    image = torch.arange(24.0).reshape(4, 6)
    expected = torch.roll(image, offset[:2], (0, 1))
    expected = expected.flip(1) if offset[2] else expected
    assert torch.equal(image.flatten()[list(oracle.pixel_map(4, 6, *offset))].reshape(4, 6), expected)


@pytest.mark.parametrize("offset", [(4, 0, 0), (-4, 4, 0), (4, -4, 1), (0, 0, 1)])
def test_patches_move_with_their_pixels_when_offsets_are_whole_patches(offset: tuple[int, int, int]) -> None:
    image = torch.arange(16 * 24.0).reshape(1, 16, 24)
    cells = oracle.cell_map(4, 6, 4, *offset)
    before = oracle.read_patches(image, range(24), (0, 0, 0), 4).sort(-1).values
    after = oracle.read_patches(image, cells, offset, 4).sort(-1).values
    assert torch.equal(before, after)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_forward_and_scores_are_timms(dtype: torch.dtype, tolerance: float) -> None:
    model, images = make_model(8, (32, 48), dtype), noise(3, (32, 48), dtype)
    row: list[Tensor] = []
    model.blocks[-1].attn.fused_attn = False  # only the explicit path shows its probabilities
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, out: row.append(out))
    with torch.no_grad():
        logits, scores = oracle.look(model, images, None, torch.zeros(3, 3, dtype=torch.int64))
        torch.testing.assert_close(logits, model(images), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(scores, row[0][:, :, 0, 1:].mean(1), atol=tolerance, rtol=tolerance)
    assert (scores.max(1).values > 3 * scores.min(1).values).all(), "attention is too even to rank by"


def test_kept_patches_take_the_embedding_of_their_new_cell() -> None:
    """Against timm's own modules on the augmented images, with the tokens chosen by hand."""
    model, images = make_model(8), noise(2)
    keep = torch.tensor([[0, 5, 7, 15], [1, 2, 3, 8]])
    offsets = torch.tensor([[4, -4, 0], [-3, 2, 1]])  # one patch down, none across; none at all, then flipped
    cells = torch.tensor([[4, 9, 11, 3], [2, 1, 0, 11]])
    first = torch.roll(images[0], (4, -4), (1, 2))
    second = torch.roll(images[1], (-3, 2), (1, 2)).flip(2)
    with torch.no_grad():
        tokens = model.patch_embed(torch.stack([first, second])) + model.pos_embed[:, 1:]
        tokens = torch.stack([tokens[b, cells[b]] for b in range(2)])
        start = (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1)
        expected = model.head(model.norm(model.blocks(torch.cat([start, tokens], 1)))[:, 0])
        logits, _ = oracle.look(model, images, keep, offsets)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)


def test_adam_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    config = Config()
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    parameter = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.25, betas=(0.5, 0.99), eps=1e-8)
    for step in range(1, 8):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64) * 10.0 ** (step - 9)
        parameter.grad = gradient.clone()
        optimizer.step()
        x, m, v = oracle.adam(x, gradient, m, v, step, config)
        torch.testing.assert_close(x, parameter.detach(), atol=1e-12, rtol=1e-12)


def test_objectives_against_naive_loops() -> None:
    images = noise(2, (5, 4))
    batch, channels, height, width = images.shape
    absolute, squares = [0.0] * 4, [0.0] * 4
    counts = [0] * 4
    for b in range(batch):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    for k, (ny, nx) in enumerate([(y, x + 1), (y + 1, x), (y + 1, x - 1), (y + 1, x + 1)]):
                        if ny < height and 0 <= nx < width:
                            difference = float(images[b, c, y, x] - images[b, c, ny, nx])
                            absolute[k] += abs(difference)
                            squares[k] += difference**2
                            counts[k] += 1
    assert float(oracle.tv1(images)) == pytest.approx(sum(a / n for a, n in zip(absolute, counts, strict=True)))
    assert float(oracle.tv2(images)) == pytest.approx(sum(math.sqrt(s) for s in squares))
    assert float(oracle.frobenius(images)) == pytest.approx(math.sqrt(sum(float(p) ** 2 for p in images.flatten())))
    logits, targets = images[0, 0], torch.tensor([0, 3, 1, 2, 2])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(oracle.cross_entropy(logits, targets), expected)


def test_scope_of_the_norms() -> None:
    """Per image: a sum in which an image's share does not depend on the others. Per batch: one mean, one norm."""
    images, targets = noise(3, (8, 8)), torch.tensor([0, 1, 2])
    logits = noise(3)[:, 0, 0, :7]
    weights = {"cross_entropy": 2.0, "tv1": 0.3, "tv2": 0.7, "l2": 0.11}

    def total(scope: str, chosen: list[int]) -> float:
        config = Config(norm=scope, **weights)
        return oracle.objective(logits[chosen], images[chosen], targets[chosen], config)[1]["total"]

    assert total("image", [0, 1, 2]) == pytest.approx(sum(total("image", [b]) for b in range(3)))
    entropy = torch.nn.functional.cross_entropy(logits, targets)
    by_hand = 2 * entropy + 0.3 * oracle.tv1(images) + 0.7 * oracle.tv2(images) + 0.11 * images.norm()
    assert total("batch", [0, 1, 2]) == pytest.approx(float(by_hand))
    assert total("batch", [1]) == pytest.approx(total("image", [1]))


def test_ties_go_to_the_lower_patch() -> None:
    assert oracle.highest([0.2, 0.5, 0.2, 0.5, 0.2], 3) == [0, 1, 3]
    assert oracle.highest([1.0] * 5, 2) == [0, 1]


@pytest.mark.parametrize("semantics", ["strict", "official"])
def test_what_stops_and_what_does_not(semantics: str) -> None:
    model, start, targets = make_model(8), noise(2), torch.tensor([1, 4])
    pruned = Config(semantics=semantics, iterations=14, prune_at=(5, 9), prune_ratio=(0.3, 0.5), tv2=1e-2)
    plain = pruned.replace(iterations=9, prune_at=(5,), prune_ratio=(0.3,))
    offsets = oracle.forbid_augmentation(draw(pruned, 2, (32, 32), 8), pruned)
    longer = oracle.invert(model, start, targets, offsets, pruned, MEAN, STD)
    shorter = oracle.invert(model, start, targets, offsets[:9], plain, MEAN, STD)
    assert [k.shape[1] for k in longer.keeps] == [11, 5]
    assert torch.equal(longer.keeps[0], shorter.keeps[0])
    assert longer.result_keep.shape[1] == (5 if semantics == "strict" else math.floor(17 * 0.7 * 0.5))
    live = oracle.kept_pixels(longer.keeps[1], start.shape, 8).expand_as(start)
    moved = longer.images != shorter.images
    assert moved[live].float().mean() > 0.9
    assert moved[~live].any() == (semantics == "official")


# ---- the library and the oracle

# At the default 0.25 a hundred Adam steps magnify rounding 1e5-fold and more, wherever a gradient is close to zero.
CALM = {"learning_rate": 0.01}
SHORT = {"iterations": 50}
PRIORS = {"tv1": 0.5, "tv2": 0.02, "l2": 0.01}
CASES = {
    "strict-default": (4, (32, 32), {"semantics": "strict"}),
    "official-default": (8, (32, 32), {"semantics": "official"}),
    "strict-priors": (4, (32, 32), {"semantics": "strict", **PRIORS, **CALM}),
    "official-priors-wide": (8, (32, 48), {"semantics": "official", **PRIORS, **CALM}),
    "strict-pixel-reranked": (4, (32, 32), {"jitter": "pixel", "result_mask": "reranked", **PRIORS, **CALM}),
    "strict-unjittered-evolve-batch": (
        8,
        (32, 48),
        {"jitter": "none", "augment_per": "batch", "norm": "batch", "stopped": "evolve", **PRIORS, **CALM},
    ),
    "official-patch-image-frozen-carried": (
        4,
        (40, 32),
        {
            "semantics": "official",
            "jitter": "patch",
            "augment_per": "image",
            "norm": "image",
            "stopped": "frozen",
            "result_mask": "carried",
            **PRIORS,
            **CALM,
        },
    ),
    "dense-strict": (8, (32, 32), {"strategy": "dense", "jitter": "pixel", "flip": False, **SHORT, **PRIORS, **CALM}),
    "dense-official": (8, (32, 32), {"strategy": "dense", "semantics": "official", **SHORT, **PRIORS, **CALM}),
}
TARGETS = torch.tensor([1, 4])


def make_config(changes: dict[str, object]) -> Config:
    schedule = {"prune_at": (20, 41, 60, 80), "prune_ratio": (0.3, 0.3, 0.25, 0.22)}
    return Config(iterations=100, seed=5, **schedule).replace(**changes)


def run_both(
    patch: int, size: tuple[int, int], config: Config, dtype: torch.dtype
) -> tuple[smi.Inversion, list[Tensor], oracle.OracleResult]:
    """The library's inversion, run to its end, its keep sets, and the oracle's result for the same draws."""
    inversion = smi.Inversion(make_model(patch, size, dtype), TARGETS, config)
    start, offsets, keeps = inversion.images.clone(), inversion.offsets.clone(), []
    while not inversion.done:
        inversion.step()
        if inversion.iteration - 1 in inversion.schedule:
            keeps.append(inversion.keep.clone())
    return inversion, keeps, oracle.invert(make_model(patch, size, dtype), start, TARGETS, offsets, config, MEAN, STD)


def compare(inversion: smi.Inversion, keeps: list[Tensor], expected: oracle.OracleResult, tolerance: float) -> None:
    config = inversion.config.resolved()
    assert min(expected.margins, default=1.0) > tolerance, "scores too close to compare what is kept"
    assert len(keeps) == len(expected.keeps)
    for ours, theirs in zip(keeps, expected.keeps, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(inversion.images, expected.images, atol=tolerance, rtol=0)

    result = inversion.result()
    assert torch.equal(result.keep, expected.result_keep)
    assert result.history.keys() <= expected.history.keys()
    images = len(TARGETS) if config.norm == "image" else 1
    for name, values in result.history.items():
        theirs = torch.tensor(expected.history[name]) / (images if name == "total" else 1)
        torch.testing.assert_close(values, theirs, atol=0, rtol=max(tolerance, 1e-5))
    model = make_model(inversion.model.info.patch_size[0], inversion.model.info.input_size[1:], expected.images.dtype)
    still = torch.zeros(len(TARGETS), 3, dtype=torch.int64)
    logits, _ = oracle.look(model, expected.images, expected.result_keep, still)
    torch.testing.assert_close(result.logits, logits.float(), atol=max(tolerance, 1e-4), rtol=0)
    if config.result_mask == "carried":
        dropped_at = torch.full((len(TARGETS), inversion.model.info.num_patches), config.iterations, dtype=torch.int32)
        for t, keep in reversed(list(zip(inversion.schedule, expected.keeps, strict=True))):
            gone = torch.ones_like(dropped_at, dtype=torch.bool).scatter(1, keep, False)
            dropped_at[gone] = t
        assert torch.equal(result.dropped_at, dropped_at)


@pytest.mark.parametrize("case", CASES)
def test_library_in_double_precision(case: str) -> None:
    patch, size, changes = CASES[case]
    inversion, keeps, expected = run_both(patch, size, make_config(changes), torch.float64)
    compare(inversion, keeps, expected, 1e-9 if "learning_rate" in changes else 1e-5)
    assert inversion.images.dtype == torch.float64


@pytest.mark.parametrize("semantics", ["strict", "official"])
def test_library_in_single_precision(semantics: str) -> None:
    """With an `eps` that gradients close to zero, whose sign is up to rounding, do not reach."""
    config = make_config({"semantics": semantics, "eps": 1e-3, **CALM})
    compare(*run_both(8, (32, 48), config, torch.float32), 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_librarys_draws(case: str) -> None:
    patch, size, changes = CASES[case]
    config = make_config(changes).resolved()
    inversion = smi.Inversion(make_model(patch, size), TARGETS, config)
    offsets = inversion.offsets
    assert offsets.dtype == torch.int64
    assert offsets.shape == (config.iterations, len(TARGETS) if config.augment_per == "image" else 1, 3)
    assert torch.equal(offsets, oracle.forbid_augmentation(offsets, config))
    for axis, pixels in enumerate(size):
        step = patch if config.jitter == "patch" else 1
        reach = 0 if config.jitter == "none" else pixels // 8 // step
        assert set(offsets[..., axis].flatten().tolist()) == {step * d for d in range(-reach, reach + 1)}
    assert set(offsets[..., 2].flatten().tolist()) == ({0, 1} if config.flip else {0})
