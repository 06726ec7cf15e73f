"""What changes while training, and its checkpoint."""

import copy
import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class State:
    """Model, moving average of its weights, optimizer and step.

    All randomness of a step is seeded by (seed, step, process), so this is all that a checkpoint has to hold.
    """

    def __init__(self, model, recipe):
        self.model, self.recipe, self.step = model, recipe, 0
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)

    def update(self):
        """One optimizer step from the gradients there are. Returns the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        self.step += 1
        return norm

    def lr(self):
        warmup = min(1.0, (self.step + 1) / (self.recipe.warmup + 1))
        return self.recipe.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * self.step / self.recipe.steps))

    def _average(self):
        # Early on the average forgets faster: the initial weights are no part of the result.
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.ema.parameters()), list(self.model.parameters()), None)
        for mine, theirs in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            mine.copy_(theirs)

    def tensors(self):
        """Every tensor of the state, by a flat name."""
        optimizer = self.optimizer.state_dict()["state"]
        return {
            "step": torch.tensor(self.step),
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()},
            **{f"optimizer.{i}.{name}": tensor for i, of in optimizer.items() for name, tensor in of.items()},
        }

    def load_tensors(self, tensors):
        parts = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            if name != "step":
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
        self.step = int(tensors["step"])
        self.model.load_state_dict(parts["model"])
        self.ema.load_state_dict(parts["ema"])
        optimizer = self.optimizer.state_dict()
        for name, tensor in parts["optimizer"].items():
            i, _, rest = name.partition(".")
            optimizer["state"].setdefault(int(i), {})[rest] = tensor
        self.optimizer.load_state_dict(optimizer)
