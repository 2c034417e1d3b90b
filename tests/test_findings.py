"""What the published code does that ours is to know or to avoid: what jitter feeds, maps kept, masks out of pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from small import CLASSES, PATCH, N, alive, one_thread, tiny  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smi
import smi_kernels
from smi import Config, Context, Inversion, SparseModel
from smi.calibration import from_pool
from smi.dataset import SyntheticDataset
from smi.objectives import Objective
from smi.pool import Pool, PoolWriter, to_pixels
from smi.report_data import renormalise
from smi.transfer import TransferConfig, teach

ONCE = {"iterations": 6, "prune_at": (3,), "prune_ratio": (0.3,)}  # 16, 11 patches
BACKENDS = ["reference", "auto"]


# ---- jitter by pixels feeds other pixels than those of the kept patches


def test_nearest_cell_shares_three_quarters_of_a_patch_with_it() -> None:
    """Every offset of 224 pixels in patches of 16: how many pixels of a patch are read where it is said to be."""
    patch, columns, reach = 16, 14, 28
    rows, at = torch.arange(224).div(patch, rounding_mode="floor"), 5 * columns + 9
    numbered = (rows[:, None] * columns + rows).float().view(1, 1, 224, 224)  # the patch that every pixel is of
    shared = torch.zeros(2 * reach + 1, 2, 2 * reach + 1)
    for dy in range(-reach, reach + 1):
        offsets = torch.tensor([(dy, dx, flip) for flip in (0, 1) for dx in range(-reach, reach + 1)])
        keep, images = torch.full((len(offsets), 1), at), numbered.expand(len(offsets), -1, -1, -1)
        cells = smi_kernels.map_cells(keep, offsets, (columns, columns), (patch, patch))
        read = smi_kernels.gather_patches(images, cells, offsets, (patch, patch))
        shared[dy + reach] = (read == at).float().mean((1, 2)).view(2, -1)
    assert torch.equal(shared[:, 0], shared[:, 1])
    along = shared[reach, 0]  # no shift in height
    assert (round(along.mean().item(), 2), along.min().item()) == (0.73, 0.5)
    assert (round(shared.mean().item(), 2), shared.min().item()) == (0.54, 0.25)
    assert (shared == 1).float().mean().item() == pytest.approx(9 / 57**2)  # 0.28 %: -16, 0 and 16 each way


@pytest.mark.parametrize(("semantics", "jitter"), [("official", "pixel"), ("official", "patch"), ("strict", "patch")])
def test_gradient_falls_on_stopped_pixels_under_jitter_by_pixels_alone(semantics: str, jitter: str) -> None:
    shares = []

    def spy(context: Context) -> Tensor:
        entropy = torch.nn.functional.cross_entropy(context.logits, context.targets)
        (grad,) = torch.autograd.grad(entropy, context.images, retain_graph=True)
        live = oracle.kept_pixels(context.keep, grad.shape, PATCH)
        fed = torch.zeros_like(live)
        offsets = [(0, 0, 0)] * 2 if context.offsets is None else context.offsets.expand(2, -1).tolist()
        for b, offset in enumerate(offsets):
            cells, sources = oracle.cell_map(4, 4, PATCH, *offset), oracle.pixel_map(16, 16, *offset)
            for patch in context.keep[b].tolist():
                fed[b].view(-1)[[sources[p] for p in oracle.cell_pixels(4, PATCH, cells[patch])]] = True
        assert torch.equal((grad != 0).any(1, keepdim=True), fed)
        if context.keep.shape[1] < N:
            energy = grad.square().sum(1, keepdim=True)
            shares.append((energy[~live].sum() / energy.sum()).item())
            assert (shares[-1] == 0) == torch.equal(fed, live)
        return context.logits.mean()

    config = Config(**{**ONCE, "iterations": 40}, semantics=semantics, jitter=jitter, cross_entropy=1.0)
    Inversion(tiny(), [0, 1], config, objectives=[Objective(spy, weight=0.0, differentiates=True)]).run()
    share = sum(shares) / len(shares)
    assert 0.02 < share < 0.9 if jitter == "pixel" else share == 0


# ---- no attention map is made


class Maps(TorchDispatchMode):
    """Counts tensors of so many rows and columns."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.found = tokens, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        square = (self.tokens, self.tokens)
        self.found += sum(isinstance(x, Tensor) and x.ndim > 2 and x.shape[-2:] == square for x in tree_leaves(out))
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranking", ["class_attention", "received_attention"])
def test_no_attention_map_is_made_but_where_a_block_ranks_by_it(backend: str, ranking: Any) -> None:
    made: dict[int, list[int]] = {1: [], 3: []}
    for depth, counts in made.items():
        model = SparseModel(tiny(depth=depth), ranking=ranking, backend=backend)
        inversion = Inversion(model, [0, 1], Config(**ONCE, ranking=ranking))
        while not inversion.done:
            with Maps(len(inversion.keep[0]) + 1 if inversion.iteration != 3 else 12) as maps:
                inversion.step()
            counts.append(maps.found)
    assert made[1] == made[3]  # of the last block, if any
    assert not any(made[3][:2] + made[3][3:])
    assert bool(made[3][2]) == (ranking == "received_attention")  # for the other one a row of the map is enough
    with Maps(N + 1) as maps:
        model.attention_maps(torch.zeros(2, 3, 16, 16))
    assert maps.found >= 3, "maps would not be seen"


# ---- masks are carried, never read out of pixels


def by_hand(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), model.patch_embed(images)], 1) + model.pos_embed
    chosen = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], 1)
    x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
    logits: Tensor = model.head(model.norm(model.blocks(x))[:, 0])
    return logits


def darken(images: Tensor, keep: Tensor) -> None:
    """The first kept patch of every image becomes 0, and a row of the next."""
    for b, (first, second, *_) in enumerate(keep.tolist()):
        images[b].view(-1, 256)[:, list(oracle.cell_pixels(4, PATCH, first))] = 0
        images[b].view(-1, 256)[:, list(oracle.cell_pixels(4, PATCH, second)[:PATCH])] = 0


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_patch_of_zeros_stays_kept_and_is_fed(backend: str) -> None:
    """Under torch.no_grad(), which is nothing to an inversion."""
    network = tiny()
    config = Config(iterations=9, prune_at=(3, 6), prune_ratio=(0.3, 0.3))  # 16, 11, 7 patches
    inversion = Inversion(network, [0, 1], config, backend=backend)
    for _ in range(4):
        inversion.step()
    before = inversion.keep.clone()
    darken(inversion.images, before)
    while not inversion.done:
        inversion.step()
    assert inversion.keep.shape == (2, 7) and (alive(before) | ~alive(inversion.keep)).all()
    darken(inversion.images, inversion.keep)
    result = inversion.result()
    assert torch.equal(result.keep, inversion.keep)
    torch.testing.assert_close(result.logits, by_hand(network, result.images, result.keep), rtol=1e-4, atol=1e-4)
    without = by_hand(network, result.images, result.keep[:, 1:])
    assert (result.logits - without).abs().max() > 1e-2, "nothing tells whether the patch was fed"


@pytest.fixture(scope="module")
def dark(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """16 images, each with a kept patch of zeros, and dropped ones that are none."""
    path, plan = tmp_path_factory.mktemp("dark") / "pool", smi.WorkPlan(tuple(i % CLASSES for i in range(16)), 8)
    model = SparseModel(tiny(), name="tiny")
    writer = PoolWriter(path, model.info, Config(**ONCE), plan, device="cpu")
    for batch in range(2):
        numbers = plan.batch(batch)
        result = smi.invert(model, [plan.targets[i] for i in numbers], Config(**ONCE), indices=list(numbers))
        darken(result.images, result.keep)
        writer.write(batch, replace(result, snapshots=to_pixels(result.images, model.info)[None], snapshot_at=[6]))
    return Pool(path)


@pytest.mark.parametrize("fill", ["as-is", "black", "mean", "noise"])
def test_fills_and_calibration_go_by_the_mask(dark: Pool, fill: Any) -> None:
    images = torch.cat([result.images for result in dark])
    keep = torch.cat([result.keep for result in dark])
    live = oracle.kept_pixels(keep, images.shape, PATCH).expand_as(images)
    assert (images[live] == 0).any() and not (images[~live] == 0).all()
    shown = [SyntheticDataset(dark, fill=fill)[i] for i in range(16)]
    filled = torch.stack([item[0] for item in shown])
    assert torch.equal(filled[live], images[live])
    assert torch.equal(filled[~live], images[~live]) == (fill == "as-is")
    assert torch.equal(torch.stack([item[1] for item in shown]), alive(keep))
    fed = list(from_pool(dark, images=12).read())
    assert torch.equal(torch.cat([cells for _, cells in fed if cells is not None]), keep[:12])
    whole = torch.cat([batch for batch, _ in from_pool(dark, images=12, fill=fill).read()])
    assert torch.equal(whole, filled[:12])


def test_a_student_is_fed_the_patch_of_zeros(dark: Pool, tmp_path: Path) -> None:
    student, seen = tiny(seed=2, depth=1), list[Tensor]()
    hook = student.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        embedded = student.patch_embed(torch.cat([result.images for result in dark])) + student.pos_embed[:, 1:]
    keep = torch.cat([result.keep for result in dark])
    expected = embedded.gather(1, keep[..., None].expand(-1, -1, embedded.shape[-1]))
    config = TransferConfig(epochs=1, batch_size=4, holdout=0.25, mode="probe", tokens="kept", fill="as-is")
    teach(student, dark, tmp_path, config)
    hook.remove()
    fed = list(itertools.chain(*(tokens for tokens in seen if tokens.shape[1] == 12)))  # else of a first try
    assert len(fed) >= 16
    for tokens in fed:
        assert any(torch.allclose(tokens[1:], wanted, rtol=1e-4, atol=1e-5) for wanted in expected)


def test_black_stays_black() -> None:
    """A pixel at the lower end is not 0 when normalised, and one that is 0 has the mean colour."""
    info = replace(SparseModel(tiny()).info, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    column = (-torch.tensor(info.mean) / torch.tensor(info.std)).view(3, 1, 1)
    assert not to_pixels(column.expand(1, 3, 16, 16), info).any()
    assert torch.equal(to_pixels(torch.zeros(1, 3, 1, 1), info).flatten(), torch.tensor([128, 102, 76]).to(torch.uint8))
    other = renormalise(column.expand(1, 3, 2, 2), info, (0.1, 0.2, 0.6), (0.5, 0.5, 0.5))
    torch.testing.assert_close(other[0, :, 0, 0], torch.tensor([-0.2, -0.4, -1.2]))
    zeros = renormalise(torch.zeros(1, 3, 1, 1), info, (0.1, 0.2, 0.6), (0.5, 0.5, 0.5))
    torch.testing.assert_close(zeros.flatten(), torch.tensor([0.8, 0.4, -0.6]))
