"""Any folder of images."""

from pathlib import Path

import numpy as np
import torch

from .._optional import require
from .memory import to_float

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderImages(torch.utils.data.Dataset):
    """The images below a folder, read when asked for, as centred squares of size x size in colour.

    The first level of subfolders, where there is one, gives the classes.
    Raises: NotADirectoryError or FileNotFoundError where there are no images, ImportError without Pillow.
    """

    def __init__(self, folder, size=64):
        require("PIL.Image", "a folder of images")
        folder = Path(folder)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise FileNotFoundError(f"no images in {folder}: looked for {' '.join(SUFFIXES)}")
        self.shape = (3, size, size)
        parents = [path.relative_to(folder).parts[:-1] for path in self.paths]
        self.classes = tuple(sorted({parts[0] for parts in parents})) if all(parents) else ()
        self.labels = [self.classes.index(parts[0]) if self.classes else 0 for parts in parents]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = _centred_square(self.paths[i], self.shape[-1])
        return to_float(torch.from_numpy(np.array(image))).permute(2, 0, 1), self.labels[i]


def _centred_square(path, size):
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
