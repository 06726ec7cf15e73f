import numpy as np
import torch

from .memory import Images
from .places import find_folder

_PATTERN = {"train": "data_batch_*.bin", "test": "test_batch.bin"}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # the label, then the red, green and blue planes


def cifar10(folder=None, split="train"):
    """50,000 (test: 10,000) colour photographs of 32x32 pixels, from the "binary version" of the data set.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    install = "unpack cifar-10-binary.tar.gz and give its folder: --data cifar10:FOLDER"
    folder = find_folder("cifar10", folder, _PATTERN[split], install)
    records = np.concatenate([_records(path) for path in sorted(folder.glob(_PATTERN[split]))])
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Images(images, torch.from_numpy(records[:, 0].copy()), _CLASSES)


def _records(path):
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % _RECORD:
        raise ValueError(f"{path} is not a CIFAR-10 binary file: {content.size} bytes, not a multiple of {_RECORD}")
    return content.reshape(-1, _RECORD)
