"""The training view of a pool: fills, transforms that carry the mask, batches."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import INFO, PLAN, fill_pool, make_result, open_writer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from smi.dataset import SyntheticDataset, patch_mask, pixel_mask
from smi.errors import SmiError
from smi.pool import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(fill_pool(tmp_path_factory.mktemp("dataset") / "pool"))


def dropped_pixels(item: tuple[Tensor, ...]) -> Tensor:
    """(C, pixels) of the dropped patches of an item."""
    return item[0][:, ~pixel_mask(item[1][None], INFO)[0]]


def test_items_are_the_images_in_order(pool: Pool) -> None:
    data = SyntheticDataset(pool)
    assert len(data) == 7
    for number, (image, keep, target, logits) in enumerate(list(data)):  # type: ignore[call-overload]
        result, row = make_result(number // 3), number % 3
        assert torch.equal(image, result.images[row])
        assert keep.nonzero()[:, 0].tolist() == result.keep[row].tolist()
        assert (keep.shape, keep.dtype, target.shape, target.dtype) == ((4,), torch.bool, (), torch.int64)
        assert target == PLAN.targets[number]
        assert torch.equal(logits, result.logits[row])


def test_gaps_and_bounds(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    for batch in (2, 0):
        writer.write(batch, make_result(batch))
    data = SyntheticDataset(tmp_path)
    assert len(data) == 4
    assert torch.equal(data[3][0], make_result(2).images[0])
    assert torch.equal(data[-1][0], data[3][0])
    for item in (4, -5):
        with pytest.raises(IndexError):
            data[item]


def test_no_more_shards_are_mapped_than_a_process_may(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smi.dataset._MAPPED", 2)
    data = SyntheticDataset(pool)
    for item in (0, 6, 3, 1, 5, 2, 4, 0):
        assert torch.equal(data[item][0], make_result(item // 3).images[item % 3])
        assert len(data._open) <= 2
    assert len(pool.batches) == 3


def test_items_can_be_changed_without_changing_the_pool(pool: Pool) -> None:
    data = SyntheticDataset(pool)
    for part in data[0]:
        part.zero_()
    assert torch.equal(data[0][0], make_result(0).images[0])
    assert torch.equal(data[0][3], make_result(0).logits[0])


def test_fills_replace_dropped_patches_only(pool: Pool) -> None:
    mean, std = torch.tensor(INFO.mean), torch.tensor(INFO.std)
    for number in range(7):
        plain = SyntheticDataset(pool)[number]
        kept = pixel_mask(plain[1][None], INFO)[0]
        for fill in ("black", "mean", "noise"):
            filled = SyntheticDataset(pool, fill=fill)[number]
            assert torch.equal(filled[0][:, kept], plain[0][:, kept])
            assert torch.equal(filled[1], plain[1])
        black = dropped_pixels(SyntheticDataset(pool, fill="black")[number])
        assert torch.allclose(black * std[:, None] + mean[:, None], torch.zeros(()), atol=1e-7)
        assert not dropped_pixels(SyntheticDataset(pool, fill="mean")[number]).any()


def test_noise_depends_on_seed_and_image_number_alone(pool: Pool, tmp_path: Path) -> None:
    noise = [dropped_pixels(item) for item in list(SyntheticDataset(pool, fill="noise"))]  # type: ignore[call-overload]
    again = SyntheticDataset(pool, fill="noise")
    assert all(torch.equal(dropped_pixels(again[i]), noise[i]) for i in reversed(range(7)))
    sequence = np.random.SeedSequence(5, spawn_key=(3, 4))  # pool seed; purpose "fill", image number
    stream = np.random.Generator(np.random.Philox(sequence))
    expected = torch.from_numpy(stream.standard_normal((3, 8, 8), dtype=np.float32))
    item = again[4]
    assert torch.equal(dropped_pixels(item), dropped_pixels((expected, item[1])))
    assert not torch.equal(noise[0], noise[1])
    every = torch.cat([n.flatten() for n in noise])
    assert abs(float(every.mean())) < 0.25
    assert 0.75 < float(every.std()) < 1.25


def test_fill_is_never_baked_in(pool: Pool) -> None:
    before = (pool.path / "shards/00000.safetensors").read_bytes()
    SyntheticDataset(pool, fill="noise")[0]
    assert (pool.path / "shards/00000.safetensors").read_bytes() == before


def test_flip_moves_the_mask_with_the_image(pool: Pool) -> None:
    plain, flipped = SyntheticDataset(pool), SyntheticDataset(pool, transform=v2.RandomHorizontalFlip(p=1))
    for number in range(7):
        image, keep, target, logits = flipped[number]
        assert torch.equal(image, plain[number][0].flip(-1))
        assert torch.equal(keep.view(2, 2), plain[number][1].view(2, 2).flip(-1))
        assert torch.equal(target, plain[number][2])
        assert torch.equal(logits, plain[number][3])
        assert type(image) is Tensor
        assert keep.dtype == torch.bool


def test_crop_moves_the_mask_with_the_image(pool: Pool) -> None:
    plain, cropped = SyntheticDataset(pool), SyntheticDataset(pool, transform=v2.RandomCrop(4))
    torch.manual_seed(0)
    for number in range(7):
        image, keep, *_ = cropped[number]
        whole, kept = plain[number][0], pixel_mask(plain[number][1][None], INFO)[0]
        windows = [(y, x) for y in range(5) for x in range(5)]
        (y, x) = next((y, x) for y, x in windows if torch.equal(whole[:, y : y + 4, x : x + 4], image))
        assert keep.tolist() == [bool(kept[y : y + 4, x : x + 4].sum() > 8)]


@pytest.mark.parametrize("number", range(7))
def test_exactly_half_a_patch_is_not_kept(pool: Pool, number: int) -> None:
    (left, right) = SyntheticDataset(pool)[number][1].view(2, 2).unbind(1)
    for shift, expected in ((1, left), (2, left & right), (3, right)):
        cut = SyntheticDataset(pool, transform=lambda *pair: [x[..., shift : shift + 4] for x in pair])  # noqa: B023
        assert torch.equal(cut[number][1], expected)


def test_padding_counts_as_dropped_and_fill_comes_first(pool: Pool) -> None:
    image, keep, *_ = SyntheticDataset(pool, fill="mean", transform=v2.Compose([v2.Pad(4), v2.Resize(32)]))[0]
    assert image.shape == (3, 32, 32)
    grid = keep.view(8, 8)
    assert not grid[:2].any()
    assert not grid[:, -2:].any()
    original = patch_mask(make_result(0).keep[:1], 4).view(2, 2)
    assert torch.equal(grid[2:6, 2:6], original.repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("transform", "word"),
    [
        (v2.Resize(9), "multiple of the patch size"),
        (lambda image, mask: image, "pair"),
        (lambda image, mask: (image, None), "pair"),
        (lambda image, mask: (image[..., :4], mask), "same multiple"),
    ],
)
def test_unusable_transforms_are_named(pool: Pool, transform: Any, word: str) -> None:
    with pytest.raises(SmiError, match=word):
        SyntheticDataset(pool, transform=transform)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(pool: Pool, workers: int) -> None:
    loader: DataLoader[Any] = DataLoader(SyntheticDataset(pool, fill="black"), batch_size=4, num_workers=workers)
    batches = list(loader)
    assert [tuple(part.shape) for part in batches[0]] == [(4, 3, 8, 8), (4, 4), (4,), (4, 4)]
    assert torch.cat([batch[2] for batch in batches]).tolist() == list(PLAN.targets)


def test_pickled_for_workers_without_its_tensors(pool: Pool) -> None:
    data = SyntheticDataset(pool, fill="noise")
    data[0], data[6]
    sent = pickle.dumps(data)
    assert len(sent) < 5000
    assert torch.equal(pickle.loads(sent)[4][0], data[4][0])


def test_unusable_pools_and_fills(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(SmiError, match="Did you mean 'noise'"):
        SyntheticDataset(pool, fill="nois")  # type: ignore[arg-type]
    open_writer(tmp_path / "empty")
    with pytest.raises(SmiError, match="no finished batch"):
        SyntheticDataset(tmp_path / "empty")
    with pytest.raises(SmiError, match="there is no pool"):
        SyntheticDataset(tmp_path / "none")
    fill_pool(tmp_path / "damaged")
    (tmp_path / "damaged/shards/00001.safetensors").write_bytes(b"")
    data = SyntheticDataset(tmp_path / "damaged")
    data[2]
    with pytest.raises(SmiError, match="00001"):
        data[3]


def test_masks_of_oblong_patches() -> None:
    info = dataclasses.replace(INFO, input_size=(3, 4, 12), patch_size=(2, 4), grid=(2, 3))
    mask = pixel_mask(patch_mask(torch.tensor([[1, 5]]), 6), info)[0]
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[:2, 4:8] = expected[2:, 8:] = True
    assert torch.equal(mask, expected)
