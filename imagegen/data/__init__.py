"""Image sources: `load("digits")`, "fashion-mnist", "mnist", "cifar10" or any folder of images.

Every source is a torch `Dataset` of (image, label): image (C, H, W) float32 in [-1, 1], label an int.
"""

from .cifar10 import cifar10
from .digits import digits
from .folder import FolderImages
from .idx import fashion_mnist, mnist
from .load import SOURCES, load
from .memory import Images

__all__ = ["SOURCES", "FolderImages", "Images", "cifar10", "digits", "fashion_mnist", "load", "mnist"]
