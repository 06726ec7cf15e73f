import torch

from .._optional import require
from .memory import Images


def digits(folder=None):
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels, which scikit-learn carries along.

    Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    if folder is not None:
        raise ValueError(f"digits: they come with scikit-learn, not from a folder, got {folder!r}")
    bunch = require("sklearn.datasets", "the source 'digits'").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return Images(images, torch.tensor(bunch.target), map(str, range(10)))
