"""Images that fit into memory."""

import torch
import torch.nn.functional as F


class Images(torch.utils.data.Dataset):
    """A dataset held in one tensor.

    Args:
        images: (N, C, H, W), uint8 in [0, 255] or float in [-1, 1].
        labels: (N,) integers below len(classes), or None where there are no classes.
        classes: the class names.
    """

    def __init__(self, images, labels=None, classes=()):
        self.images = images
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels.long()
        self.classes = tuple(classes)

    @property
    def shape(self):
        return tuple(self.images.shape[1:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        if image.dtype == torch.uint8:
            image = to_float(image)
        return image, int(self.labels[i])

    def resized(self, size):
        """The same images at size x size, as floats; self where they already are."""
        if self.shape[1:] == (size, size):
            return self
        images = to_float(self.images) if self.images.dtype == torch.uint8 else self.images
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        return Images(images, self.labels, self.classes)


def to_float(pixels):
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1
