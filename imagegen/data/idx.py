"""MNIST and data sets in its format: IDX files, plain or gzipped."""

import gzip

import numpy as np
import torch

from .memory import Images
from .places import find_folder

_PREFIX = {"train": "train", "test": "t10k"}
_UINT8 = 0x08

_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def mnist(folder=None, split="train"):
    """60,000 (test: 10,000) handwritten digits of 28x28 pixels. Source: LeCun, Cortes & Burges, 1998."""
    install = "give the folder with its four IDX files: --data mnist:FOLDER"
    return _load("mnist", folder, split, tuple(map(str, range(10))), install)


def fashion_mnist(folder=None, split="train"):
    """60,000 (test: 10,000) pieces of clothing, 28x28. Source: Xiao, Rasul & Vollgraf, "Fashion-MNIST", 2017."""
    install = "apt install dataset-fashion-mnist, or give the folder with its files: --data fashion-mnist:FOLDER"
    return _load("fashion-mnist", folder, split, _FASHION, install)


def _load(name, folder, split, classes, install):
    prefix = _PREFIX[split]
    folder = find_folder(name, folder, f"{prefix}-images*", install)
    images = read_idx(_one_file(folder, f"{prefix}-images*"))
    labels = read_idx(_one_file(folder, f"{prefix}-labels*"))
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels in {folder}")
    return Images(images[:, None], labels, classes)


def _one_file(folder, pattern):
    try:
        return min(folder.glob(pattern))
    except ValueError:
        raise FileNotFoundError(f"no {pattern} in {folder}") from None


def read_idx(path):
    """The uint8 tensor in an IDX file.

    Layout: two zero bytes, the type (0x08 is uint8), the number of axes, their lengths (32 bits, big-endian), data.
    Raises: ValueError where the file isn't that.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != bytes([0, 0, _UINT8]):
        raise ValueError(f"{path} is not an IDX file of uint8: it starts with {content[:4].hex(' ')}")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if data.size != shape.prod():
        raise ValueError(f"{path} is cut off: {data.size} bytes of data for the shape {tuple(shape)}")
    return torch.from_numpy(data.reshape(shape).copy())
