import math
from pathlib import Path

import torch

from .._optional import require

_GAP = 8


def save_grid(images, path, *, rows=None, cell=64):
    """Save images as one PNG that a person can look at.

    Image i stands in row i % rows, so with one row per class and class i % classes each row is a class.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1].
        path: where; its folder is made.
        rows: None makes the grid square.
        cell: small images are enlarged to about this many pixels.

    Raises: ValueError for other shapes, ImportError without Pillow.
    """
    if images.dim() != 4 or images.size(1) not in (1, 3) or not len(images):
        raise ValueError(f"save_grid: images must have the shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    rows = rows or math.ceil(math.sqrt(len(images)))
    tiles = [_picture(image, cell) for image in images]
    width, height = (side + _GAP for side in tiles[0].size)
    columns = math.ceil(len(tiles) / rows)
    Image = require("PIL.Image", "saving a picture")
    grid = Image.new(tiles[0].mode, (columns * width + _GAP, min(rows, len(tiles)) * height + _GAP))
    for i, tile in enumerate(tiles):
        grid.paste(tile, (i // rows * width + _GAP, i % rows * height + _GAP))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def _picture(image, cell):
    Image = require("PIL.Image", "saving a picture")
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    picture = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
    enlarge = max(1, cell // max(picture.size))
    return picture.resize([side * enlarge for side in picture.size], Image.Resampling.BICUBIC)
