"""Sources by name."""

from .cifar10 import cifar10
from .digits import digits
from .folder import FolderImages
from .idx import fashion_mnist, mnist

SOURCES = {"digits": digits, "fashion-mnist": fashion_mnist, "mnist": mnist, "cifar10": cifar10}


def load(source, *, size=None):
    """The images of a source.

    Args:
        source: "digits", "fashion-mnist", "mnist", "cifar10"; NAME:FOLDER for the same from your own folder; or the
            path of any folder of images.
        size: the images come as size x size; None keeps the source's own (folders: 64).

    Returns: a `torch.utils.data.Dataset` of (image (C, H, W) in [-1, 1], label), with `shape` and `classes`.
    Raises: FileNotFoundError, NotADirectoryError or ImportError that say what is missing and how to get it.
    """
    if size is not None and size < 1:
        raise ValueError(f"load: size must be positive, got {size}")
    name, _, folder = source.partition(":")
    if name not in SOURCES:
        return _folder(source, size)
    images = SOURCES[name](folder or None)
    return images if size is None else images.resized(size)


def _folder(path, size):
    try:
        return FolderImages(path) if size is None else FolderImages(path, size)
    except NotADirectoryError:
        raise NotADirectoryError(f"source {path!r} is neither one of {', '.join(SOURCES)} nor a folder") from None
