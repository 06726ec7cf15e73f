import torch

from .. import ops


class GroupNorm(torch.nn.GroupNorm):
    """Group normalisation with an activation, and a scale and shift per image, in one pass.

        y = act(gn(x) * (1 + scale) + shift)

    Replaces torch.nn.GroupNorm, alone or followed by an activation, and loads its state_dict unchanged.
    """

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, activation="linear", device=None, dtype=None):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.activation = activation

    @classmethod
    def from_torch(cls, norm, activation="linear"):
        """The same normalisation, sharing the parameters of a torch.nn.GroupNorm."""
        self = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, activation, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        return self.train(norm.training)

    def forward(self, x, scale=None, shift=None):
        return ops.group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, activation={self.activation!r}"
