import torch

from .. import ops
from ._plain_conv import check_plain


class UpsampleConv2d(torch.nn.Conv2d):
    """Nearest-2x upsampling followed by a 3x3 convolution with padding 1.

    Replaces torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(cin, cout, 3, padding=1)) and
    loads the state_dict of that Conv2d unchanged.
    """

    def __init__(self, in_channels, out_channels, bias=True, activation="linear", device=None, dtype=None):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    @classmethod
    def from_torch(cls, conv, activation="linear"):
        """The same convolution behind the upsampling, sharing the parameters of a torch.nn.Conv2d."""
        check_plain("UpsampleConv2d", conv)
        self = cls(conv.in_channels, conv.out_channels, conv.bias is not None, activation, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        return self.train(conv.training)

    def forward(self, x):
        return ops.upsample_conv2d(x, self.weight, self.bias, activation=self.activation)

    def extra_repr(self):
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}{bias}, activation={self.activation!r}"
