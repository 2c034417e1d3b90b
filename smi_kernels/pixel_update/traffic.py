"""How the pixel step cuts images into tiles, and the memory traffic that follows from it."""

from __future__ import annotations

TILE_ROWS = 16  # a program steps this many rows of one channel, and takes the sums of what it wrote


def pixel_step_bytes(
    images: int, channels: int, height: int, width: int, kept_pixels: int, frozen: bool = False, direct: bool = False
) -> int:
    """Bytes that a float32 `pixel_step` and its `finish_prior_sums` move, if a program's own reads are cached.

    Images and moments are read and written once. Of each border between two tiles both rows are read twice more: by the
    tile on the other side, and for the sums of differences across the border.

    Args:
        images, channels, height, width: of the batch.
        kept_pixels: pixels of an image in kept patches; their gradient is read once for each channel.
        frozen: whether all other pixels stay what they are; their moments are then neither read nor written.
        direct: whether pixels have a gradient of their own, which is read once for each pixel that moves.
    """
    tiles = -(-height // TILE_ROWS)
    moving = kept_pixels if frozen else height * width
    state = 2 * height * width + (5 if direct else 4) * moving
    borders = 2 * 2 * (tiles - 1) * width
    sums = 9 * (height + tiles + 1)
    return 4 * images * channels * (state + borders + sums + kept_pixels)
