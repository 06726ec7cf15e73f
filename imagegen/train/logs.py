"""TensorBoard logs, or none."""

from .._optional import require


class Logs:
    """Writes to `folder`; None writes nothing."""

    def __init__(self, folder):
        self._writer = None
        if folder is not None:
            require("tensorboard", "logging (or give --no-tensorboard)")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder)

    def scalars(self, step, **values):
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def images(self, step, images):
        if self._writer is not None:
            self._writer.add_images("samples", (images + 1) / 2, step)

    def close(self):
        if self._writer is not None:
            self._writer.close()
