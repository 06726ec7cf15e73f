import torch

from .. import ops
from ..ops._activation import MODULES


class BiasAct(torch.nn.Module):
    """A bias per channel, an activation, gain and clamp in one pass; see imagegen.ops.bias_act.

    The bias is the parameter `bias`, as in the layer it is taken from. Without it, replaces torch.nn.Identity, ReLU,
    LeakyReLU, SiLU, GELU, Tanh and Sigmoid, whose state_dict is empty.
    """

    def __init__(
        self, num_channels, act="linear", alpha=None, gain=None, clamp=None, dim=1, bias=True, device=None, dtype=None
    ):
        super().__init__()
        self.num_channels, self.dim = num_channels, dim
        self.act, self.alpha, self.gain, self.clamp = act, alpha, gain, clamp
        self.bias = torch.nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_torch(cls, activation):
        """The same activation as a torch.nn module computes, without a bias; put a layer's own bias in `bias`."""
        name = type(activation).__name__
        if name not in MODULES or getattr(activation, "approximate", "none") != "none":
            raise ValueError(f"BiasAct: activation must be one of {', '.join(MODULES)}, got {activation}")
        alpha = getattr(activation, "negative_slope", None)
        return cls(None, MODULES[name], alpha, gain=1.0, bias=False).train(activation.training)

    def forward(self, x):
        return ops.bias_act(
            x, self.bias, dim=self.dim, act=self.act, alpha=self.alpha, gain=self.gain, clamp=self.clamp
        )

    def extra_repr(self):
        options = {name: getattr(self, name) for name in ("alpha", "gain", "clamp")}
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return f"{self.num_channels}, act={self.act!r}{given}" + ("" if self.bias is not None else ", bias=False")
