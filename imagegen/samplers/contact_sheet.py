"""What the model believed the images to be, step by step."""

import torch


class ContactSheet:
    """Keeps the x_0 that the model predicts at every `every`-th row, to be passed to `sample` as log.

        sheet = samplers.ContactSheet(every=5)
        samplers.sample(model, sampler, shape, log=sheet)
        sheet.save("steps.png")  # one row per image, time from left to right

    decode: turns an x_0 into images (B, 1 or 3, H, W) in [-1, 1], say a latent model's decoder.
    """

    def __init__(self, every=1, decode=None):
        if every < 1:
            raise ValueError(f"ContactSheet: every must be at least 1, got {every}")
        self.every, self.decode = every, decode
        self.times, self.images = [], []

    def __call__(self, i, t, x0):
        if i % self.every == 0:
            self.times.append(float(t))
            self.images.append((self.decode(x0) if self.decode else x0).float().cpu())

    def save(self, path, **options):
        """Write the sheet as a PNG (needs pillow); options as in `train.grid.save_grid`."""
        from ..train.grid import save_grid

        if not self.images:
            raise ValueError("ContactSheet: save has nothing to show, no row was logged")
        save_grid(torch.cat(self.images), path, rows=len(self.images[0]), **options)
